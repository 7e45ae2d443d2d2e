"""Read, match, edit, rebuild: what comes back is what went in, or the edit and no more."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tests.random_models import random_inputs, random_model
from tfaccel.core import keras_private
from tfaccel.core.graph import Graph, flat_layers, map_models
from tfaccel.core.matching import match, optional

seeds = st.integers(0, 2**20)


def flat_outputs(model, x, training=False):
    return [np.asarray(y) for y in keras.tree.flatten(model(x, training=training))]


def assert_same_outputs(model, other, x):
    for ours, theirs in zip(flat_outputs(model, x), flat_outputs(other, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def operation_names(model):
    functional = keras_private.functional_of(model)
    return [operation.name for operation in functional.operations]


# For all models


@settings(max_examples=25)
@given(seeds)
def test_rebuilding_unedited_changes_nothing(seed):
    model = random_model(seed)
    calls = {x.name: len(x._inbound_nodes) for x in keras_private.sublayers(model)}
    rebuilt = Graph.read(model).build()
    assert operation_names(rebuilt) == operation_names(model)
    assert_same_outputs(rebuilt, model, random_inputs(model, seed))
    keras.tree.assert_same_structure(model.input, rebuilt.input)
    keras.tree.assert_same_structure(model.output, rebuilt.output)
    assert [t.name for t in rebuilt.inputs] == [t.name for t in model.inputs]
    assert {x.name: len(x._inbound_nodes) for x in keras_private.sublayers(model)} == calls
    ours = set(map(id, keras_private.sublayers(rebuilt)))
    assert not ours & set(map(id, keras_private.sublayers(model)))


@settings(max_examples=8)
@given(seeds)
def test_rebuilt_model_survives_save_and_load(tmp_path_factory, seed):
    model = random_model(seed)
    path = tmp_path_factory.mktemp("graph") / "model.keras"
    Graph.read(model).build().save(path)
    assert_same_outputs(keras.saving.load_model(path), model, random_inputs(model, seed))


@settings(max_examples=15)
@given(seeds, st.data())
def test_identity_anywhere_changes_no_output_and_comes_out_again(seed, data):
    model = random_model(seed)
    graph = Graph.read(model)
    tensors = [tensor for node in graph.nodes for tensor in node.outputs]
    chosen = data.draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=3, unique_by=id))
    for number, tensor in enumerate(chosen):
        graph.insert_after(tensor, layers.Identity(name=f"inserted_{number}"))
    edited = graph.build()
    x = random_inputs(model, seed)
    assert_same_outputs(edited, model, x)
    assert {f"inserted_{n}" for n in range(len(chosen))} <= set(operation_names(edited))
    again = Graph.read(edited)
    for node in list(again.nodes):
        if node.name.startswith("inserted_"):
            again.remove(node)
    restored = again.build()
    assert operation_names(restored) == operation_names(model)
    assert_same_outputs(restored, model, x)


@settings(max_examples=10)
@given(seeds)
def test_replacing_every_layer_by_a_copy_changes_no_output(seed):
    model = random_model(seed)

    def replace(graph):
        for layer in graph.layers():
            if not isinstance(layer, keras.Model):
                copy = type(layer).from_config(layer.get_config())
                graph.replace_layer(layer, copy, layer.get_weights())

    assert_same_outputs(map_models(model, replace), model, random_inputs(model, seed))


# Calls of every form


def attention_model():
    query, value = keras.Input((4, 3), name="query"), keras.Input((6, 3), name="value")
    attention = layers.MultiHeadAttention(2, 2, name="attention")
    y, scores = attention(query, value=value, return_attention_scores=True)
    y = attention(y, value=value) + y
    return keras.Model([query, value], [y, scores]), [(2, 4, 3), (2, 6, 3)]


def recurrent_model():
    sequence, state = keras.Input((5, 3), name="sequence"), keras.Input((4,), name="state")
    y = layers.GRU(4, return_sequences=True, name="gru")(sequence, initial_state=state)
    y = layers.Bidirectional(layers.LSTM(3), name="both")(y)
    return keras.Model([sequence, state], y), [(2, 5, 3), (2, 4)]


def masked_model():
    tokens, mask = keras.Input((5, 3)), keras.Input((5,), dtype="bool")
    y = layers.LSTM(4, name="lstm")(tokens, mask=mask)
    return keras.Model([tokens, mask], y), [(2, 5, 3), (2, 5)]


def operations_model():
    x = keras.Input((4, 6))
    parts = keras.ops.split(x, 3, axis=-1)
    y = keras.ops.stack([parts[2], parts[0] * 2 - 1], axis=1)
    y = keras.ops.einsum("bijk,bkl->bijl", y, keras.ops.transpose(parts[1], (0, 2, 1)))
    y = keras.ops.where(y > 0, y, keras.ops.exp(y))[:, 0, ..., ::2]
    return keras.Model(x, {"out": keras.ops.mean(y, axis=-1, keepdims=True)}), [(2, 4, 6)]


def passing_model():
    x = keras.Input((3,))
    y = layers.Dense(3, name="d")(x)
    return keras.Model(x, [x, y, y]), [(2, 3)]


FORMS = [attention_model, recurrent_model, masked_model, operations_model, passing_model]


@pytest.mark.parametrize("make", FORMS)
def test_calls_of_every_form_are_rebuilt(make):
    model, shapes = make()
    random = np.random.default_rng(0)
    x = [random.normal(size=shape).astype("float32") for shape in shapes]
    x = [np.abs(a) > 0.1 if t.dtype == "bool" else a for a, t in zip(x, model.inputs, strict=True)]
    rebuilt = Graph.read(model).build()
    assert operation_names(rebuilt) == operation_names(model)
    assert_same_outputs(rebuilt, model, x if len(x) > 1 else x[0])


def test_training_argument_of_a_call_is_kept():
    x = keras.Input((200,))
    model = keras.Model(x, layers.Dropout(0.5, seed=1, name="always")(x, training=True))
    rebuilt = Graph.read(model).build()
    ones = np.ones((1, 200), "float32")
    # The state of the seed is carried over, so that the next draw is the same.
    np.testing.assert_array_equal(np.asarray(rebuilt(ones)), np.asarray(model(ones)))
    assert (np.asarray(rebuilt(ones)) == 0).any()


@keras.saving.register_keras_serializable("tfaccel_tests")
class Block(layers.Layer):
    """A user's layer without build(), with layers inside."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first, self.second = layers.Dense(units), layers.Dense(units)

    def call(self, inputs):
        return self.second(self.first(inputs))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def test_custom_layer_with_frozen_parts():
    x = keras.Input((3,))
    block = Block(4, name="block")
    model = keras.Model(x, block(x))
    block.first.trainable = False
    rebuilt = Graph.read(model).build()
    assert_same_outputs(rebuilt, model, np.ones((2, 3), "float32"))
    assert not rebuilt.get_layer("block").first.trainable
    assert len(rebuilt.trainable_variables) == 2


