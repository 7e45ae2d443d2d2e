import keras
import numpy as np
import pytest

from tfaccel.architectures import (
    channel_shuffle,
    conv_bn_activation,
    depthwise_bn_activation,
    inverted_residual,
    make_divisible,
    shuffle_unit,
)


def model_of(block, shape, **arguments):
    inputs = keras.Input(shape)
    return keras.Model(inputs, block(inputs, **arguments))


@pytest.mark.parametrize(
    ("value", "rounded"),
    # By hand from the rule: nearest multiple of 8, one more if that loses over 10 %, at least 8.
    [
        (8, 8),
        (3, 8),
        (11.2, 16),
        (8.4, 8),
        (16.8, 16),
        (24, 24),
        (60, 64),
        (89.6, 88),
        (1792, 1792),
    ],
)
def test_make_divisible(value, rounded):
    assert make_divisible(value) == rounded


def test_make_divisible_keeps_the_minimum():
    assert make_divisible(3, divisor=4, minimum=12) == 12


def test_channel_shuffle_deals_the_groups_out_in_turn():
    model = model_of(channel_shuffle, (1, 2, 6), groups=3, name="shuffle")
    x = np.arange(12, dtype="float32").reshape(1, 1, 2, 6)
    # Groups (0 1) (2 3) (4 5): the first of each, then the second of each.
    expected = x[..., [0, 2, 4, 1, 3, 5]]
    np.testing.assert_array_equal(model(x), expected)


def test_channel_shuffle_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="4 groups of 6 channels"):
        model_of(channel_shuffle, (2, 2, 6), groups=4, name="shuffle")


def test_channel_shuffle_refuses_an_open_size():
    with pytest.raises(ValueError, match="known height and width"):
        model_of(channel_shuffle, (None, 2, 6), groups=2, name="shuffle")


@pytest.mark.parametrize(
    ("activation", "lowest", "highest"),
    [("relu", 0.0, np.inf), ("relu6", 0.0, 6.0), (None, -np.inf, np.inf), ("tanh", -1.0, 1.0)],
)
def test_conv_bn_activation_is_bounded_by_its_activation(activation, lowest, highest):
    model = model_of(
        conv_bn_activation, (6, 6, 3), filters=16, strides=2, activation=activation, name="c"
    )
    outputs = 1e3 * np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype("float32")
    y = keras.ops.convert_to_numpy(model(outputs))
    assert y.shape == (4, 3, 3, 16)
    assert y.min() >= lowest
    assert y.max() <= highest
    assert model.get_layer("c").use_bias is False
    names = [layer.name for layer in model.layers[1:]]
    assert names == ["c", "c_norm"] + ([f"c_{activation}"] if activation else [])


def test_depthwise_bn_activation_keeps_channels():
    model = model_of(depthwise_bn_activation, (5, 7, 3), kernel_size=5, strides=2, name="d")
    assert model.output_shape == (None, 3, 4, 3)
    assert model.get_layer("d").count_params() == 5 * 5 * 3


@pytest.mark.parametrize(
    ("filters", "strides", "expansion", "residual"),
    [(8, 1, 6, True), (8, 2, 6, False), (16, 1, 6, False), (8, 1, 1, True)],
)
def test_inverted_residual_has_the_layers_of_the_paper(filters, strides, expansion, residual):
    model = model_of(
        inverted_residual,
        (8, 8, 8),
        filters=filters,
        strides=strides,
        expansion=expansion,
        name="b",
    )
    kinds = [type(layer).__name__ for layer in model.layers[1:]]
    expand = ["Conv2D", "BatchNormalization", "ReLU"] if expansion != 1 else []
    depthwise = ["DepthwiseConv2D", "BatchNormalization", "ReLU"]
    project = ["Conv2D", "BatchNormalization"]  # linear: no activation behind it
    assert kinds == expand + depthwise + project + (["Add"] if residual else [])
    assert model.output_shape == (None, 8 // strides, 8 // strides, filters)
    # Kernels by hand, and four batch-norm vectors for each convolution's channels.
    wide = expansion * 8
    kernels = (8 * wide if expand else 0) + 9 * wide + wide * filters
    norms = 4 * ((wide if expand else 0) + wide + filters)
    assert model.count_params() == kernels + norms


def test_shuffle_unit_passes_half_of_the_channels_on():
    model = model_of(shuffle_unit, (4, 4, 6), filters=6, name="u")
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 6)).astype("float32")
    # The shuffle puts channels of the untouched first half at the even places.
    np.testing.assert_array_equal(model(x)[..., ::2], x[..., :3])


def test_shuffle_unit_with_stride_halves_the_image():
    model = model_of(shuffle_unit, (7, 8, 6), filters=10, strides=2, name="u")
    assert model.output_shape == (None, 4, 4, 10)
    kernels = (9 * 6 + 6 * 5) + (6 * 5 + 9 * 5 + 5 * 5)
    norms = 4 * ((6 + 5) + (5 + 5 + 5))
    assert model.count_params() == kernels + norms


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filters": 7, "strides": 2}, "must be even"),
        ({"filters": 8}, "keeps its channels"),
        ({"filters": 6, "strides": 3}, "strides must be one of"),
    ],
)
def test_shuffle_unit_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_of(shuffle_unit, (4, 4, 6), name="u", **arguments)
