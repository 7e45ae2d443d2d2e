"""ReLU behind a transposed convolution, which the converter does not always fuse."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.contracts.tables import make_data
from tfaccel.export import to_tflite
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.quantization import plan, quantize_aware


def _transposed(x, **options):
    return layers.Conv2DTranspose(4, 3, **options)(x)


def _separate(x, **options):
    return layers.ReLU(6.0)(_transposed(x, **options))


BODIES = {
    "no_bias": lambda x: _transposed(x, activation="relu", use_bias=False),
    "zero_bias": lambda x: _transposed(x, activation="relu"),
    "separate": lambda x: _separate(x, use_bias=False),
    "bias": lambda x: _separate(x, bias_initializer="normal"),
    "norm": lambda x: layers.ReLU()(layers.BatchNormalization()(_transposed(x))),
    "one_dimension": lambda x: layers.Conv1DTranspose(4, 3, activation="relu", use_bias=False)(
        layers.Reshape((16, 12))(x)
    ),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_all_integers_as_planned(body, tmp_path):
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, body(inputs))
    assert not [d for d in plan(model) if d.action == "float"]
    aware, x = quantize_aware(model), make_data(16)[0]
    aware(x, training=True)  # learns ranges; a bias of zeros stays one
    artifact = to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8")
    assert artifact.float_tensors == ()
    file = TFLiteModel(artifact.path)
    apart = np.abs(file.predict(x) - np.asarray(aware(x))) / file.outputs[0].scale
    assert apart.max() <= 2.001
    assert (apart > 1.001).mean() <= 1e-2