def test_layer_that_cannot_be_copied_is_one_clear_error():
    class Secret(layers.Layer):
        def __init__(self, function, **kwargs):
            super().__init__(**kwargs)
            self.function = function

        def call(self, inputs):
            return self.function(inputs)

    x = keras.Input((3,))
    model = keras.Model(x, Secret(lambda t: t, name="secret")(x))
    with pytest.raises(ValueError, match=r"Secret 'secret' cannot be copied.*get_config\(\)"):
        Graph.read(model).build()


def test_policies_integer_inputs_and_frozen_layers_are_kept():
    tokens = keras.Input((4,), dtype="int32", name="tokens")
    y = layers.Embedding(7, 3, dtype="mixed_bfloat16", name="embedding")(tokens)
    y = layers.Dense(2, dtype="mixed_float16", trainable=False, name="dense")(y)
    rebuilt = Graph.read(keras.Model(tokens, y)).build()
    assert rebuilt.inputs[0].dtype == "int32"
    assert rebuilt.get_layer("embedding").compute_dtype == "bfloat16"
    assert rebuilt.get_layer("dense").compute_dtype == "float16"
    assert not rebuilt.get_layer("dense").trainable


# Classes of models


def test_sequential_stays_sequential_while_a_chain():
    model = keras.Sequential(
        [keras.Input((4,), name="in"), layers.Dense(3, name="a"), layers.Dropout(0.1, name="b")],
        name="chain",
    )
    graph = Graph.read(model)
    graph.insert_after(graph.nodes[1].outputs[0], layers.ReLU(name="relu"))
    rebuilt = graph.build()
    assert type(rebuilt) is keras.Sequential
    assert rebuilt.name == "chain"
    assert [x.name for x in rebuilt.layers] == ["a", "relu", "b"]
    x = np.ones((2, 4), "float32")
    expected = np.maximum(flat_outputs(model, x)[0], 0)
    np.testing.assert_array_equal(flat_outputs(rebuilt, x)[0], expected)


