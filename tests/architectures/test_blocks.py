import keras
import numpy as np
import pytest

from tfaccel.architectures import (
    channel_shuffle,
    conv_bn_activation,
    depthwise_bn_activation,
    depthwise_separable,
    fire,
    grouped_shuffle_unit,
    inception,
    inverted_residual,
    local_response_normalization,
    make_divisible,
    mlpconv,
    shuffle_unit,
    squeeze_excite,
)
from tfaccel.measurement import count


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


# Blocks of the later networks, against numpy


def pixels(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def weights_of(model, name):
    return [np.asarray(w) for w in model.get_layer(name).weights]


def relu(x):
    return np.maximum(x, 0)


def test_mlpconv_is_a_network_at_every_pixel():
    model = model_of(mlpconv, (4, 5, 3), filters=(6, 4, 2), kernel_size=1, name="m")
    expected = x = pixels(2, 4, 5, 3)
    for place in range(3):
        kernel, bias = weights_of(model, f"m_{place}")
        expected = relu(expected @ kernel[0, 0] + bias)
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-6)


def test_mlpconv_has_one_kernel_and_one_stride():
    model = model_of(mlpconv, (8, 8, 3), filters=(6, 4), kernel_size=5, strides=2, name="m")
    assert model.output_shape == (None, 4, 4, 4)
    assert model.count_params() == 5 * 5 * 3 * 6 + 6 + 6 * 4 + 4
    normed = model_of(mlpconv, (8, 8, 3), filters=(6, 4), kernel_size=5, batch_norm=True, name="m")
    assert normed.count_params() == 5 * 5 * 3 * 6 + 4 * 6 + 6 * 4 + 4 * 4
    with pytest.raises(ValueError, match="at least one layer"):
        model_of(mlpconv, (8, 8, 3), filters=(), name="m")


def test_squeeze_excite_gates_each_channel():
    model = model_of(squeeze_excite, (3, 4, 8), channels=2, gate="sigmoid", name="s")
    x = pixels(2, 3, 4, 8)
    (first, first_bias), (second, second_bias) = (
        weights_of(model, f"s_{name}") for name in ("reduce", "expand")
    )
    hidden = relu(x.mean((1, 2)) @ first[0, 0] + first_bias)
    gate = 1 / (1 + np.exp(-(hidden @ second[0, 0] + second_bias)))
    np.testing.assert_allclose(model(x), x * gate[:, None, None], rtol=1e-4, atol=1e-6)


def test_depthwise_separable_has_the_macs_of_equation_5():
    model = model_of(depthwise_separable, (8, 8, 16), filters=32, strides=2, name="d")
    # Eq. 5: D_K^2 M D_F^2 + M N D_F^2, with D_K = 3, M = 16, N = 32, D_F = 4.
    assert count(model).macs == 9 * 16 * 16 + 16 * 32 * 16
    kinds = [type(layer).__name__ for layer in model.layers[1:]]
    assert kinds == [
        "DepthwiseConv2D",
        "BatchNormalization",
        "ReLU",
        "Conv2D",
        "BatchNormalization",
        "ReLU",
    ]


def test_inverted_residual_squeezes_the_expanded_channels():
    model = model_of(inverted_residual, (6, 6, 16), filters=16, expansion=4, squeeze=0.25, name="b")
    assert model.get_layer("b_squeeze_reduce").filters == 16
    assert model.get_layer("b_squeeze_expand").filters == 64
    names = [layer.name for layer in model.layers]
    assert names.index("b_depthwise_relu6") < names.index("b_squeeze_scale")
    assert names.index("b_squeeze_scale") < names.index("b_project")


