"""Rounding against TensorFlow's own fake-quantization operators and hand computations."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tfaccel.quantization import Dequantize, FakeQuantize, FakeQuantizeWeights, fake_quantization


def kernel_of(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((3, 3, 4, 5), (-1,)), ((7, 6), (-1,)), ((3, 3, 4, 2), (-2, -1)), ((3, 3, 5, 4), (-2,))],
    ids=["conv", "dense", "depthwise", "transposed"],
)
def test_weights_equal_tensorflows_per_channel_operator(shape, axes, bits):
    weight = kernel_of(shape)
    kept = [a % 4 if len(shape) == 4 else a % 2 for a in axes]
    order = [a for a in range(len(shape)) if a not in kept] + kept
    rows = weight.transpose(order).reshape(-1, int(np.prod([shape[a] for a in kept])))
    largest = np.abs(rows).max(axis=0)
    expected = tf.quantization.fake_quant_with_min_max_vars_per_channel(
        rows, -largest, largest, num_bits=bits, narrow_range=True
    )
    ours = np.asarray(FakeQuantizeWeights(axes, bits).finalize(weight))
    ours = ours.transpose(order).reshape(rows.shape)
    # TensorFlow rounds halves up, NumPy to even; no half occurs in random weights.
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert len(np.unique(np.round(ours / (largest / (2 ** (bits - 1) - 1))))) <= 2**bits - 1


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_rounding_error_is_at_most_half_a_step_and_zeros_stay(rows, columns, seed):
    random = np.random.default_rng(seed)
    weight = random.normal(size=(rows, columns)).astype("float32")
    weight *= random.random(weight.shape) < 0.5
    transform = FakeQuantizeWeights()
    rounded = np.asarray(transform.finalize(weight))
    step = np.asarray(transform.scale(weight))
    assert (np.abs(rounded - weight) <= step * 0.5001).all()
    assert (rounded[weight == 0] == 0).all()
    np.testing.assert_allclose(transform.finalize(rounded), rounded, rtol=1e-6)


def test_rounding_commutes_with_a_factor_per_channel():
    # This is why batch norm may stay unfolded in training; a factor may be negative or zero.
    weight, factors = kernel_of((3, 3, 4, 4)), np.array([0.3, -2.0, 0.0, 7.1], "float32")
    transform = FakeQuantizeWeights()
    np.testing.assert_allclose(
        np.asarray(transform.finalize(weight)) * factors,
        transform.finalize(weight * factors),
        rtol=1e-5,
        atol=1e-7,
    )


def test_gradient_passes_straight_through():
    weight = tf.Variable(kernel_of((5, 3)))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(FakeQuantizeWeights()(weight, training=True) * 3.0)
    np.testing.assert_array_equal(tape.gradient(total, weight), np.full((5, 3), 3.0))


def test_range_is_a_moving_average_that_contains_zero():
    layer = FakeQuantize(momentum=0.9)
    layer(np.array([[-1.0, 3.0]], "float32"), training=True)
    assert (float(layer.minimum), float(layer.maximum)) == (-1.0, 3.0)
    layer(np.array([[-2.0, 1.0]], "float32"), training=True)
    np.testing.assert_allclose(float(layer.minimum), 0.9 * -1 + 0.1 * -2, rtol=1e-6)
    np.testing.assert_allclose(float(layer.maximum), 0.9 * 3 + 0.1 * 1, rtol=1e-6)
    positive = FakeQuantize()
    positive(np.array([[2.0, 5.0]], "float32"), training=True)
    assert (float(positive.minimum), float(positive.maximum)) == (0.0, 5.0)


def test_inference_learns_nothing():
    layer = FakeQuantize()
    layer(np.array([[-1.0, 1.0]], "float32"), training=True)
    layer(np.array([[-9.0, 9.0]], "float32"), training=False)
    assert (float(layer.minimum), float(layer.maximum)) == (-1.0, 1.0)
    assert int(layer.batches) == 1


def test_values_are_those_of_tensorflows_operator():
    x = kernel_of((50,)) * 3
    layer = FakeQuantize(bits=4)
    layer(np.array([-1.3, 2.2], "float32"), training=True)
    expected = tf.quantization.fake_quant_with_min_max_vars(x, -1.3, 2.2, num_bits=4)
    np.testing.assert_array_equal(np.asarray(layer(x)), expected)
    assert len(np.unique(expected)) <= 16


@given(
    st.floats(-8, 0, width=32),
    st.floats(0.0625, 8, width=32),
    st.sampled_from([2, 4, 8]),
    st.integers(0, 2**31 - 1),
)
def test_arithmetic_for_other_backends_is_the_same(low, high, bits, seed):
    x = np.random.default_rng(seed).normal(scale=4, size=40).astype("float32")
    expected = tf.quantization.fake_quant_with_min_max_vars(x, low, high, num_bits=bits).numpy()
    ours = fake_quantization.round_to_grid(x, low, high, bits)
    step = (high - low) / (2**bits - 1)
    # A value on the edge between two steps may fall on either side; all others agree.
    off = np.abs(np.asarray(ours) - expected) > step * 1e-3
    assert off.mean() <= 0.05
    assert np.abs(np.asarray(ours) - expected).max() <= step * 1.001


def test_clipped_values_get_no_gradient():
    layer = FakeQuantize()
    layer(np.array([-1.0, 1.0], "float32"), training=True)
    x = tf.Variable([-3.0, 0.3, 5.0])
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(layer(x))
    np.testing.assert_array_equal(tape.gradient(total, x), [0.0, 1.0, 0.0])


def test_training_rounds_by_the_range_just_learnt():
    x = kernel_of((40,))
    layer = FakeQuantize()
    with tf.GradientTape() as tape:
        values = tf.Variable(x)
        out = layer(values, training=True)
    expected = tf.quantization.fake_quant_with_min_max_vars(x, x.min(), x.max())
    np.testing.assert_array_equal(np.asarray(out), expected)
    # The nudge that puts zero on the grid may leave the outermost value out.
    assert np.asarray(tape.gradient(out, values)).sum() >= 39


def test_range_begins_when_there_is_something_to_see():
    layer = FakeQuantize()
    zeros = np.zeros((3, 2), "float32")
    np.testing.assert_array_equal(np.asarray(layer(zeros, training=True)), zeros)
    frozen = layer.frozen()  # any range does for what was always zero
    np.testing.assert_array_equal(np.asarray(frozen(zeros)), zeros)
    layer(np.array([-0.5, 2.0], "float32"), training=True)
    assert (float(layer.minimum), float(layer.maximum)) == (-0.5, 2.0)


def test_range_of_negative_values_freezes():
    layer = FakeQuantize()
    layer(np.array([-3.0, -1.0], "float32"), training=True)
    assert layer.frozen().fixed_range == (-3.0, 0.0)


def test_infinite_values_do_not_spoil_the_range():
    layer = FakeQuantize()
    layer(np.array([-1.0, 1.0], "float32"), training=True)
    layer(np.array([-np.inf, np.inf], "float32"), training=True)
    assert (float(layer.minimum), float(layer.maximum)) == (-1.0, 1.0)


def test_dequantize_changes_at_most_the_last_digit():
    x = kernel_of((1000,))
    layer = Dequantize()
    np.testing.assert_array_equal(np.asarray(layer(x, training=True)), x)
    np.testing.assert_array_max_ulp(np.asarray(layer(x)), x, maxulp=2)
    assert layer.strip_layer() is None


def test_unknown_range_passes_values_and_refuses_to_freeze():
    layer = FakeQuantize(name="early")
    x = kernel_of((4,))
    np.testing.assert_array_equal(np.asarray(layer(x)), x)
    with pytest.raises(ValueError, match=r"range of 'early' is not known.*Run model\.fit"):
        layer.frozen()


def test_fixed_range_does_not_move():
    layer = FakeQuantize(fixed_range=(0.0, 255 / 256))
    out = np.asarray(layer(np.array([0.5, 2.0], "float32"), training=True))
    np.testing.assert_allclose(out, [0.5, 255 / 256])
    assert layer.calibrated
    assert FakeQuantize.from_config(layer.get_config()).fixed_range == (0.0, 255 / 256)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_type_and_a_full_range(dtype):
    layer = FakeQuantize()
    x = keras.ops.cast(np.array([-1.0, 0.3, 2.0]), dtype)
    out = layer(x, training=True)
    assert keras.backend.standardize_dtype(out.dtype) == dtype
    assert layer.maximum.dtype == "float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 9}, "bits must be one of 2, 3"),
        ({"momentum": 1.0}, r"momentum must be a fraction in \[0, 1\)"),
        ({"fixed_range": (0.5, 1.0)}, "fixed_range must be"),
        ({"fixed_range": (0.0, 0.0)}, "fixed_range must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FakeQuantize(**arguments)
