"""Biases corrected, against sampled normal variables and models with a known mean error."""

import math

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers
from scipy import stats

from tests.quantization.networks import images, network
from tests.quantization.test_rounding import correlated, problem
from tfaccel.quantization import AdaRound, equalize, quantize
from tfaccel.quantization.bias_correction import analytic_bias, check_correction, empirical_bias
from tfaccel.quantization.moments import Moments, clipped_normal, follow_moments


@given(
    mean=st.floats(-4, 8),
    deviation=st.floats(0.05, 4),
    high=st.sampled_from([math.inf, 6.0]),
)
def test_moments_of_a_clipped_normal_are_scipys(mean, deviation, high):
    found = clipped_normal(np.array([mean]), np.array([deviation]), 0.0, high)
    normal = stats.norm(mean, deviation)
    top = 40.0 if math.isinf(high) else high
    first = normal.expect(lambda x: x, lb=0, ub=top) + (1 - normal.cdf(top)) * top
    second = normal.expect(lambda x: x * x, lb=0, ub=top) + (1 - normal.cdf(top)) * top**2
    assert found[0][0] == pytest.approx(first, abs=1e-5)
    assert found[1][0] == pytest.approx(second - first**2, abs=1e-4)


def test_moments_are_followed_as_samples_are():
    """Inputs of each layer drawn as the rules take them: normal behind norm, independent."""

    def body(x):
        x = layers.Conv2D(4, 1, name="first")(x)
        x = layers.BatchNormalization(name="norm")(x)
        y = layers.ReLU(name="relu")(x)
        y = layers.Conv2D(4, 3, padding="same", activation="relu", name="second")(y)
        x = layers.Add(name="sum")([x, y])
        return layers.Dense(2, name="logits")(layers.GlobalAveragePooling2D(name="pool")(x))

    model = network(body)
    gets, gives = follow_moments(model)
    norm = model.get_layer("norm")
    beta, gamma = np.asarray(norm.beta), np.asarray(norm.gamma)
    np.testing.assert_allclose(gives["norm"].mean, beta)
    random = np.random.default_rng(0)
    normal = beta + gamma * random.normal(size=(200_000, 9, 4))
    relu = np.maximum(normal, 0)
    np.testing.assert_allclose(gives["relu"].mean, relu.mean((0, 1)), atol=0.01)
    second = model.get_layer("second")
    kernel = np.asarray(second.kernel).reshape(9, 4, 4)
    sums = np.einsum("skc,kcn->sn", relu, kernel) + np.asarray(second.bias)
    np.testing.assert_allclose(gives["second"].mean, np.maximum(sums, 0).mean(0), atol=0.05)
    np.testing.assert_allclose(gives["sum"].mean, beta + gives["second"].mean, rtol=1e-6)
    assert not gets["first"].known  # of the model's own inputs nothing is known