def test_inception_is_four_branches_side_by_side():
    channels = (4, 3, 6, 2, 5, 7)
    model = model_of(inception, (5, 5, 8), channels=channels, name="i")
    assert model.output_shape == (None, 5, 5, 4 + 6 + 5 + 7)
    kernels = 8 * 4 + 8 * 3 + 9 * 3 * 6 + 8 * 2 + 25 * 2 * 5 + 8 * 7
    assert model.count_params() == kernels + sum(channels)
    x = pixels(2, 5, 5, 8)
    kernel, bias = weights_of(model, "i_1x1")
    outputs = np.asarray(model(x))
    np.testing.assert_allclose(outputs[..., :4], relu(x @ kernel[0, 0] + bias), atol=1e-5)
    kernel, bias = weights_of(model, "i_pool_project")
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    pooled = windows.max((-2, -1))
    np.testing.assert_allclose(outputs[..., -7:], relu(pooled @ kernel[0, 0] + bias), atol=1e-5)
    with pytest.raises(ValueError, match="six numbers"):
        model_of(inception, (5, 5, 8), channels=(1, 2, 3), name="i")


def test_fire_has_the_parameters_of_the_paper():
    # Table 1, fire2: 96 channels in, 16 squeezed, 2 x 64 out: 11,920 parameters.
    model = model_of(fire, (8, 8, 96), squeeze=16, expand=64, name="f")
    assert model.count_params() == 11_920
    assert model.output_shape == (None, 8, 8, 128)


@pytest.mark.parametrize(("radius", "bias", "alpha", "beta"), [(2, 1.0, 1e-4, 0.75), (1, 2, 3, 1)])
def test_local_response_normalization_is_tensorflows(radius, bias, alpha, beta):
    import tensorflow as tf

    model = model_of(
        local_response_normalization, (2, 3, 7), radius=radius, bias=bias, alpha=alpha, beta=beta
    )
    x = 10 * pixels(2, 2, 3, 7)
    # TensorFlow sums the squares, where Caffe and we take their mean.
    expected = tf.nn.local_response_normalization(x, radius, bias, alpha / (2 * radius + 1), beta)
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-6)


def test_grouped_shuffle_unit_adds_or_concatenates():
    x = pixels(2, 4, 4, 24)
    same = model_of(grouped_shuffle_unit, (4, 4, 24), filters=24, groups=3, name="u")
    # Grouped convolutions of 24 to 6 and of 6 to 24 channels in 3 groups, 3 x 3 in between.
    kernels = 24 * 6 // 3 + 9 * 6 + 6 * 24 // 3
    assert same.count_params() == kernels + 4 * (6 + 6 + 24)
    zeroed = [np.zeros_like(w) for w in same.get_layer("u_expand").get_weights()]
    same.get_layer("u_expand").set_weights(zeroed)
    np.testing.assert_allclose(same(x), relu(x), atol=1e-6)
    halved = model_of(grouped_shuffle_unit, (4, 4, 24), filters=48, groups=3, strides=2, name="u")
    # Windows of 3 x 3 from (0, 0) on; the last ones lack a row or a column.
    corner = relu(x[:, :3, :3].mean((1, 2)))
    np.testing.assert_allclose(np.asarray(halved(x))[:, 0, 0, :24], corner, atol=1e-5)
    assert halved.output_shape == (None, 2, 2, 48)


def test_channels_travel_between_groups_through_the_shuffle():
    model = model_of(grouped_shuffle_unit, (4, 4, 16), filters=16, groups=2, name="u")
    x = np.zeros((1, 4, 4, 16), "float32")
    moved = x.copy()
    moved[..., :8] = 1.0  # the first group only
    difference = np.abs(np.asarray(model(moved)) - np.asarray(model(x)))
    assert difference[..., 8:].max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filters": 32}, "keeps its channels"),
        ({"filters": 24, "strides": 2}, "filters must be above that"),
        ({"filters": 24, "groups": 4}, "4 groups of 6, 24, 24 channels in 'u'"),
        ({"filters": 50, "groups": 5, "strides": 2}, "groups must divide"),
        ({"filters": 24, "strides": 3}, "strides must be one of"),
    ],
)
def test_grouped_shuffle_unit_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_of(grouped_shuffle_unit, (4, 4, 24), name="u", **arguments)
