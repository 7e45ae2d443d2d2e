"""Layers written as others: the same function, before any rounding."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.quantization.networks import conv, images, network
from tfaccel.core import Graph
from tfaccel.core.transforms import TransformedLayer
from tfaccel.pruning import prune
from tfaccel.quantization import quantize_aware
from tfaccel.quantization.equivalents import Rewriter


def rewritten(model, skipped=()):
    graph = Graph.read(model)
    Rewriter(graph, set(map(id, skipped)), lambda name: name).rewrite()
    return graph.build()


def classes(model):
    return [type(x).__name__ for x in model.layers if not isinstance(x, layers.InputLayer)]


def sequence(x):
    return layers.Reshape((16, 12))(x)


SAME = {
    "separable": (
        layers.SeparableConv2D(4, 3, 2, depth_multiplier=2, padding="same"),
        ["DepthwiseConv2D", "Conv2D"],
    ),
    "separable1d": (
        lambda x: layers.SeparableConv1D(4, 3, dilation_rate=2, use_bias=False)(sequence(x)),
        ["Reshape", "DepthwiseConv1D", "Conv1D"],
    ),
    "separable_tanh": (
        layers.SeparableConv2D(4, 3, activation="tanh"),
        ["DepthwiseConv2D", "Conv2D", "Activation"],
    ),
    "conv_relu": (lambda x: conv(x, activation="relu"), ["Conv2D"]),
    "conv_sigmoid": (lambda x: conv(x, activation="sigmoid"), ["Conv2D", "Activation"]),
    "conv_swish": (
        lambda x: conv(x, activation="swish"),
        ["Conv2D", "Activation", "Multiply"],
    ),
    "conv_layer": (
        lambda x: conv(x, activation=layers.LeakyReLU(0.3)),
        ["Conv2D", "LeakyReLU"],
    ),
    "dense_own": (
        layers.Dense(4, activation=keras.ops.square),
        ["Dense", "Activation"],
    ),
    "functional_swish": (keras.ops.silu, ["Activation", "Multiply"]),
    "rescaling": (layers.Rescaling(1 / 127.5, -1.0), ["DepthwiseConv2D"]),
    "rescaled_channels": (layers.Rescaling([1.0, 2.0, -3.0], [0.0, 4.0, 5.0]), ["DepthwiseConv2D"]),
    "rescaled_sequence": (
        lambda x: layers.Rescaling(0.1)(sequence(x)),
        ["Reshape", "DepthwiseConv1D"],
    ),
    "lone_norm": (layers.BatchNormalization(), ["DepthwiseConv2D", "BatchNormalization"]),
    "folded_norm": (
        lambda x: layers.BatchNormalization()(conv(x)),
        ["Conv2D", "BatchNormalization"],
    ),
    "norm_after_relu": (
        lambda x: layers.BatchNormalization()(conv(x, activation="relu")),
        ["Conv2D", "DepthwiseConv2D", "BatchNormalization"],
    ),
    "norm_of_rows": (
        lambda x: layers.BatchNormalization()(layers.Flatten()(x)),
        ["Flatten", "BatchNormalization"],
    ),
}


@pytest.mark.parametrize(("body", "expected"), SAME.values(), ids=SAME)
def test_outputs_are_the_same(body, expected):
    model = network(body)
    new = rewritten(model)
    assert sorted(classes(new)) == sorted(expected)
    x = images(8)
    old_outputs = np.asarray(model(x, training=False))
    np.testing.assert_allclose(new(x, training=False), old_outputs, rtol=1e-5, atol=1e-5)


def test_skipped_layers_stay_as_they_are():
    model = network(lambda x: layers.BatchNormalization()(conv(x, activation="tanh")))
    assert classes(rewritten(model, skipped=model.layers)) == ["Conv2D", "BatchNormalization"]


def test_activation_shared_by_two_paths_stays_shared():
    def body(x):
        shared = layers.Activation("swish")
        return layers.Add()([shared(conv(x)), shared(conv(x))])

    model = network(body)
    new = rewritten(model)
    assert classes(new).count("Activation") == classes(new).count("Multiply") == 1
    x = images(4)
    np.testing.assert_allclose(new(x), model(x), rtol=1e-5, atol=1e-5)


def test_what_trains_and_what_does_not():
    aware = quantize_aware(
        network(lambda x: layers.BatchNormalization(name="n")(layers.Rescaling(2.0, name="r")(x)))
    )
    # The factor of Rescaling is the user's, that of the norm is gamma.
    assert [w.path for w in aware.trainable_weights] == ["n/gamma", "n/beta"]
    kernel = network(layers.SeparableConv2D(4, 3, name="s"))
    kernel.get_layer("s").trainable = False
    assert quantize_aware(kernel).trainable_weights == []


def test_regularizers_go_to_the_halves():
    def body(x):
        return layers.SeparableConv2D(
            4, 3, depthwise_regularizer=keras.regularizers.L2(1.0), pointwise_regularizer="l1"
        )(x)

    model = network(body)
    x = images(2)
    model(x)
    new = rewritten(model)
    new(x)
    assert float(sum(new.losses)) == pytest.approx(float(sum(model.losses)), rel=1e-5)


def _two_shapes(x):
    shared = layers.Rescaling(0.5)
    return layers.Concatenate()([layers.Flatten()(shared(x)), shared(layers.Flatten()(x))])


LEFT = {
    "per_pixel": layers.Rescaling(np.linspace(0.1, 1, 8 * 3).reshape(8, 3).tolist()),
    "rows": lambda x: layers.Rescaling(0.5)(layers.Flatten()(x)),
    "integers": lambda x: layers.Rescaling(0.5)(keras.ops.cast(x, "int32")),
    "two_shapes": _two_shapes,
}


@pytest.mark.parametrize("body", LEFT.values(), ids=LEFT)
def test_rescaling_that_is_no_factor_per_channel_is_left_alone(body):
    assert "Rescaling" in classes(rewritten(network(body)))


def test_pruned_layer_keeps_its_mask_when_its_activation_goes():
    pruned = prune(network(lambda x: conv(x, activation="tanh", name="c")), 0.5, include="c")
    new = rewritten(pruned)
    layer = new.get_layer("c")
    assert isinstance(layer, TransformedLayer)
    assert classes(new) == ["TransformedLayer", "Activation"]
    old = pruned.get_layer("c").transforms[0][1].state
    for name, variable in layer.transforms[0][1].state.items():
        np.testing.assert_array_equal(variable, old[name])