def test_the_empirical_bias_takes_the_mean_error_back():
    inputs, random = correlated(samples=300, seed=1)
    weight = random.normal(size=(1, 5, 3))
    rounded = weight + 0.1 * random.normal(size=weight.shape)
    shifted = problem(inputs + 0.5, weight, float_inputs=inputs)
    bias = empirical_bias(shifted, rounded)
    outputs = np.matmul(shifted.inputs, rounded) + bias
    np.testing.assert_allclose(
        outputs.mean(1), shifted.float_outputs().mean(1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "layer",
    [
        layers.Conv2D(6, 3, groups=2, name="grouped"),
        layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise"),
        layers.Conv2D(5, 3, name="conv"),
        layers.Dense(3, name="dense"),
    ],
    ids=lambda layer: layer.name,
)
def test_the_analytic_bias_takes_the_mean_error_back(layer):
    """For an input whose channels are constant, the mean is the input: the outputs are equal."""
    mean = np.array([0.5, 1.0, 2.0, -1.0])
    x = np.broadcast_to(mean, (1, 5, 5, 4)).astype("float32")
    expected = np.asarray(layer(x))
    old = np.asarray(layer.kernel)
    new = old + 0.1 * np.random.default_rng(0).normal(size=old.shape).astype("float32")
    bias = analytic_bias(layer, old, new, Moments(mean, np.ones(4)))
    layer.kernel.assign(new)
    layer.bias.assign(bias)
    np.testing.assert_allclose(np.asarray(layer(x)), expected, atol=1e-5)


def test_the_names_of_corrections():
    assert check_correction(True) == "empirical"
    assert check_correction(False) == "none"
    assert check_correction("analytic") == "analytic"
    with pytest.raises(ValueError, match="correct_bias must be one of 'empirical'"):
        check_correction("anallytic")


def test_of_the_parts_of_a_split_nothing_is_known():
    def body(x):
        x = layers.BatchNormalization(name="norm")(layers.Conv2D(4, 1)(x))
        a, b = keras.ops.split(x, 2, axis=-1)
        x = layers.Concatenate()([a, layers.Conv2D(2, 1, name="half")(b)])
        x = layers.BatchNormalization(name="late")(layers.Conv2D(3, 1)(x))
        return layers.Dense(2, name="logits")(layers.GlobalAveragePooling2D()(x))

    model = network(body)
    gets, gives = follow_moments(model)
    assert gives["norm"].known
    assert not gets["half"].known
    assert gets["logits"].known
    x = images(32)
    expected = np.asarray(model(x))
    for made in (equalize(model), equalize(model, x), quantize(model, x, correct_bias="analytic")):
        assert np.abs(np.asarray(made(x)) - expected).max() < 0.1 * np.ptp(expected)


def settled(body):
    """A model whose batch norms have the statistics of `images`."""
    model = network(body)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.5
    for seed in range(12):
        model(images(128, seed), training=True)
    return model


def _separable(x):
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(6, 3, use_bias=False)(x))
    x = layers.SeparableConv2D(8, 3, depth_multiplier=2, name="sep")(layers.ReLU()(x))
    return layers.Dense(3, name="logits")(layers.Flatten()(x))


def _halves(x):
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(6, 3, use_bias=False)(x))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False, name="sep_depthwise")(
        layers.ReLU()(x)
    )
    return layers.Dense(3, name="logits")(layers.Flatten()(layers.Conv2D(8, 1, name="sep")(x)))


def test_moments_reach_the_halves_of_a_separable_convolution():
    """Written as its two halves a network is corrected likewise."""
    models = [settled(body) for body in (_separable, _halves)]
    depthwise, pointwise, bias = models[0].get_layer("sep").get_weights()
    models[1].get_layer("sep_depthwise").set_weights([depthwise])
    models[1].get_layer("sep").set_weights([pointwise, bias])
    for name in ("norm", "logits"):
        models[1].get_layer(name).set_weights(models[0].get_layer(name).get_weights())
    models[1].layers[1].set_weights(models[0].layers[1].get_weights())
    x = images(128, 50)
    found = [quantize(m, images(128), "w3a8", correct_bias="analytic")(x) for m in models]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_the_analytic_bias_goes_with_every_rounding(rounding):
    model = settled(_halves)
    how = AdaRound(steps=20) if rounding == "adaround" else rounding
    biases = {}
    for correction in ("none", "analytic"):
        made = quantize(model, images(64), "w3a8", rounding=how, correct_bias=correction)
        biases[correction] = np.asarray(made.get_layer("sep").layer.bias)
    assert not np.allclose(biases["none"], biases["analytic"])


def test_without_batch_norm_there_is_nothing_to_go_by():
    model = network(lambda x: layers.Dense(2)(layers.Flatten()(layers.Conv2D(2, 3)(x))))
    with pytest.raises(ValueError, match="no batch norm in front"):
        quantize(model, images(8), correct_bias="analytic")
