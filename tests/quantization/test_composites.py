"""Layers written as several: the same function before any rounding, or a reason why not."""

import keras
import numpy as np
import pytest
from keras import layers

import tfaccel
from tests.quantization.networks import images, network
from tfaccel.core import Graph
from tfaccel.pruning import prune
from tfaccel.quantization import Floor, plan, quantize_aware
from tfaccel.quantization.equivalents import Rewriter


def steps(x):
    return layers.Reshape((4, 48))(x)


def attend(**options):
    """Another sequence as keys than as values, both shorter than the queries."""
    layer = layers.MultiHeadAttention(2, 5, name="a", **options)
    return lambda x: layer(
        steps(x), layers.AveragePooling1D(2)(steps(x)), key=layers.MaxPooling1D()(steps(x))
    )


WRITTEN = {
    "layer_norm": lambda x: layers.LayerNormalization(epsilon=0.1)(steps(x)),
    "layer_norm_of_images": layers.LayerNormalization(axis=3),
    "layer_norm_of_rows": lambda x: layers.LayerNormalization(scale=False)(layers.Flatten()(x)),
    "layer_norm_plain": lambda x: layers.LayerNormalization(scale=False, center=False)(steps(x)),
    "attention": attend(),
    "attention_widths": attend(value_dim=3, use_bias=False, output_shape=7),
    "attention_dropout": attend(dropout=0.5),
    "attention_to_itself": lambda x: layers.MultiHeadAttention(3, 4)(steps(x), steps(x)),
    "lstm": lambda x: layers.LSTM(5, dropout=0.3)(steps(x)),
    "lstm_sequences": lambda x: layers.LSTM(5, return_sequences=True, use_bias=False)(steps(x)),
    "lstm_backwards": lambda x: layers.LSTM(5, return_sequences=True, go_backwards=True)(steps(x)),
    "gru": lambda x: layers.GRU(5)(steps(x)),
    "gru_before": lambda x: layers.GRU(5, reset_after=False, return_sequences=True)(steps(x)),
    "gru_no_bias": lambda x: layers.GRU(5, use_bias=False)(steps(x)),
    "both_ways": lambda x: layers.Bidirectional(layers.LSTM(3))(steps(x)),
    "both_ways_sequences": lambda x: layers.Bidirectional(
        layers.GRU(3, return_sequences=True), merge_mode="sum"
    )(steps(x)),
    "one_step": lambda x: layers.LSTM(3, return_sequences=True)(layers.Reshape((1, 192))(x)),
}


def rewritten(model):
    graph = Graph.read(model)
    taken = set()

    def free_name(name):
        number = 0
        while f"{name}{number or ''}" in taken:
            number += 1
        taken.add(f"{name}{number or ''}")
        return f"{name}{number or ''}"

    rewriter = Rewriter(graph, set(), free_name)
    rewriter.rewrite()
    return graph.build(), rewriter


KINDS = (
    layers.LayerNormalization,
    layers.MultiHeadAttention,
    layers.LSTM,
    layers.GRU,
    layers.Bidirectional,
)


@pytest.mark.parametrize("body", WRITTEN.values(), ids=WRITTEN)
def test_outputs_are_the_same(body):
    model = network(body)
    new, _ = rewritten(model)
    assert not [x for x in new.layers if isinstance(x, KINDS)]
    # The last of the new ones has the name of the layer that was written out.
    (name,) = [x.name for x in model.layers if isinstance(x, KINDS)]
    assert name in [x.name for x in new.layers]
    x = images(6)
    np.testing.assert_allclose(new(x), model(x), rtol=1e-4, atol=1e-5)


def _masked(x):
    return layers.LSTM(3)(layers.Masking()(steps(x)))


def _twice(x):
    shared = layers.LayerNormalization()
    return layers.Add()([shared(steps(x)), shared(2.0 * steps(x))])


