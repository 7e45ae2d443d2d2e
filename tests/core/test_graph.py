"""Read, match, edit, rebuild: what comes back is what went in, or the edit and no more."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tests.comparing import assert_same_outputs, fingerprint, flat_outputs, operation_names
from tests.contracts.tables import convolutional, make_data
from tests.core.call_forms import FORMS
from tests.random_models import random_inputs, random_model
from tfaccel.core import keras_private
from tfaccel.core.graph import Graph, flat_layers, map_models

seeds = st.integers(0, 2**20)


# For all models


@settings(max_examples=25)
@given(seeds)
def test_rebuilding_unedited_changes_nothing(seed):
    model, x = (made := random_model(seed)), random_inputs(made, seed)
    before = fingerprint(model)
    rebuilt = Graph.read(model).build()
    assert fingerprint(model) == before
    assert operation_names(rebuilt) == operation_names(model)
    assert rebuilt.name == model.name
    assert [tensor.name for tensor in rebuilt.inputs] == [tensor.name for tensor in model.inputs]
    keras.tree.assert_same_structure(model.input, rebuilt.input)
    keras.tree.assert_same_structure(model.output, rebuilt.output)
    ours = set(map(id, keras_private.sublayers(rebuilt)))
    assert not ours & set(map(id, keras_private.sublayers(model)))
    for training in (False, True):  # dropout draws the same numbers, batch norm moves alike
        assert_same_outputs(rebuilt, model, x, training)
    after, ours = fingerprint(model), fingerprint(rebuilt)
    assert ours["values"] == after["values"]
    assert ours["trainable"] == before["trainable"]
    assert ours["flags"] == before["flags"]


@settings(max_examples=8)
@given(seeds)
def test_rebuilt_model_survives_save_and_load(tmp_path_factory, seed):
    model = random_model(seed)
    path = tmp_path_factory.mktemp("graph") / "model.keras"
    Graph.read(model).build().save(path)
    loaded = keras.saving.load_model(path)
    assert operation_names(loaded) == operation_names(model)
    assert_same_outputs(loaded, model, random_inputs(model, seed))


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


@pytest.mark.parametrize("make", FORMS)
def test_calls_of_every_form_are_rebuilt(make):
    model = make()
    x = random_inputs(model, 0)
    before = fingerprint(model)
    rebuilt = Graph.read(model).build()
    assert fingerprint(model) == before
    assert type(rebuilt) is type(model)
    assert operation_names(rebuilt) == operation_names(model)
    for training in (False, True, False):
        assert_same_outputs(rebuilt, model, x, training)


def test_inputs_that_are_sparse_or_optional_stay_so():
    class Shift(layers.Layer):
        def call(self, inputs, bias=None):
            return inputs if bias is None else inputs + bias

    x = keras.Input((3,), name="x")
    bias = keras.Input((3,), optional=True, name="bias")
    rebuilt = Graph.read(keras.Model([x, bias], Shift()(x, bias))).build()
    assert [layer.optional for layer in rebuilt.layers[:2]] == [False, True]
    ones = np.ones((2, 3), "float32")
    np.testing.assert_array_equal(np.asarray(rebuilt([ones, None])), ones)
    x = keras.Input((3,), sparse=True)
    assert Graph.read(keras.Model(x, layers.Dense(2)(x))).build().inputs[0].sparse


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


def test_model_from_the_middle_of_another():
    x = keras.Input((3,))
    a = layers.Dense(4, name="a")(x)
    whole = keras.Model(x, layers.Dense(2, name="b")(a))
    tail = keras.Model(a, whole.output)
    head = keras.Model(whole.input, [whole.get_layer("a").output, a * 2])
    for part in (tail, head):
        assert_same_outputs(Graph.read(part).build(), part, random_inputs(part, 0))


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


def models_that_share():
    """A layer and a model that stand in several models at once."""
    dense, inner_in = layers.Dense(4, name="dense"), keras.Input((4,))
    inner = keras.Model(inner_in, layers.ReLU(name="relu")(dense(inner_in)), name="inner")
    middle_in, x = keras.Input((4,)), keras.Input((4,))
    middle = keras.Model(middle_in, inner(inner(middle_in)) + 1.0, name="middle")
    return keras.Model(x, middle(dense(x)) + inner(x), name="outer")


@pytest.mark.parametrize("mapped", [False, True])
def test_what_several_models_share_stays_shared(mapped):
    model = models_that_share()
    rebuilt = map_models(model, lambda graph: None) if mapped else Graph.read(model).build()
    assert_same_outputs(rebuilt, model, random_inputs(model, 0))
    assert len(rebuilt.weights) == 2
    inner = rebuilt.get_layer("inner")
    assert rebuilt.get_layer("middle").get_layer("inner") is inner
    assert rebuilt.get_layer("dense") is inner.get_layer("dense")


def test_model_that_several_models_share_is_edited_once():
    edited = []
    model = models_that_share()

    def halve(graph):
        edited.append(graph.model.name)
        for layer in graph.layers():
            if layer.name == "relu":
                after = graph.calls(layer)[0].outputs[0]
                graph.insert_after(after, layers.Rescaling(0.5, name="half"))

    rebuilt = map_models(model, halve)
    assert edited == ["inner", "middle", "outer"]
    x = random_inputs(model, 0)
    kernel, bias = (np.asarray(v) for v in model.weights)

    def inner(v):
        return np.maximum(v @ kernel + bias, 0) / 2

    expected = inner(inner(x @ kernel + bias)) + 1 + inner(x)
    np.testing.assert_allclose(flat_outputs(rebuilt, x)[0], expected, rtol=1e-5)


# Reading and edits


def small_graph():
    x = keras.Input((8, 8, 3), name="in")
    y = layers.Conv2D(4, 3, name="conv_1")(x)
    y = layers.ReLU(name="relu_1")(layers.BatchNormalization(name="norm_1")(y))
    z = layers.Conv2D(4, 3, padding="same", name="conv_2")(y)
    z = layers.ReLU(name="relu_2")(z)
    return Graph.read(keras.Model(x, layers.Add(name="sum")([y, z]), name="small"))


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
    assert [node.name for node in graph.consumers(conv.outputs[0])] == ["norm_1"]
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
    other = small_graph()
    cases = [
        (lambda: graph.remove(other.nodes[1]), "'conv_1' is no call of the graph of 'small'"),
        (lambda: graph.remove(graph.nodes[0]), "'in' has 0 inputs and 1 outputs"),
        (lambda: graph.insert_after(other.outputs[0], layers.ReLU()), "is not of this graph"),
        (lambda: graph.insert_before(add, graph.inputs[0], layers.ReLU()), "'sum' does not read"),
        (lambda: graph.replace_layer("conv_1", layers.ReLU()), "No call of layer 'conv_1'"),
        (lambda: graph.insert_after(add.outputs[0], Twice()), "of one output.*'twice' has 2"),
    ]
    for edit, message in cases:
        with pytest.raises(ValueError, match=message):
            edit()
    for wrong in (keras.ops.relu, layers.ReLU, None):
        with pytest.raises(TypeError, match="layer must be Layer, but got"):
            graph.insert_after(add.outputs[0], wrong)
    assert len(graph.nodes) == len(other.nodes)  # what failed did nothing
    graph.insert_after(add.outputs[0], layers.ReLU(name="conv_1"))
    with pytest.raises(ValueError, match="there are several named 'conv_1'"):
        graph.build()


class Twice(layers.Layer):
    def call(self, inputs):
        return inputs, inputs


class Projection(layers.Layer):
    """A layer that does not say what shape it gives."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], 5))

    def call(self, inputs):
        return keras.ops.matmul(inputs, self.kernel)


