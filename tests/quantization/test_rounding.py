"""AdaRound, against brute force over all roundings and the formulas of the paper."""

import itertools

import keras
import numpy as np
import pytest

from tfaccel.quantization.grids import round_to, weight_scales
from tfaccel.quantization.rounding import ROUNDINGS, AdaRound, Nearest, _Search, activate
from tfaccel.quantization.sequential import LayerProblem


def problem(inputs, weight, *, bits=3, activation="linear", bias=None, float_inputs=None):
    groups, _, outputs = weight.shape
    return LayerProblem(
        name="layer",
        weight=weight.astype("float32"),
        bias=np.zeros((groups, 1, outputs), "float32") if bias is None else bias,
        bits=bits,
        float_inputs=(inputs if float_inputs is None else float_inputs).astype("float32"),
        inputs=inputs.astype("float32"),
        activation=activation,
        seed=0,
    )


def correlated(samples=512, features=5, seed=0):
    random = np.random.default_rng(seed)
    common = random.normal(size=(1, samples, 1))
    return common + 0.3 * random.normal(size=(1, samples, features)), random


def output_error(given, weight):
    outputs = activate(np.matmul(given.inputs, weight) + given.bias, given.activation)
    return float(np.mean((outputs - activate(given.float_outputs(), given.activation)) ** 2))


@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_it_finds_nearly_the_best_of_all_roundings(activation):
    best = found = nearest = 0.0
    for seed in range(3):
        inputs, random = correlated(features=8, seed=seed)
        # So small that the regularizer counts, as with the many weights of a real layer.
        given = problem(0.1 * inputs, random.normal(size=(1, 8, 1)), activation=activation)
        scale = weight_scales(given.weight, given.bits)
        floor = np.floor(given.weight / scale)
        best += min(
            output_error(given, np.clip(floor + np.reshape(up, (1, 8, 1)), -3, 3) * scale)
            for up in itertools.product([0, 1], repeat=8)
        )
        found += output_error(given, AdaRound(steps=600, batch_size=128).round_weight(given))
        nearest += output_error(given, Nearest().round_weight(given))
    assert best < 0.7 * nearest  # so that there is something to find
    assert found < best + 0.25 * (nearest - best)


def test_each_weight_is_rounded_up_or_down():
    inputs, random = correlated(seed=2)
    given = problem(inputs, random.normal(size=(1, 5, 4)))
    scale = weight_scales(given.weight, given.bits)
    rounded = AdaRound(steps=100).round_weight(given) / scale
    np.testing.assert_allclose(rounded, np.rint(rounded), atol=1e-4)
    clipped = np.clip(given.weight / scale, -3, 3)
    assert (np.abs(rounded - clipped) < 1 + 1e-4).all()


def test_pruned_weights_stay_zero_and_each_output_keeps_its_largest_integer():
    inputs, random = correlated(features=8, seed=3)
    weight = random.normal(size=(1, 8, 6)) * (random.uniform(size=(1, 8, 6)) > 0.5)
    for rounding in (Nearest(), AdaRound(steps=100)):
        given = problem(inputs, weight, bits=4)
        rounded = rounding.round_weight(given)
        assert (rounded[weight == 0] == 0).all()
        integers = np.abs(rounded / weight_scales(given.weight, 4)).max(axis=1)
        np.testing.assert_allclose(integers, 7, rtol=1e-4)


def test_the_outputs_wanted_are_those_of_the_float_inputs():
    """With inputs all 1.25 times too large, the rounding that makes up for it wins."""
    float_inputs, random = correlated(seed=4)
    weight = np.abs(random.normal(size=(1, 5, 1))) + 0.5
    given = problem(1.25 * float_inputs, weight, bits=4, float_inputs=float_inputs)
    asymmetric = AdaRound(steps=600).round_weight(given)
    symmetric = AdaRound(steps=600).round_weight(problem(float_inputs, weight, bits=4))
    assert output_error(given, asymmetric) < output_error(given, symmetric)
    assert asymmetric.sum() < symmetric.sum()


@pytest.mark.parametrize("activation", ["linear", "relu", "relu6"])
@pytest.mark.parametrize("step", [0, 50])
def test_the_gradient_is_that_of_the_loss(activation, step):
    inputs, random = correlated(samples=16, seed=5)
    given = problem(3 * inputs, random.normal(size=(1, 5, 3)), bits=4, activation=activation)
    how = AdaRound(steps=100, regularization=0.3)
    search = _Search(how, given)
    search._inputs, search._target = (
        a.astype(np.float64) for a in (search._inputs, search._target)
    )
    search._v = random.normal(size=search._v.shape)

    def loss(v):
        h = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
        weight = np.clip(np.floor(given.weight / search._scale) + h, -7, 7)
        weight = np.where(search._free, weight, search._fixed) * search._scale
        error = activate(search._inputs @ weight, activation) - search._target
        beta = how.beta(step)
        penalty = (1 - np.abs(2 * h - 1) ** beta)[search._free].sum() if beta else 0.0
        return (error**2).sum() / 16 + 0.3 * penalty

    found = search._gradient(search._inputs, search._target, step)
    for place in np.ndindex(*found.shape):
        shift = np.zeros(found.shape)
        shift[place] = 1e-6
        expected = (loss(search._v + shift) - loss(search._v - shift)) / 2e-6
        assert found[place] == pytest.approx(expected, rel=1e-3, abs=1e-4), place


def test_beta_falls_from_20_to_2_after_the_warm_up():
    how = AdaRound(steps=1000)
    assert how.beta(0) == how.beta(199) == 0
    assert how.beta(200) == 20
    assert how.beta(600) == pytest.approx(11)  # halfway along a cosine
    assert how.beta(999) == pytest.approx(2, abs=1e-3)


def test_the_step_found_costs_less_than_that_of_the_largest_weight():
    weight = np.random.default_rng(6).normal(size=(1, 500, 3))
    found = weight_scales(weight, 4)
    largest = np.abs(weight).max(axis=1, keepdims=True) / 7
    errors = [((round_to(weight, s, 4) - weight) ** 2).mean() for s in (found, largest)]
    assert errors[0] < 0.9 * errors[1]
    # Of 8 bits, clipping gains next to nothing.
    assert weight_scales(weight, 8) == pytest.approx(
        np.abs(weight).max(1, keepdims=True) / 127, rel=0.2
    )


@pytest.mark.parametrize("name", ROUNDINGS.names())
def test_roundings_survive_their_config(name):
    rounding = ROUNDINGS.get(name)
    assert ROUNDINGS.get(keras.saving.serialize_keras_object(rounding)) == rounding


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="steps must be above 0"):
        AdaRound(steps=0)
    with pytest.raises(ValueError, match="warm_up must be a fraction"):
        AdaRound(warm_up=1.0)
    with pytest.raises(ValueError, match=r"no rounding 'adaroud'.*'adaround'"):
        ROUNDINGS.get("adaroud")
