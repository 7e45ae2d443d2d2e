"""Layers computed in bits against Keras and NumPy, padding included, exactly where that is due."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tfaccel.quantization.low_bit import low_bit
from tfaccel.quantization.low_bit_weights import Levels, XNORNet
from tfaccel.quantization.popcount import (
    PackedLayer,
    PackedNetwork,
    binary_matmul,
    pack_signs,
)


def signs_of(shape, seed=0):
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=shape).astype("float32")


@given(st.integers(1, 20), st.integers(1, 150), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_product_of_signs_is_exact(rows, length, columns, seed):
    a, b = signs_of((rows, length), seed), signs_of((length, columns), seed + 1)
    found = binary_matmul(pack_signs(a), pack_signs(b.T).T, length)
    np.testing.assert_array_equal(found, a @ b)


def test_rows_are_divided_over_threads():
    a, b = signs_of((300, 70)), signs_of((70, 120), 1)
    found = binary_matmul(pack_signs(a), pack_signs(b.T).T, 70, threads=3)
    np.testing.assert_array_equal(found, a @ b)


def test_words_hold_the_first_sign_in_the_lowest_bit():
    values = -np.ones((2, 66))
    values[0, [0, 3, 64]] = 0.0, 5.0, 1.0
    np.testing.assert_array_equal(pack_signs(values), [[1 + 8, 1], [0, 0]])


@settings(max_examples=40)
@given(
    rank=st.integers(1, 3),
    channels=st.sampled_from([1, 5, 64, 70]),
    window=st.integers(1, 4),
    strides=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.sampled_from(["same", "valid"]),
    size=st.integers(7, 9),
)
def test_convolution_equals_keras_exactly(rank, channels, window, strides, dilation, padding, size):
    kind = (layers.Conv1D, layers.Conv2D, layers.Conv3D)[rank - 1]
    if strides > 1:
        dilation = 1  # Keras has one or the other
    conv = kind(
        3, window, strides=strides, dilation_rate=dilation, padding=padding, activation="relu"
    )
    conv.build((None, *[None] * rank, channels))
    codes = signs_of(conv.kernel.shape)
    conv.set_weights([codes, np.array([0.5, -1.0, 0.25], "float32")])
    one = np.ones((), "float32")
    packed = PackedLayer(conv, Levels(codes.astype(np.int8), one, one))
    x = signs_of((2, *range(size, size + rank), channels), 1)
    expected = np.asarray(conv(x))
    assert packed.compute_output_shape(x.shape) == expected.shape
    np.testing.assert_array_equal(packed(x), expected)
    np.testing.assert_array_equal(packed(x), expected)  # the correction is remembered


def test_dense_layer_of_any_rank_equals_keras():
    dense = layers.Dense(5)
    dense.build((None, 3, 130))
    codes = signs_of((130, 5))
    dense.kernel.assign(codes)
    one = np.ones((), "float32")
    x = signs_of((2, 3, 130), 2)
    packed = PackedLayer(dense, Levels(codes.astype(np.int8), one, one))
    np.testing.assert_array_equal(packed(x), dense(x))


def network():
    """Residual, strided and padded convolutions, a nested model, dense layers, two outputs."""
    keras.utils.set_random_seed(4)
    inner_in = keras.Input((None, None, 8))
    inner = layers.Conv2D(12, 3, strides=2, padding="same", name="down")(inner_in)
    inner = keras.Model(inner_in, layers.BatchNormalization()(inner), name="inner")
    inputs = keras.Input((7, 7, 3))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 3, name="stem")(inputs)))
    y = layers.Conv2D(8, 3, padding="same", activation="relu", name="body")(x)
    x = layers.Flatten()(inner(layers.Add()([x, y])))
    x = layers.Dropout(0.5)(layers.Dense(9, name="hidden")(x))
    return keras.Model(inputs, [layers.Dense(3, name="head")(x), layers.Dense(2, name="side")(x)])


def moved(how):
    """A low-bit model whose batch norms have seen data and whose weights have moved."""
    model = low_bit(network(), how)
    random = np.random.default_rng(0)
    x = random.normal(size=(24, 7, 7, 3)).astype("float32")
    for variable in model.trainable_variables:
        variable.assign_add(random.normal(scale=0.1, size=variable.shape).astype("float32"))
    model(x, training=True)
    return model, x


@pytest.mark.parametrize(
    ("how", "tolerance"),
    [("binary_net", 0.0), ("xnor", 2e-5), (XNORNet(input_scale=True), 2e-5)],
    ids=["binary_net", "xnor", "input_scale"],
)
def test_network_equals_keras(how, tolerance):
    model, x = moved(how)
    packed = PackedNetwork(model, threads=2)
    assert sorted(packed.layers) == ["body", "down", "hidden"]
    # batches of one size: Keras's own rounding differs with it
    expected = [np.asarray(y) for y in model(x, training=False)]
    for ours, theirs in zip(packed.predict(x, batch_size=24), expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
    for ours, theirs in zip(packed.predict(x, batch_size=7), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_memory_is_counted_in_words_and_no_float_kernel_is_kept():
    model, _ = moved("xnor")
    packed = PackedNetwork(model)
    # body 3x3x8x8, down 3x3x8x12: a word for the 8 channels of a tap; hidden 108 x 9: two words
    assert packed.kernel_bytes == 8 * (9 * 8 + 9 * 12 + 2 * 9) + 4 * (8 + 12 + 9)
    assert packed.float_kernel_bytes == 4 * (576 + 864 + 972)
    assert all(not layer.weights for layer in packed.layers.values())


def test_mixed_precision_gives_the_models_type():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = network()
    finally:
        keras.config.set_dtype_policy("float32")
    model = low_bit(model, "binary_net")
    x = np.random.default_rng(0).normal(size=(4, 7, 7, 3)).astype("float32")
    for ours, theirs in zip(PackedNetwork(model).predict(x), model(x), strict=True):
        assert ours.dtype == np.float16
        # The size of the outputs is around 10; a float16 has 11 bits.
        np.testing.assert_allclose(ours, theirs, atol=0.05)


def test_what_has_no_signs_stays_in_keras():
    inputs = keras.Input((6, 6, 4))
    x = layers.Conv2D(4, 3, groups=2, name="grouped")(inputs)
    x = layers.Conv2D(4, 3, name="packed")(x)
    model = low_bit(keras.Model(inputs, x), "binary_net", include="*d")
    packed = PackedNetwork(model)
    assert list(packed.layers) == ["packed"]
    x = np.random.default_rng(0).normal(size=(4, 6, 6, 4)).astype("float32")
    np.testing.assert_array_equal(packed.predict(x), model(x))


def test_models_without_binary_inputs_are_refused():
    with pytest.raises(ValueError, match="read signs"):
        PackedNetwork(low_bit(network(), "twn"))
    with pytest.raises(ValueError, match="threads must be at least 1"):
        PackedNetwork(low_bit(network(), "xnor"), threads=0)
