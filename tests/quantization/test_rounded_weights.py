"""Grids of weights that zero is not the middle of, and steps for blocks of inputs."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tfaccel.quantization import FakeQuantizeWeights


def weights(*shape, seed=0, shift=0.0):
    return (np.random.default_rng(seed).normal(size=shape) + shift).astype("float32")


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("shift", [0.0, 0.7, -4.0])
def test_asymmetric_grid_equals_tensorflows_per_channel_operator(bits, shift):
    weight = weights(9, 6, shift=shift)
    low, high = np.minimum(weight.min(0), 0), np.maximum(weight.max(0), 0)
    expected = tf.quantization.fake_quant_with_min_max_vars_per_channel(
        weight, low, high, num_bits=bits
    )
    ours = np.asarray(FakeQuantizeWeights((-1,), bits, symmetric=False).finalize(weight))
    step = (high - low) / (2**bits - 1)
    # Where a weight is in the middle between two levels, one rounds up and one to even.
    apart = np.abs(ours - expected) / step
    assert (apart > 1e-3).mean() <= 0.02
    assert apart.max() <= 1.001


@given(st.integers(2, 7), st.floats(-3, 3, width=32), st.integers(0, 2**31 - 1))
def test_asymmetric_integers_of_seven_bits_fit_in_int8_and_zero_stays(bits, shift, seed):
    weight = weights(12, 3, seed=seed, shift=shift)
    weight[0] = 0
    rounding = FakeQuantizeWeights((-1,), bits, symmetric=False)
    integers = np.asarray(rounding.integers(weight))
    assert np.abs(integers).max() <= 127
    assert (integers[0] == 0).all()
    assert (integers.max(0) - integers.min(0) <= 2**bits - 1).all()
    step = np.asarray(rounding.scale(weight))
    assert (np.abs(integers * step - weight) <= 1.0001 * step).all()


def test_each_block_of_inputs_is_rounded_by_its_own_largest():
    weight = weights(8, 3)
    weight[4:] *= 100  # the second half of each column is of another size
    rounding = FakeQuantizeWeights((-1,), 4, block=4)
    expected = np.empty_like(weight)
    for begin in (0, 4):
        part = weight[begin : begin + 4]
        step = np.abs(part).max(0) / 7
        step = step.astype(ml_dtypes.bfloat16).astype("float32")
        expected[begin : begin + 4] = np.clip(np.rint(part / step), -7, 7) * step
    np.testing.assert_allclose(rounding.finalize(weight), expected, rtol=1e-6)
    np.testing.assert_allclose(
        np.asarray(rounding.integers(weight)) * np.asarray(rounding.scale(weight)),
        expected,
        rtol=1e-6,
    )
    whole = np.asarray(FakeQuantizeWeights((-1,), 4).finalize(weight))
    assert (whole[:4] == 0).all()  # what one step for all does to the small half


def test_block_as_long_as_the_kernel_is_one_step_for_each_output():
    weight = weights(8, 3)
    blocks = np.asarray(FakeQuantizeWeights((-1,), 4, block=8).finalize(weight))
    whole = np.asarray(FakeQuantizeWeights((-1,), 4).finalize(weight))
    np.testing.assert_allclose(blocks, whole, rtol=2**-8, atol=1e-6)


def test_gradient_passes_straight_through_blocks():
    weight = tf.Variable(weights(8, 3))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(FakeQuantizeWeights((-1,), 4, block=2)(weight) * 2.0)
    np.testing.assert_array_equal(tape.gradient(total, weight), np.full((8, 3), 2.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 9}, "bits must be one of 2, 3"),
        ({"block": 0}, "block must be above 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FakeQuantizeWeights(**arguments)


@pytest.mark.parametrize("shape", [(7, 3), (2, 2, 3, 4)])
def test_kernels_that_blocks_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"Blocks of 4 weights .* kernel of shape \["):
        FakeQuantizeWeights((-1,), 4, block=4).finalize(weights(*shape))