class Counting(keras.Model):
    """A Functional model with a training step of its own."""

    def train_step(self, data):
        return {"answer": 42.0}


class Odd(keras.Model):
    """A Functional model that is made in another way."""

    def __init__(self, units):
        x = keras.Input((3,))
        super().__init__(x, layers.Dense(units)(x))


def test_class_of_a_functional_subclass_is_kept_or_refused():
    x = keras.Input((3,))
    assert type(Graph.read(Counting(x, layers.Dense(2)(x))).build()) is Counting
    with pytest.raises(TypeError, match=r"is a Odd.*constructor does not take \(inputs, outputs"):
        Graph.read(Odd(2)).build()


def test_model_from_the_middle_of_another():
    x = keras.Input((3,))
    a = layers.Dense(4, name="a")(x)
    whole = keras.Model(x, layers.Dense(2, name="b")(a))
    tail = keras.Model(a, whole.output)
    inputs = np.ones((2, 4), "float32")
    assert_same_outputs(Graph.read(tail).build(), tail, inputs)


def test_nested_model_that_is_shared_stays_shared():
    x, y = keras.Input((3,)), keras.Input((3,))
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(3, name="dense")], name="inner")
    model = keras.Model([x, y], inner(x) + inner(inner(y)))
    doubled = map_models(
        model,
        lambda g: [
            g.insert_after(g.calls(n.layer)[0].outputs[0], layers.Rescaling(2.0, name="twice"))
            for n in list(g.nodes)
            if n.name == "dense"
        ],
    )
    assert len([layer for layer in flat_layers(doubled) if layer.name == "twice"]) == 1
    a, b = np.ones((1, 3), "float32"), np.full((1, 3), 2, "float32")
    w, c = (np.asarray(v) for v in inner.get_layer("dense").weights)

    def f(v):
        return 2 * (v @ w + c)

    np.testing.assert_allclose(flat_outputs(doubled, [a, b])[0], f(a) + f(f(b)), rtol=1e-5)


# Reading and edits


def small_graph():
    x = keras.Input((8, 8, 3), name="in")
    y = layers.Conv2D(4, 3, name="conv_1")(x)
    y = layers.ReLU(name="relu_1")(layers.BatchNormalization(name="norm_1")(y))
    z = layers.Conv2D(4, 3, padding="same", name="conv_2")(y)
    z = layers.ReLU(name="relu_2")(z)
    return Graph.read(keras.Model(x, layers.Add(name="sum")([y, z]), name="small"))


def names(chain):
    return [node.name if node else None for node in chain]


def test_match_finds_chains_with_optional_steps():
    found = match(
        small_graph(), [layers.Conv2D, optional(layers.BatchNormalization), optional(layers.ReLU)]
    )
    assert [names(c) for c in found] == [
        ["conv_1", "norm_1", "relu_1"],
        ["conv_2", None, "relu_2"],
    ]


