"""Weights of one and two bits against the papers' formulas, worked out in NumPy."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

import tfaccel
from tests.comparing import assert_same_outputs, fingerprint
from tfaccel.core import keras_private
from tfaccel.core.artifacts import load_model
from tfaccel.core.transforms import TransformedLayer, transformed_layers
from tfaccel.pruning import prune
from tfaccel.quantization.binary_layers import Binarize, InputScale
from tfaccel.quantization.low_bit import low_bit, low_bit_plan
from tfaccel.quantization.low_bit_weights import (
    BinaryConnect,
    BinaryNet,
    TernaryWeights,
    TrainedTernary,
    XNORNet,
)

IMAGE = (6, 6, 3)
METHODS = ["binary_connect", "binary_net", "xnor", "twn", "ttq"]


def kernel_of(shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype("float32")


def images(count=16, seed=0):
    return kernel_of((count, *IMAGE), seed)


def network(policy="float32"):
    """A stem, a residual block with ReLU, and a head, all with biases."""
    keras.utils.set_random_seed(4)
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input(IMAGE)
        x = layers.Conv2D(4, 3, padding="same", name="stem")(inputs)
        x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
        y = layers.Conv2D(4, 3, padding="same", activation="relu", name="body")(x)
        x = layers.Flatten(name="flat")(layers.Add(name="sum")([x, y]))
        x = layers.Dense(8, name="hidden")(x)
        outputs = layers.Dense(3, name="head")(x)
        model = keras.Model(inputs, outputs, name="small")
    finally:
        keras.config.set_dtype_policy("float32")
    for layer in (model.get_layer("body"), model.get_layer("hidden")):
        layer.bias.assign(kernel_of(layer.bias.shape, 5))
    return model


def train(model, epochs=1, jit=False):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, jit_compile=jit)
    x = images(24)
    y = x.mean((1, 2)).argmax(-1)
    return model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0).history["loss"]


def attached(transform, weight):
    """The transform on the kernel of a dense layer of that kernel."""
    dense = layers.Dense(weight.shape[-1], use_bias=False)
    dense.build((None, weight.shape[0]))
    dense.kernel.assign(weight)
    layer = TransformedLayer(dense, [("kernel", transform)])
    transform.initialize(weight)
    return layer


def gradients(transform, weight, upstream, *others):
    variable = tf.Variable(weight)
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(transform(variable, training=True) * upstream)
    return [np.asarray(g) for g in tape.gradient(total, [variable, *others])]


# Weights


@pytest.mark.parametrize("kind", [BinaryConnect, BinaryNet])
def test_signs_are_exact_and_pass_the_gradient(kind):
    weight, upstream = kernel_of((7, 5)), kernel_of((7, 5), 1)
    weight[0, 0] = 0
    value = np.asarray(kind()(weight, training=True))
    np.testing.assert_array_equal(value, np.where(weight >= 0, 1, -1))
    np.testing.assert_array_equal(gradients(kind(), weight, upstream)[0], upstream)


def test_raw_weights_are_clipped_after_an_update_and_turn_signs():
    weight = np.array([[0.9, -0.1], [-0.95, 0.3]], "float32")
    layer = attached(BinaryConnect(), weight)
    model = keras.Sequential([keras.Input((2,)), layer])
    model.compile(keras.optimizers.SGD(1.0), lambda y, p: keras.ops.sum(y * p), jit_compile=False)
    x, y = np.array([[1.0, 2.0]], "float32"), np.array([[-0.3, 0.2]], "float32")
    model.fit(x, y, verbose=0)
    # The loss is the sum of y x' W, so that the gradient of a binary weight is x y.
    np.testing.assert_allclose(layer.variable("kernel"), np.clip(weight - x.T @ y, -1, 1))
    assert np.abs(layer.variable("kernel")).max() == 1
    plain = tfaccel.strip(model)
    np.testing.assert_array_equal(plain.layers[0].kernel, [[1, -1], [-1, -1]])
    assert plain.layers[0].kernel.constraint is None


def test_clipping_comes_after_the_layers_own_constraint():
    dense = layers.Dense(2, kernel_constraint=keras.constraints.NonNeg())
    dense.build((None, 1))
    layer = TransformedLayer(dense, [("kernel", XNORNet())])
    constrained = layer.variable("kernel").constraint(keras.ops.array([[-3.0, 3.0]]))
    np.testing.assert_array_equal(constrained, [[0.0, 1.0]])


def test_stochastic_signs_are_drawn_by_their_probability():
    weight = np.repeat(np.array([[-2.0, -1.0, -0.5, 0.0, 0.5, 1.0]], "float32"), 4000, axis=0)
    transform = BinaryConnect(stochastic=True, seed=3)
    attached(transform, weight)
    first, second = (np.asarray(transform(weight, training=True)) for _ in range(2))
    assert set(np.unique(first)) == {-1.0, 1.0}
    assert (first != second).any()
    shares = (first > 0).mean(0)
    # clip((w + 1) / 2, 0, 1), within four standard deviations
    np.testing.assert_allclose(shares, [0, 0, 0.25, 0.5, 0.75, 1], atol=4 * 0.5 / 4000**0.5)
    np.testing.assert_array_equal(transform(weight, training=False), np.where(weight >= 0, 1, -1))


def test_xnor_scale_and_gradient_are_the_papers():
    weight, upstream = kernel_of((3, 3, 2, 4)), kernel_of((3, 3, 2, 4), 1)
    scale = np.abs(weight).mean((0, 1, 2))
    np.testing.assert_allclose(XNORNet()(weight), np.sign(weight) * scale, rtol=1e-6)
    expected = upstream * (1 / 18 + scale * (np.abs(weight) <= 1))
    np.testing.assert_allclose(gradients(XNORNet(), weight, upstream)[0], expected, rtol=1e-5)
    assert (np.abs(weight) > 1).any()


@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_ternary_weights_are_the_least_squares_fit_of_their_codes(rows, columns, seed):
    weight = kernel_of((rows, columns), seed)
    value = np.asarray(TernaryWeights().finalize(weight))
    for channel, result in zip(weight.T, value.T, strict=True):
        codes = np.sign(channel) * (np.abs(channel) > 0.7 * np.abs(channel).mean())
        (scale,) = np.linalg.lstsq(codes[:, None].astype("float64"), channel, rcond=None)[0]
        np.testing.assert_allclose(result, scale * codes, rtol=1e-5, atol=1e-7)


def test_ternary_weights_of_a_layer_share_threshold_and_scale():
    weight = np.array([[1.0, -0.1], [-0.5, 0.4]], "float32")
    # mean |w| = 0.5, threshold 0.35, scale (1 + 0.5 + 0.4) / 3
    scale = 1.9 / 3
    whole = TernaryWeights(granularity="layer")
    np.testing.assert_allclose(whole(weight), [[scale, 0], [-scale, scale]], rtol=1e-6)
    upstream = kernel_of((2, 2))
    np.testing.assert_array_equal(gradients(whole, weight, upstream)[0], upstream)
    assert not np.asarray(TernaryWeights().finalize(np.zeros((3, 2), "float32"))).any()


def test_trained_ternary_begins_at_the_means_and_has_the_papers_gradients():
    weight = np.array([[2.0, -0.05], [-1.0, 0.5], [0.09, -0.5]], "float32")  # threshold 0.1
    upstream = kernel_of((3, 2))
    transform = TrainedTernary(threshold=0.05)
    layer = attached(transform, weight)
    value = np.asarray(transform(weight, training=True))
    np.testing.assert_allclose(value, [[1.25, 0], [-0.75, 1.25], [0, -0.75]], rtol=1e-6)
    states = [transform.state[name].value for name in ("positive", "negative")]
    raw, positive, negative = gradients(transform, weight, upstream, *states)
    above, below = value > 0, value < 0
    np.testing.assert_allclose(positive, upstream[above].sum(), rtol=1e-5)
    np.testing.assert_allclose(negative, -upstream[below].sum(), rtol=1e-5)
    slopes = np.where(above, 1.25, np.where(below, 0.75, 1))
    np.testing.assert_allclose(raw, upstream * slopes, rtol=1e-6)
    assert len(layer.trainable_variables) == 3


# Layers


def test_binarize_passes_the_gradient_up_to_one():
    x = tf.constant([-np.inf, -1.5, -1.0, -0.2, -0.0, 0.0, 0.7, 1.0, 1.01, np.inf])
    with tf.GradientTape() as tape:
        tape.watch(x)
        signs = Binarize()(x)
    np.testing.assert_array_equal(signs, [-1, -1, -1, -1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(tape.gradient(signs, x), [0, 0, 1, 1, 1, 1, 1, 1, 0, 0])


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_input_scale_is_the_mean_size_under_the_window(padding):
    x, y = kernel_of((2, 5, 7, 3)), kernel_of((2, 3, 4, 6) if padding == "same" else (2, 2, 3, 6))
    found = InputScale((3, 3), (2, 2), padding)([y, x])
    size = np.abs(x).mean(-1)
    if padding == "same":  # of 5 and 7 at a stride of 2, one on each side
        size = np.pad(size, [(0, 0), (1, 1), (1, 1)])
    for row in range(y.shape[1]):
        for column in range(y.shape[2]):
            window = size[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            expected = y[:, row, column] * window.sum((1, 2))[:, None] / 9
            np.testing.assert_allclose(found[:, row, column], expected, rtol=1e-5, atol=1e-7)


def test_input_scale_of_a_dense_layer_is_one_number_a_sample():
    x, y = kernel_of((4, 5)), kernel_of((4, 2))
    expected = y * np.abs(x).mean(1, keepdims=True)
    np.testing.assert_allclose(InputScale()([y, x]), expected, rtol=1e-6)


# Models


def test_plan_keeps_first_and_last_layer_and_says_why():
    plan = {choice.layer.name: choice for choice in low_bit_plan(network())}
    assert {name for name, choice in plan.items() if choice.chosen} == {"body", "hidden"}
    assert plan["stem"].reason.startswith("first layer")
    assert plan["head"].reason.startswith("last layer")
    assert plan["norm"].reason == "no kernel of a dense layer or convolution"
    assert plan["body"].reason == "kernel: 144 weights"
    model = network()
    model.get_layer("hidden").trainable = False
    assert low_bit_plan(model)[-2].reason == "frozen: its weights do not train"
    named = low_bit_plan(network(), include=["stem", "head"])
    assert [c.layer.name for c in named if c.chosen] == ["stem", "head"]


def test_plan_names_what_has_no_input_scale():
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2D(2, 3, name="first")(inputs)
    x = layers.Conv2D(2, 1, groups=2, name="grouped")(layers.DepthwiseConv2D(1, name="each")(x))
    model = keras.Model(inputs, layers.Conv2D(2, 1, name="last")(x))
    plan = {c.layer.name: c for c in low_bit_plan(model, "xnor")}
    assert plan["grouped"].chosen
    assert plan["each"].reason == "depthwise kernel: a handful of weights per channel"
    plan = {c.layer.name: c for c in low_bit_plan(model, XNORNet(input_scale=True))}
    assert plan["grouped"].reason.startswith("no input scale for groups")
    assert plan["each"].reason == "no input scale is defined for DepthwiseConv2D"


def test_block_is_batch_norm_sign_layer_and_relu_is_skipped_by_the_sign_alone():
    model = network()
    before = fingerprint(model)
    graph = tfaccel.core.graph.Graph.read(low_bit(model, "xnor"))
    assert fingerprint(model) == before

    def source(name):
        (node,) = [node for node in graph.nodes if node.name == name]
        return [graph.producer(tensor).name for tensor in node.inputs]

    assert source("body") == ["body_sign"]
    assert source("body_sign") == ["norm"]  # not the ReLU behind it
    assert source("sum") == ["relu", "body"]
    assert source("hidden") == ["hidden_sign"]
    assert source("hidden_sign") == ["hidden_norm"]
    assert source("hidden_norm") == ["flat"]
    bare = low_bit(model, "binary_net", batch_norm=False)
    assert not any(layer.name == "hidden_norm" for layer in bare.layers)


def test_weights_and_biases_are_carried_over():
    model = network()
    rewritten = low_bit(model, XNORNet(input_scale=True), include="body")
    found = transformed_layers(rewritten)[0].variable("kernel")
    np.testing.assert_array_equal(found, model.get_layer("body").kernel)
    np.testing.assert_array_equal(
        rewritten.get_layer("body_scale").bias, model.get_layer("body").bias
    )


def test_input_scale_gives_the_papers_convolution():
    model = network()
    rewritten = low_bit(model, XNORNet(input_scale=True), include="body")
    names = ("norm", "body_activation")
    parts = keras.Model(rewritten.input, [rewritten.get_layer(name).output for name in names])
    x, found = (np.asarray(y) for y in parts(images()))
    kernel, bias = (np.asarray(v) for v in model.get_layer("body").weights)
    alpha = np.abs(kernel).mean((0, 1, 2))
    signs = tf.nn.conv2d(np.where(x >= 0, 1, -1).astype("float32"), np.sign(kernel), 1, "SAME")
    size = np.abs(x).mean(-1, keepdims=True)
    size = tf.nn.conv2d(size, np.full((3, 3, 1, 1), 1 / 9, "float32"), 1, "SAME")
    np.testing.assert_allclose(found, np.maximum(signs * size * alpha + bias, 0), atol=1e-5)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("how", [*METHODS, XNORNet(input_scale=True)], ids=str)
def test_trains_saves_and_strips_to_the_last_bit(how, tmp_path):
    model = low_bit(network(), how, seed=1)
    losses = train(model, epochs=6)
    assert losses[-1] < losses[0]
    model.save(tmp_path / "low.keras")
    loaded = load_model(tmp_path / "low.keras", compile=True)
    assert_same_outputs(loaded, model, images())
    plain = tfaccel.strip(model)
    kinds = {type(x).__module__.partition(".")[0] for x in keras_private.sublayers(plain)}
    assert kinds == {"keras"}
    assert "tfaccel" not in json.dumps(plain.get_config())
    assert_same_outputs(plain, model, images())
    plain.save(tmp_path / "plain.keras")
    assert_same_outputs(keras.saving.load_model(tmp_path / "plain.keras"), model, images())
    # Constraints are on again after loading.
    raw = transformed_layers(loaded)[0].variable("kernel")
    assert (raw.constraint is not None) == (how not in ("twn", "ttq"))


def test_stochastic_training_goes_on_after_load_as_if_not_stopped(tmp_path):
    how = BinaryConnect(stochastic=True)
    through, halted = (low_bit(network(), how, seed=7) for _ in range(2))
    losses = train(through, epochs=2)
    first = train(halted)
    halted.save(tmp_path / "half.keras")
    resumed = load_model(tmp_path / "half.keras", compile=True)
    x = images(24)
    history = resumed.fit(x, x.mean((1, 2)).argmax(-1), batch_size=8, shuffle=False, verbose=0)
    assert first + history.history["loss"] == losses
    other = low_bit(network(), how, seed=8)
    assert not np.array_equal(
        other(x, training=True), low_bit(network(), how, seed=7)(x, training=True)
    )


def test_trains_under_xla():
    def losses(jit):
        keras.utils.set_random_seed(2)
        dense = [layers.Dense(4, name="first"), layers.Dense(5, name="hidden"), layers.Dense(3)]
        model = keras.Sequential([keras.Input(IMAGE), layers.Flatten(), *dense])
        return train(low_bit(model, XNORNet(input_scale=True)), epochs=2, jit=jit)

    np.testing.assert_allclose(losses(True), losses(False), rtol=1e-4)


def test_trains_in_mixed_precision():
    model = low_bit(network("mixed_float16"), XNORNet(input_scale=True))
    losses = train(model, epochs=4)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert all(v.dtype == "float32" for v in model.trainable_variables)
    assert_same_outputs(tfaccel.strip(model), model, images())


def test_transposed_and_depthwise_kernels_are_scaled_by_their_outputs():
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2DTranspose(3, 2, name="up")(inputs)
    x = layers.DepthwiseConv2D(2, depth_multiplier=2, name="depthwise")(x)
    model = keras.Model(inputs, x)
    plain = tfaccel.strip(low_bit(model, "xnor", include=["up", "depthwise"]))
    for name, others in (("up", (0, 1, 3)), ("depthwise", (0, 1))):
        raw = np.asarray(model.get_layer(name).kernel)
        expected = np.sign(raw) * np.abs(raw).mean(others, keepdims=True)
        np.testing.assert_allclose(plain.get_layer(name).kernel, expected, rtol=1e-6)


def test_shared_layer_stays_shared():
    inputs = keras.Input((4,))
    shared = layers.Dense(4, name="shared")
    model = keras.Model(inputs, layers.Dense(2, name="head")(shared(shared(inputs))))
    rewritten = low_bit(model, "binary_net", include="shared")
    assert len(transformed_layers(rewritten)) == 1
    assert_same_outputs(tfaccel.strip(rewritten), rewritten, kernel_of((3, 4)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: low_bit(network(), "xnorr"), "Did you mean 'xnor'"),
        (lambda: low_bit(network(), "xnor", include="norm"), "norm: no kernel of a dense"),
        (lambda: low_bit(low_bit(network(), "twn"), "ttq"), "of low bits already"),
        (lambda: low_bit(prune(network(), 0.5), "xnor"), "cannot be zero"),
        (lambda: XNORNet(input_scale=True, binary_inputs=False), "Leave one"),
        (lambda: TernaryWeights(granularity="block"), "granularity must be one of"),
        (lambda: TernaryWeights(threshold=0), "threshold must be above 0"),
        (lambda: TrainedTernary(threshold=1.0), "threshold must be a fraction"),
        (lambda: InputScale((3,), padding="causal"), "padding must be one of"),
    ],
)
def test_errors_say_what_to_do(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_zeros_of_a_pruned_model_stay_under_ternary_weights():
    model = prune(network(), 0.5)
    tfaccel.pruning.update_masks(model, 1)
    rewritten = low_bit(model, "twn", include="hidden")
    pruned = np.asarray(tfaccel.strip(model).get_layer("hidden").kernel)
    ternary = np.asarray(tfaccel.strip(rewritten).get_layer("hidden").kernel)
    assert (pruned == 0).sum() >= pruned.size // 2
    assert (ternary[pruned == 0] == 0).all()
    assert ternary.any()


def test_names_that_are_taken_are_not_given_again():
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2D(3, 1, name="first")(inputs)
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.Conv2D(3, 1, use_bias=False, name="hidden")(x)
    x = layers.BatchNormalization(name="hidden_norm")(x)
    x = layers.Activation("sigmoid", name="hidden_sign")(x)
    model = keras.Model(inputs, layers.Dense(2, name="logits")(layers.Flatten()(x)))
    names = [layer.name for layer in low_bit(model, "xnor").layers]
    assert {"hidden_norm", "hidden_norm_1", "hidden_sign", "hidden_sign_1"} <= set(names)
