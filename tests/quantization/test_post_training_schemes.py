"""Every scheme that quantize rounds for: near float, and the file computes what the model does."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.quantization.networks import images, network, steps_apart
from tfaccel.export import to_tflite
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.quantization import Scheme, quantize, scheme_of


def body(x):
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(x)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    x = layers.Conv2D(16, 1, activation="relu", name="pointwise")(x)
    return layers.Dense(4, name="logits")(layers.Flatten(name="flat")(x))


@pytest.fixture(scope="module")
def model():
    return network(body)


def noise(found, expected):
    return float(np.mean((np.asarray(found) - expected) ** 2) / np.var(expected))


def test_values_of_16_bits_leave_the_error_of_the_kernels_alone(model, tmp_path):
    quantized = quantize(model, images(64), "int16x8", calibrator="minmax")
    eight = quantize(model, images(64), "int8", calibrator="minmax")
    x = images(32, 5)
    expected = np.asarray(model(x))
    assert noise(quantized(x), expected) < 0.5 * noise(eight(x), expected)
    assert scheme_of(quantized).name == "int16x8"
    artifact = to_tflite(quantized, tmp_path / "m.tflite")
    assert artifact.scheme == "int16x8"
    assert artifact.float_tensors == ()
    apart = np.abs(TFLiteModel(artifact.path).predict(x) - np.asarray(quantized(x)))
    assert apart.max() < 1e-3 * np.ptp(expected)


def test_weights_alone_in_4_bits(model, tmp_path):
    quantized = quantize(model, images(64), "int4_weight_only", rounding="gptq")
    x = images(32, 5)
    expected = np.asarray(model(x))
    assert noise(quantized(x), expected) < 0.05
    artifact = to_tflite(quantized, tmp_path / "m.tflite")
    assert artifact.scheme == "int4_weight_only"
    # LiteRT rounds what a layer gets to 8 bits by itself, sample by sample.
    apart = np.abs(TFLiteModel(artifact.path).predict(x) - np.asarray(quantized(x)))
    assert apart.max() < 0.01 * np.ptp(expected)
    whole = to_tflite(model, tmp_path / "f.tflite").size_bytes
    held = sum(
        int(np.prod(model.get_layer(n).kernel.shape)) for n in ("stem", "pointwise", "logits")
    )
    assert whole - artifact.size_bytes > 0.8 * 3.5 * held


def test_a_scheme_by_its_bits(model, tmp_path):
    quantized = quantize(model, images(64), "w6a8")
    path = to_tflite(quantized, tmp_path / "m.tflite").path
    assert steps_apart(path, quantized, images(16, 4)).max() < 3
    layer = quantized.get_layer("logits")
    weight = np.asarray(layer.layer.kernel)
    levels = weight / np.abs(weight).max(axis=0) * 31
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)


def test_grids_that_are_only_trained_are_refused(model):
    for scheme in ("int4_block32", Scheme("own", 8, 8, symmetric_weights=False)):
        with pytest.raises(ValueError, match=r"symmetric grids with one step .*quantize_aware"):
            quantize(model, images(8), scheme)
    with pytest.raises(ValueError, match="needs no calibration"):
        quantize(
            model,
            images(8),
            keras.saving.deserialize_keras_object(
                keras.saving.serialize_keras_object(Scheme("dynamic_int8", 8, 32))
            ),
        )