def test_match_stops_where_a_value_is_read_twice_or_given_out():
    x = keras.Input((3,))
    y = layers.Dense(3, name="d")(x)
    z = layers.ReLU(name="r")(y)
    twice = Graph.read(keras.Model(x, layers.Add()([y, z])))
    given_out = Graph.read(keras.Model(x, [y, z]))
    for graph in (twice, given_out):
        assert match(graph, [layers.Dense, layers.ReLU]) == []


def test_match_takes_predicates_and_types_and_does_not_overlap():
    x = keras.Input((3,))
    y = x
    for number in range(5):
        y = layers.ReLU(name=f"r{number}")(y)
    graph = Graph.read(keras.Model(x, y))
    pairs = match(graph, [(layers.ReLU, layers.Dense), lambda node: node.name != "r9"])
    assert [names(c) for c in pairs] == [["r0", "r1"], ["r2", "r3"]]
    for pattern in ([], [optional(layers.ReLU)]):
        with pytest.raises(ValueError, match="A pattern begins with a step"):
            match(graph, pattern)


def test_insert_before_changes_one_use_only():
    graph = small_graph()
    (add,) = [node for node in graph.nodes if node.name == "sum"]
    shared = add.inputs[0]
    graph.insert_before(add, shared, layers.Rescaling(0.0, name="zero"))
    model = graph.build()
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype("float32")
    relu = keras.Model(model.input, model.get_layer("relu_2").output)
    np.testing.assert_array_equal(flat_outputs(model, x)[0], flat_outputs(relu, x)[0])


def test_what_no_output_needs_any_more_is_gone():
    graph = small_graph()
    (add,) = [node for node in graph.nodes if node.name == "sum"]
    cut = layers.Identity(name="cut")
    graph.insert_before(add, add.inputs[1], cut)
    (node,) = graph.calls(cut)
    node.args = (add.inputs[0],)
    assert "conv_2" not in operation_names(graph.build())


def test_queries():
    graph = small_graph()
    (conv,) = [node for node in graph.nodes if node.name == "conv_1"]
    assert conv.inputs == graph.inputs
    assert graph.producer(conv.outputs[0]) is conv
    assert names(graph.consumers(conv.outputs[0])) == ["norm_1"]
    assert graph.is_output(graph.nodes[-1].outputs[0])
    assert not graph.is_output(conv.outputs[0])
    assert graph.layers()[0].name == "conv_1"
    assert conv.outputs[0].shape == (None, 6, 6, 4)


def test_wrong_edits_are_errors():
    graph = small_graph()
    (add,) = [node for node in graph.nodes if node.name == "sum"]
    with pytest.raises(ValueError, match="No call of layer 'other' is in the graph of 'small'"):
        graph.replace_layer(layers.ReLU(name="other"), layers.ReLU())
    with pytest.raises(ValueError, match="'sum' has 2 inputs and 1 outputs"):
        graph.remove(add)
    graph.insert_after(add.outputs[0], layers.ReLU(name="conv_1"))
    with pytest.raises(ValueError, match="there are several named 'conv_1'"):
        graph.build()


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (None, TypeError, r"Graph.read\(\) needs a keras.Model, but got NoneType"),
        ("m.keras", TypeError, r"but got str\. Load a file first"),
        (Subclassed(), TypeError, "subclassed Subclassed, which has no graph"),
        (keras.Sequential([layers.Dense(2)]), ValueError, "has no weights yet"),
        (keras.Sequential(), ValueError, "has no weights yet"),
    ],
)
def test_what_has_no_graph_is_refused(model, error, message):
    with pytest.raises(error, match=message):
        Graph.read(model)


def test_sequential_built_by_its_first_batch_is_read():
    model = keras.Sequential([layers.Dense(3, name="a"), layers.Dense(2, name="b")])
    x = np.ones((2, 4), "float32")
    model(x)
    assert_same_outputs(Graph.read(model).build(), model, x)