REFUSED = {
    "other_axes": (layers.LayerNormalization(axis=(1, 2)), "over other axes than the last"),
    "twice": (_twice, "LayerNormalization that is called more than once"),
    "causal": (
        lambda x: layers.MultiHeadAttention(2, 3)(steps(x), steps(x), use_causal_mask=True),
        "attention with use_causal_mask",
    ),
    "images": (
        lambda x: layers.MultiHeadAttention(2, 3, attention_axes=(1, 2))(x, x),
        "attention over several axes",
    ),
    "masked": (_masked, "LSTM in a model with masks"),
    "state": (lambda x: layers.GRU(3, return_state=True)(steps(x))[1], "GRU with return_state"),
    "softsign": (
        lambda x: layers.LSTM(3, activation="softsign")(steps(x)),
        "LSTM with other activations than sigmoid and tanh",
    ),
    "recurrent_dropout": (
        lambda x: layers.LSTM(3, recurrent_dropout=0.1)(steps(x)),
        "LSTM with recurrent_dropout",
    ),
    "long": (
        lambda x: layers.LSTM(3)(layers.Reshape((96, 2))(x)),
        "LSTM of 96 steps, more than the 64",
    ),
    "averaged": (
        lambda x: layers.Bidirectional(layers.GRU(3), merge_mode="ave")(steps(x)),
        "merge_mode='ave'",
    ),
    "simple": (
        lambda x: layers.Bidirectional(layers.SimpleRNN(3))(steps(x)),
        "SimpleRNN in two directions",
    ),
}


@pytest.mark.parametrize(("body", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_written_out_stays_and_says_why(body, reason):
    floats = [d for d in plan(network(body)) if d.action == "float"]
    assert any(reason in d.reason for d in floats), floats


def test_unknown_number_of_steps_stays_float():
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, layers.Dense(2)(layers.LSTM(4, name="m")(inputs)))
    (decision,) = [d for d in plan(model) if d.name == "m"]
    assert "number of steps that is not fixed" in decision.reason


def test_pruned_layer_stays_float_and_is_told_what_to_do():
    pruned = prune(network(lambda x: layers.LSTM(3, name="m")(steps(x))), 0.5, include="m")
    (decision,) = [d for d in plan(pruned) if d.name == "m"]
    assert decision.action == "float"
    assert "pruned already; prune after quantize_aware()" in decision.reason


def test_regularizers_and_trainable_flags_go_along():
    def body(x):
        x = layers.LSTM(3, kernel_regularizer="l1", recurrent_regularizer="l2", name="m")(steps(x))
        return layers.LayerNormalization(name="n")(x)

    model = network(body)
    model.get_layer("n").trainable = False
    new, _ = rewritten(model)
    x = images(2)
    model(x), new(x)
    assert float(sum(new.losses)) == pytest.approx(float(sum(model.losses)), rel=1e-5)
    assert not [v.path for v in new.trainable_weights if v.path.startswith("n")]


def test_variance_rounded_to_zero_leaves_ranges_and_gradients_finite():
    aware = quantize_aware(network(lambda x: layers.LayerNormalization()(steps(x))))
    aware.compile(keras.optimizers.SGD(0.01), "mse")
    x = images(16)
    x[::2] *= 1e-4  # far below a step of the variance
    aware.fit(x, np.zeros((16, 4, 48)), batch_size=8, verbose=0)
    assert all(np.isfinite(np.asarray(v)).all() for v in aware.variables)
    root = next(x for x in aware.layers if "rsqrt_quantize" in x.name)
    square = next(x for x in aware.layers if "add_quantize" in x.name)
    # The inverse root of one step is the largest that there is to be seen.
    assert float(root.maximum) <= 1.2 / np.sqrt(float(square.maximum) / 255)


def test_floor_is_one_step_in_training_and_nothing_else():
    floor = Floor()
    x = np.array([0.0, 1e-3, 2.55], "float32")
    np.testing.assert_allclose(floor(x, training=True), [0.01, 0.01, 2.55], rtol=1e-6)
    np.testing.assert_array_equal(floor(x), x)
    assert floor.strip_layer() is None
    with pytest.raises(ValueError, match="bits must be one of"):
        Floor(bits=1)


def test_stripped_model_is_plain_and_computes_the_float_function():
    model = network(lambda x: layers.LayerNormalization()(layers.GRU(4)(steps(x))))
    aware = quantize_aware(model)
    x = images(8)
    aware(x, training=True)
    plain = tfaccel.strip(aware)
    assert {type(x).__module__.split(".")[0] for x in plain.layers} == {"keras"}
    np.testing.assert_allclose(plain(x), model(x), atol=0.05)  # weights are rounded
