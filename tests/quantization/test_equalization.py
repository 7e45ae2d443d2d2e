"""Ranges moved across layers: the function stays, the ranges meet."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tests.quantization.networks import images, network
from tfaccel import architectures as blocks
from tfaccel.quantization.equalization import equalize


def chain(x):
    x = layers.Conv2D(6, 1, name="expand")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.ZeroPadding2D(1, name="pad")(x)
    x = layers.DepthwiseConv2D(3, activation="relu", name="depthwise")(x)
    x = layers.Conv2D(4, 1, name="project")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return layers.Dense(3, name="logits")(x)


def scramble(model, seed):
    """Gives every kernel's output channels ranges that differ by up to 100."""
    random = np.random.default_rng(seed)
    for layer in model.layers:
        if hasattr(layer, "kernel") and layer.name != "logits":
            shape = layer.kernel.shape
            factors = 10 ** random.uniform(-1, 1, shape[-2 if shape[-1] == 1 else -1])
            factors = factors[:, None] if shape[-1] == 1 else factors
            layer.kernel.assign(np.asarray(layer.kernel) * factors)
    return model


def relative_error(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@settings(max_examples=6)
@given(seed=st.integers(0, 2**31 - 1), with_data=st.booleans())
def test_a_network_of_relus_computes_what_it_did(seed, with_data):
    model = scramble(network(chain), seed)
    x = images(8, seed % 1000)
    equalized = equalize(model, x if with_data else None, absorb_bias=False)
    assert relative_error(equalized(x), np.asarray(model(x))) < 1e-4


def test_weights_that_make_and_read_a_channel_meet_in_the_middle():
    def two(x):
        x = layers.Conv2D(5, 1, use_bias=False, activation="relu", name="first")(x)
        return layers.GlobalAveragePooling2D()(layers.Conv2D(3, 1, name="second")(x))

    model = scramble(network(two), 3)
    first, second = (np.asarray(model.get_layer(n).kernel) for n in ("first", "second"))
    middle = np.sqrt(np.abs(first).max((0, 1, 2)) * np.abs(second).max((0, 1, 3)))
    equalized = equalize(model)
    made = np.abs(np.asarray(equalized.get_layer("first").kernel)).max((0, 1, 2))
    read = np.abs(np.asarray(equalized.get_layer("second").kernel)).max((0, 1, 3))
    np.testing.assert_allclose(made, middle, rtol=1e-5)
    np.testing.assert_allclose(read, middle, rtol=1e-5)


def test_ranges_move_through_a_depthwise_convolution():
    model = scramble(network(chain), 5)
    equalized = equalize(model, absorb_bias=False)
    depthwise = np.abs(np.asarray(equalized.get_layer("depthwise").kernel)).max((0, 1, 3))
    expand = np.abs(np.asarray(equalized.get_layer("expand").kernel)).max((0, 1, 2))
    project = np.abs(np.asarray(equalized.get_layer("project").kernel)).max((0, 1, 3))
    # At rest both factors of each channel are one: all three ranges are alike in each channel.
    np.testing.assert_allclose(expand, depthwise, rtol=0.01)
    np.testing.assert_allclose(project, depthwise, rtol=0.01)


def test_with_data_the_channels_of_a_value_have_one_range():
    model = scramble(network(chain), 7)
    x = images(32)
    equalized = equalize(model, x, absorb_bias=False)
    relu = keras.Model(equalized.input, equalized.get_layer("relu").output)
    largest = np.asarray(relu(x)).max((0, 1, 2))
    alive = largest > 0
    assert alive.sum() > 3
    np.testing.assert_allclose(largest[alive], largest[alive][0], rtol=1e-4)


def test_what_a_sum_joins_has_one_factor_and_the_model_stays():
    def residual(x):
        x = blocks.conv_bn_activation(x, 6, name="stem")
        y = layers.Conv2D(6, 1, name="branch")(x)
        x = layers.Conv2D(6, 1, name="trunk")(x)
        x = layers.Add(name="sum")([x, y])
        return layers.GlobalAveragePooling2D()(layers.Conv2D(3, 3, name="head")(x))

    model = scramble(network(residual), 9)
    x = images(8)
    equalized = equalize(model, x, absorb_bias=False)
    assert relative_error(equalized(x), np.asarray(model(x))) < 1e-4
    factor = {
        name: np.asarray(model.get_layer(name).kernel / equalized.get_layer(name).kernel)[0, 0, 0]
        for name in ("branch", "trunk")
    }
    assert np.ptp(np.log(factor["branch"])) > 0.5
    np.testing.assert_allclose(factor["trunk"], factor["branch"], rtol=1e-4)
    head = np.asarray(equalized.get_layer("head").kernel / model.get_layer("head").kernel)
    np.testing.assert_allclose(head[0, 0, :, 0], factor["branch"], rtol=1e-4)


def test_a_high_bias_goes_on_to_the_layer_behind():
    def high(x):
        x = layers.Conv2D(4, 1, name="first")(x)
        x = layers.BatchNormalization(name="norm")(x)
        x = layers.ReLU(name="relu")(x)
        return layers.GlobalAveragePooling2D()(layers.Conv2D(3, 1, name="second")(x))

    model = network(high)
    norm = model.get_layer("norm")
    norm.gamma.assign([0.1, 0.1, 1.0, 1.0])
    norm.beta.assign([2.0, 0.1, 0.0, 5.0])
    plain = equalize(model, absorb_bias=False)
    absorbed = equalize(model)
    factor = np.asarray(
        np.asarray(model.get_layer("second").kernel)[0, 0, :, 0]
        / np.asarray(plain.get_layer("second").kernel)[0, 0, :, 0]
    )
    excess = np.array([2.0 - 0.3, 0.0, 0.0, 5.0 - 3.0]) * factor  # beta - 3 gamma, where positive
    lost = np.asarray(plain.get_layer("first").bias) - np.asarray(absorbed.get_layer("first").bias)
    np.testing.assert_allclose(lost, excess, rtol=1e-4, atol=1e-6)
    # Where nothing is cut off that was not before, the network computes what it did.
    gained = np.asarray(absorbed.get_layer("second").bias) - np.asarray(
        plain.get_layer("second").bias
    )
    kernel = np.asarray(plain.get_layer("second").kernel)[0, 0]
    np.testing.assert_allclose(gained, excess @ kernel, rtol=1e-4, atol=1e-6)


def test_relu6_holds_factors_back_unless_it_is_replaced():
    def clipped(x):
        x = layers.Conv2D(4, 1, name="first")(x)
        x = layers.ReLU(6.0, name="relu")(x)
        return layers.GlobalAveragePooling2D()(layers.Conv2D(3, 1, name="second")(x))

    model = scramble(network(clipped), 1)
    kept = equalize(model)
    np.testing.assert_array_equal(kept.get_layer("first").kernel, model.get_layer("first").kernel)
    replaced = equalize(model, replace_relu6=True)
    assert replaced.get_layer("relu").max_value is None
    assert (
        np.abs(
            np.asarray(replaced.get_layer("first").kernel - model.get_layer("first").kernel)
        ).max()
        > 0.01
    )
    small = images(4) * 0.01  # where nothing reaches 6
    assert relative_error(replaced(small), np.asarray(model(small))) < 1e-4


def test_excluded_layers_stay():
    model = scramble(network(chain), 2)
    equalized = equalize(model, exclude=["depthwise", "project"], absorb_bias=False)
    for name in ("depthwise", "project"):
        np.testing.assert_array_equal(
            equalized.get_layer(name).kernel, model.get_layer(name).kernel
        )
    with pytest.raises(ValueError, match="matches no layer"):
        equalize(model, exclude="dephtwise")


RELU6 = {
    "activation": lambda x: layers.Activation("relu6")(layers.Conv2D(4, 1, name="first")(x)),
    "built_in": layers.Conv2D(4, 1, activation="relu6", name="first"),
    "function": lambda x: keras.ops.relu6(layers.Conv2D(4, 1, name="first")(x)),
}


@pytest.mark.parametrize("clipped", RELU6.values(), ids=RELU6)
def test_relu6_is_replaced_in_every_form(clipped):
    def body(x):
        return layers.GlobalAveragePooling2D()(layers.Conv2D(3, 1, name="second")(clipped(x)))

    model = scramble(network(body), 1)
    replaced = equalize(model, replace_relu6=True)
    kernels = [np.asarray(m.get_layer("first").kernel) for m in (model, replaced)]
    assert np.abs(kernels[1] - kernels[0]).max() > 0.01
    small = images(4) * 0.01  # where nothing reaches 6
    assert relative_error(replaced(small), np.asarray(model(small))) < 1e-4
    assert np.asarray(replaced(images(4) * 1e3)).max() > np.asarray(model(images(4) * 1e3)).max()