def test_shape_and_type_after_an_inserted_layer_are_known_and_the_layer_is_not_touched():
    graph = small_graph()
    projection, cast = Projection(name="p"), layers.Activation("relu", dtype="float16", name="c")
    after = graph.insert_after(graph.outputs[0], projection)
    assert (after.shape, after.dtype) == ((None, 6, 6, 5), "float32")
    assert graph.insert_after(after, cast).dtype == "float16"
    assert not projection.built
    model = graph.build()
    assert model.output_shape == (None, 6, 6, 5)
    assert len(projection._inbound_nodes) == 1


def test_layer_of_the_model_itself_is_not_taken_for_a_new_one():
    graph = small_graph()
    model, before = graph.model, fingerprint(graph.model)
    relu = model.get_layer("relu_1")
    with pytest.raises(ValueError, match="'relu_1' is of the model 'small' already"):
        graph.replace_layer(model.get_layer("relu_2"), relu)
    with pytest.raises(ValueError, match="'relu_1' is of the model 'small' already"):
        graph.insert_after(graph.outputs[0], relu)
    graph.build()
    assert fingerprint(model) == before


def test_models_that_one_graph_builds_share_nothing():
    graph = small_graph()
    head = layers.Conv2D(2, 1, name="head")
    graph.insert_after(graph.outputs[0], head)
    first, second = graph.build(), graph.build(name="second")
    assert (first.name, second.name) == ("small", "second")
    assert first.get_layer("head") is head
    assert second.get_layer("head") is not head
    assert_same_outputs(first, second, random_inputs(first, 0))


