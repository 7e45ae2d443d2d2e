"""The networks as .tflite: they compute what they do in Keras, and become integers altogether."""

import numpy as np
import pytest

from tests.measurement.tflite_samples import convert, images
from tfaccel.architectures import MobileNetV2, ShuffleNetV2
from tfaccel.measurement import TFLiteModel, count
from tfaccel.measurement.flatbuffer import TFLiteFile

NETWORKS = {"MobileNetV2": (MobileNetV2, 0.35), "ShuffleNetV2": (ShuffleNetV2, 0.25)}


@pytest.mark.parametrize("name", NETWORKS)
def test_float_and_integer_files(name, tmp_path):
    build, width = NETWORKS[name]
    model = build((8, 8, 1), 10, width, last_channels=32)
    random = np.random.default_rng(0)
    model.set_weights(
        [random.uniform(0.5, 1.5, w.shape) if w.ndim == 1 else w for w in model.get_weights()]
    )
    x = images(4, (8, 8, 1))
    expected = np.asarray(model(x, training=False))
    spread = np.abs(expected).max()
    floats = convert(model, tmp_path / "float.tflite")
    np.testing.assert_allclose(TFLiteModel(floats).predict(x), expected, atol=1e-4 * spread)
    assert count(floats).macs == count(model).macs
    integers = convert(model, tmp_path / "int8.tflite", scheme="int8")
    np.testing.assert_allclose(TFLiteModel(integers).predict(x), expected, atol=0.15 * spread)
    dtypes = {info["dtype"] for info in TFLiteModel(integers, delegates=False).tensor_details()}
    assert np.float32 not in dtypes
    operators = {operator.name for operator in TFLiteFile.read(integers).operators()}
    assert operators.isdisjoint({"QUANTIZE", "DEQUANTIZE", "CUSTOM"})
