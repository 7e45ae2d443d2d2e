"""Networks and blocks as .tflite: they compute what they do in Keras, and become integers."""

import keras
import numpy as np
import pytest

from tests.architectures.networks import NETWORKS, SHAPE, small, unsettled
from tfaccel.architectures import (
    GoogLeNet,
    channel_shuffle,
    conv_activation,
    conv_bn_activation,
    depthwise_bn_activation,
    depthwise_separable,
    fire,
    grouped_shuffle_unit,
    inception,
    inverted_residual,
    local_response_normalization,
    mlpconv,
    shuffle_unit,
    squeeze_excite,
)
from tfaccel.export import to_tflite
from tfaccel.measurement import TFLiteModel, count
from tfaccel.measurement.flatbuffer import TFLiteFile

BLOCKS = {
    "conv_activation": (conv_activation, {"filters": 8}),
    "conv_bn_activation": (conv_bn_activation, {"filters": 8, "groups": 2, "strides": 2}),
    "depthwise_bn_activation": (depthwise_bn_activation, {"kernel_size": 5}),
    "depthwise_separable": (depthwise_separable, {"filters": 8, "strides": 2}),
    "squeeze_excite": (squeeze_excite, {"channels": 4}),
    "squeeze_excite sigmoid": (squeeze_excite, {"channels": 4, "gate": "sigmoid"}),
    "inverted_residual": (
        inverted_residual,
        {"filters": 8, "squeeze": 0.25, "activation": "hard_swish"},
    ),
    "channel_shuffle": (channel_shuffle, {"groups": 4}),
    "shuffle_unit": (shuffle_unit, {"filters": 8}),
    "grouped_shuffle_unit": (grouped_shuffle_unit, {"filters": 8, "groups": 2}),
    "grouped_shuffle_unit strided": (
        grouped_shuffle_unit,
        {"filters": 16, "groups": 2, "strides": 2},
    ),
    "mlpconv": (mlpconv, {"filters": (8, 4)}),
    "inception": (inception, {"channels": (4, 2, 4, 2, 4, 4)}),
    "fire": (fire, {"squeeze": 4, "expand": 4}),
}


def pixels(count, shape=SHAPE):
    return np.random.default_rng(1).random((count, *shape), np.float32)


def block_model(name):
    keras.utils.set_random_seed(0)
    block, arguments = BLOCKS[name]
    inputs = keras.Input((6, 6, 8))
    return unsettled(keras.Model(inputs, block(inputs, name="block", **arguments)))


def assert_close(found, expected):
    """Measured for integers: a mean error of up to 0.02 of the spread, a largest of up to 0.19."""
    error = np.abs(found - expected) / expected.std()
    assert error.mean() < 0.04
    assert error.max() < 0.4


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", [*NETWORKS, *BLOCKS])
def test_float_and_integer_files(name, tmp_path):
    model = small(name) if name in NETWORKS else block_model(name)
    x = pixels(16, model.input_shape[1:])
    expected = np.asarray(model(x, training=False))
    spread = expected.std()
    assert spread > 0
    floats = to_tflite(model, tmp_path / "float.tflite").path
    np.testing.assert_allclose(TFLiteModel(floats).predict(x), expected, atol=1e-4 * spread)
    assert count(floats).macs == count(model).macs
    artifact = to_tflite(model, tmp_path / "int8.tflite", "int8", representative_data=x)
    assert_close(TFLiteModel(artifact.path).predict(x), expected)
    assert artifact.float_tensors == ()
    operators = {operator.name for operator in TFLiteFile.read(artifact.path).operators()}
    assert "CUSTOM" not in operators


def test_local_response_normalization_stays_float_in_an_integer_file(tmp_path):
    inputs = keras.Input((6, 6, 8))
    y = conv_activation(local_response_normalization(inputs), 4, name="conv")
    model = keras.Model(inputs, y)
    x = 10 * pixels(16, (6, 6, 8))
    expected = np.asarray(model(x))
    floats = to_tflite(model, tmp_path / "float.tflite").path
    np.testing.assert_allclose(TFLiteModel(floats).predict(x), expected, atol=1e-4)
    artifact = to_tflite(model, tmp_path / "int8.tflite", "int8", representative_data=x)
    assert_close(TFLiteModel(artifact.path).predict(x), expected)
    assert artifact.float_tensors  # named, not silent


def test_auxiliary_heads_keep_their_names(tmp_path):
    model = unsettled(GoogLeNet((32, 32, 3), 5, 0.125, auxiliary=True))
    x = pixels(2, (32, 32, 3))
    path = to_tflite(model, tmp_path / "float.tflite").path
    found = TFLiteModel(path).predict(x)
    expected = keras.tree.flatten(model(x, training=False))
    assert len(found) == 3
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
