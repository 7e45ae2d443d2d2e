"""GPTQ, against brute force, a plain transcription of the paper, and least squares."""

import numpy as np
import pytest

from tests.quantization.test_rounding import correlated, output_error, problem
from tfaccel.quantization import FakeQuantizeWeights
from tfaccel.quantization.grids import round_to, weight_scales
from tfaccel.quantization.rounding import Nearest
from tfaccel.quantization.second_order import GPTQ, choose_damping, round_by_hessian, weighed


def optimal_brain_quantizer(weight, hessian, scale, end, stays):
    """One column by eqs. 2 and 3 of Frantar et al. 2022, the inverse shrunk row by row."""
    left, result = weight.copy(), np.zeros(len(weight))
    order = np.argsort(-np.diag(hessian), kind="stable")
    alive = list(order)
    for row in order:
        inverse = np.linalg.inv(hessian[np.ix_(alive, alive)])
        value = weight[row] if stays[row] else left[row]
        result[row] = np.clip(np.rint(value / scale), -end, end) * scale
        error = (left[row] - result[row]) / inverse[0, 0]
        left[alive] -= error * inverse[:, 0]
        alive.remove(row)
    return result


@pytest.mark.parametrize("rows", [6, 100])  # within one block, and over two
def test_it_is_optimal_brain_quantization_in_a_fixed_order(rows):
    random = np.random.default_rng(0)
    x = random.normal(size=(400, rows)) @ random.normal(size=(rows, rows))
    hessian = x.T @ x / 400 + 0.05 * np.eye(rows) * rows
    weight = random.normal(size=(1, rows, 3))
    scale = weight_scales(weight, 4)
    found = round_by_hessian(weight, hessian[np.newaxis], scale, 4)
    for column in range(3):
        w, s = weight[0, :, column], scale[0, 0, column]
        stays = np.abs(w) >= (7 - 1e-3) * s
        expected = optimal_brain_quantizer(w, hessian, s, 7, stays)
        np.testing.assert_allclose(found[0, :, column], expected, atol=1e-9)


def test_with_inputs_that_know_nothing_of_each_other_it_is_the_nearest():
    weight = np.random.default_rng(1).normal(size=(2, 7, 3))
    scale = weight_scales(weight, 4)
    hessian = np.stack([np.diag(np.arange(1.0, 8.0)), np.eye(7)])
    found = round_by_hessian(weight, hessian, scale, 4)
    np.testing.assert_allclose(found, round_to(weight, scale, 4), atol=1e-12)


def test_it_beats_the_nearest_by_far_on_correlated_inputs():
    inputs, random = correlated(features=40)
    given = problem(inputs, random.normal(size=(1, 40, 16)), bits=4)
    nearest = output_error(given, Nearest().round_weight(given))
    assert output_error(given, GPTQ().round_weight(given)) < 0.3 * nearest


def test_it_makes_up_for_inputs_that_are_off():
    float_inputs, random = correlated(samples=2000, features=6, seed=1)
    inputs = 0.8 * float_inputs + 0.05 * random.normal(size=float_inputs.shape)
    weight = random.normal(size=(1, 6, 4))
    given = problem(inputs, weight, bits=8, float_inputs=float_inputs)
    corrected = output_error(given, GPTQ().round_weight(given))
    plain = output_error(given, GPTQ(correct_inputs=False).round_weight(given))
    least, *_ = np.linalg.lstsq(given.inputs[0], given.float_outputs()[0], rcond=None)
    assert corrected < 0.2 * plain
    assert corrected < 1.1 * output_error(given, least[np.newaxis]) + 1e-4


def test_few_samples_of_many_inputs_call_for_much_damping():
    random = np.random.default_rng(2)
    weight = random.normal(size=(1, 60, 2))
    choices = (0.01, 0.1, 1.0, 10.0)

    def chosen(samples):
        x = random.normal(size=(1, samples, 60))
        noise = 0.3 * random.normal(size=x.shape)
        return choose_damping(problem(x + noise, weight, float_inputs=x), choices)

    assert chosen(40) > chosen(5000)


def test_zeros_stay_zeros_and_each_output_keeps_its_largest_integer():
    inputs, random = correlated(features=9, seed=3)
    weight = random.normal(size=(1, 9, 6)) * (random.uniform(size=(1, 9, 6)) > 0.4)
    rounded = GPTQ().round_weight(problem(inputs, weight, bits=4))
    assert (rounded[weight == 0] == 0).all()
    steps = np.abs(rounded).max(axis=1, keepdims=True) / 7
    integers = rounded / steps
    np.testing.assert_allclose(integers, np.rint(integers), atol=1e-5)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_step_read_off_a_rounded_kernel_is_the_one_it_was_rounded_with(bits):
    """Else baking the kernel would round it again, and graph and eager mode break ties apart."""
    random = np.random.default_rng(0)
    x = np.abs(random.normal(size=(256, 400, 9)))
    rounded = GPTQ().round_weight(problem(x, random.normal(size=(256, 9, 1)), bits=bits))
    kernel = np.moveaxis(rounded, 0, 1).reshape(3, 3, 256, 1).astype("float32")
    again = np.asarray(FakeQuantizeWeights((-2, -1), bits).finalize(kernel))
    np.testing.assert_allclose(again, kernel, atol=1e-5 * np.abs(kernel).max())


def test_an_input_that_is_always_zero_does_no_harm():
    inputs, random = correlated(features=4, seed=4)
    inputs[..., 2] = 0
    weight = random.normal(size=(1, 4, 2))
    rounded = GPTQ().round_weight(problem(inputs, weight, bits=8))
    assert np.isfinite(rounded).all()
    assert np.abs(rounded - weight).max() < 0.1
    nothing = GPTQ().round_weight(problem(0 * inputs, weight, bits=8))
    assert np.abs(nothing - weight).max() < np.abs(weight).max() / 127


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="at least one damping"):
        GPTQ(dampings=())
    with pytest.raises(ValueError, match="dampings must be above 0"):
        GPTQ(dampings=(0.0,))
    with pytest.raises(TypeError, match="correct_inputs must be bool"):
        GPTQ(correct_inputs=1)


def test_errors_count_by_what_the_activation_leaves_of_them():
    random = np.random.default_rng(3)
    inputs = random.normal(size=(200, 400, 9)) + random.normal(size=(200, 400, 1))
    weight = random.normal(size=(200, 9, 1))
    bias = np.full((200, 1, 1), -2.0, "float32")
    given = problem(inputs, weight, bits=3, activation="relu", bias=bias)
    blind = problem(inputs, weight, bits=3, bias=bias)
    error = output_error(given, GPTQ().round_weight(given))
    # Measured over six seeds: 0.963 to 0.977.
    assert error < 0.99 * output_error(given, GPTQ().round_weight(blind))
    # Of one output: the Hessian is the weighed sum of x x^T.
    x, importance = given.inputs[0], given.importance()[0]
    found = weighed(given).inputs[0]
    np.testing.assert_allclose(found.T @ found, (x * importance).T @ x, rtol=1e-3, atol=1e-2)
    assert weighed(blind) is blind