def test_weights_come_with_the_replacement():
    graph = small_graph()
    (conv,) = [layer for layer in graph.layers() if layer.name == "conv_2"]
    weights = [np.zeros((3, 3, 4, 4)), np.full(4, 7.0)]
    graph.replace_layer(conv, layers.Conv2D(4, 3, padding="same", name="conv_2"), weights)
    model = graph.build()
    relu = keras.Model(model.input, model.get_layer("relu_2").output)
    np.testing.assert_array_equal(flat_outputs(relu, random_inputs(relu, 0))[0], 7.0)


def test_sequential_built_by_its_first_batch_is_read():
    model = keras.Sequential([layers.Dense(3, name="a"), layers.Dense(2, name="b")])
    x = np.ones((2, 4), "float32")
    model(x)
    assert_same_outputs(Graph.read(model).build(), model, x)


def test_chain_in_place_of_a_shared_layer():
    inputs = keras.Input((4,))
    shared = layers.Dense(4, name="shared")
    model = keras.Model(inputs, shared(shared(inputs) * 2.0))
    graph = Graph.read(model)
    chain = [layers.Dense(2, name="shared_in"), layers.Dense(4, name="shared")]
    for layer, width in zip(chain, (4, 2), strict=True):
        layer.build((None, width))
    graph.replace_by_chain(shared, chain)
    rebuilt = graph.build()
    (a, b), (c, d) = (layer.get_weights() for layer in chain)
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    expected = x
    for factor in (2.0, 1.0):
        expected = ((expected @ a + b) @ c + d) * factor
    np.testing.assert_allclose(rebuilt(x), expected, rtol=1e-5)
    assert len(rebuilt.weights) == 4
    assert [layer.name for layer in rebuilt.layers[1:]].count("shared") == 1


@pytest.mark.parametrize("chain", [[], [layers.Dense(4, name="other")]])
def test_chain_wants_layers_and_one_input(chain):
    inputs = keras.Input((4,))
    add = layers.Add()
    graph = Graph.read(keras.Model(inputs, add([inputs, inputs])))
    with pytest.raises(ValueError, match="replaces a layer of one input"):
        graph.replace_by_chain(add, chain)


def test_a_small_model_takes_the_place_of_a_call():
    model = convolutional()
    graph = Graph.read(model)
    (node,) = graph.calls(model.get_layer("pool"))
    entry = keras.Input(batch_shape=node.inputs[0].shape)
    scale = layers.Dense(8, use_bias=False, kernel_initializer="identity", name="scale")
    small = keras.Model(entry, keras.ops.mean(2.0 * scale(entry), axis=(1, 2)))
    made = graph.splice(node, small, node.inputs)
    assert [call.layer is scale for call in made] == [True, False, False]
    made[1].operation.name, made[2].operation.name = "twice", "mean"
    new = graph.build()
    x = make_data(4)[0]
    features = keras.Model(model.inputs[0], model.get_layer("pool").output)(x)
    logits = model.get_layer("logits")
    np.testing.assert_allclose(new(x), logits(2.0 * features), rtol=1e-5)


def test_models_that_do_not_fit_take_no_place():
    model = convolutional()
    graph = Graph.read(model)
    (node,) = graph.calls(model.get_layer("pool"))
    entries = [keras.Input((8, 8, 8)), keras.Input((8,))]
    small = keras.Model(entries, layers.GlobalAveragePooling2D()(entries[0]) + entries[1])
    with pytest.raises(ValueError, match=r"'pool' cannot give its place.*the model takes 2"):
        graph.splice(node, small, node.inputs)
    (other,) = Graph.read(model).calls(model.get_layer("pool"))
    lone = keras.Model(entries[0], layers.GlobalAveragePooling2D()(entries[0]))
    with pytest.raises(ValueError, match="must be of this graph"):
        graph.splice(other, lone, other.inputs)
