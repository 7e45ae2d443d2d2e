"""Copies of layers, state and all, by way of the rebuilt model; and the class of that model."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.comparing import assert_same_outputs, fingerprint
from tfaccel.core.cloning import clone_built, clone_operation, copy_state
from tfaccel.core.graph import Graph

random = np.random.default_rng(0)


def model_of(*stack, shape=(3,), **options):
    x = y = keras.Input(shape, **options)
    for layer in stack:
        y = layer(y)
    return keras.Model(x, y)


def assert_rebuilt_alike(model, x):
    """Three calls, since states may move; then all state is the same, and the first untouched."""
    before = fingerprint(model)
    rebuilt = Graph.read(model).build()
    assert fingerprint(model) == before
    for training in (False, True, False):
        assert_same_outputs(rebuilt, model, x, training)
    after = fingerprint(rebuilt)
    assert after["values"] == fingerprint(model)["values"]
    assert (after["trainable"], after["flags"]) == (before["trainable"], before["flags"])
    return rebuilt


# State


def test_what_was_drawn_and_averaged_goes_on():
    model = model_of(
        layers.Dense(40), layers.BatchNormalization(), layers.Dropout(0.5), layers.GaussianNoise(1)
    )
    for _ in range(3):
        model(random.normal(2, 3, (4, 3)), training=True)
    assert_rebuilt_alike(model, random.normal(size=(4, 3)).astype("float32"))


def test_states_of_recurrent_layers_go_on():
    model = model_of(
        layers.LSTM(4, stateful=True, return_sequences=True),
        layers.Bidirectional(layers.GRU(2, stateful=True, return_sequences=True)),
        layers.RNN([layers.LSTMCell(3), layers.GRUCell(4, dropout=0.4)], stateful=True),
        shape=(5, 3),
        batch_size=2,
    )
    x = random.normal(size=(2, 5, 3)).astype("float32")
    first = np.asarray(model(x))
    assert_rebuilt_alike(model, x)
    assert not np.array_equal(first, np.asarray(model(x)))


def test_what_adapt_learned_is_carried_over():
    normalization = layers.Normalization()
    normalization.adapt(random.normal(3, 2, (50, 3)).astype("float32"))
    bins = layers.Discretization(num_bins=4)
    bins.adapt(random.normal(size=(50,)).astype("float32"))
    model = model_of(normalization, layers.Dense(4), bins)
    assert_rebuilt_alike(model, random.normal(3, 2, (4, 3)).astype("float32"))


def adapted_lookups():
    import tensorflow as tf

    if not keras.version().startswith("3.12"):  # which cannot load it either
        words = layers.StringLookup(output_mode="tf_idf")
        words.adapt(["cat", "dog", "dog", "owl"])
        yield words, "string", tf.constant([["dog"], ["cat"], ["yak"]])
    text = layers.TextVectorization(output_sequence_length=3)
    text.adapt(["the cat sat", "the dog"])
    yield text, "string", tf.constant([["the dog sat"], ["a cat"]])
    numbers = layers.IntegerLookup()
    numbers.adapt(np.array([3, 4, 4, 9]))
    yield numbers, "int64", np.array([[9], [4], [1]])


def test_vocabularies_are_carried_over():
    for layer, dtype, samples in adapted_lookups():
        model = model_of(layer, shape=(1,), dtype=dtype)
        rebuilt = Graph.read(model).build()
        assert_same_outputs(rebuilt, model, samples)
        assert len(np.unique(rebuilt(samples))) > 1


def test_low_rank_adapters_are_kept():
    dense = layers.Dense(5)
    model = model_of(dense)
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(random.normal(size=dense.lora_kernel_b.shape))
    rebuilt = assert_rebuilt_alike(model, np.ones((2, 3), "float32"))
    assert len(rebuilt.trainable_weights) == 3


# Flags and types


class Block(layers.Layer):
    """A user's layer, not registered, without build(), with layers inside."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first, self.second = layers.Dense(units), layers.Dense(units)

    def call(self, inputs):
        return self.second(self.first(inputs))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def freeze_layer(block):
    block.trainable = False


def freeze_part(block):
    block.first.trainable = False


def thaw_part(block):
    block.trainable = False
    block.second.trainable = True


def freeze_variable(block):
    block.first.bias.trainable = False


def thaw_variable(block):
    block.trainable = False
    block.second.bias.trainable = True


@pytest.mark.parametrize(
    "change", [freeze_layer, freeze_part, thaw_part, freeze_variable, thaw_variable]
)
def test_trainable_flags_of_layers_parts_and_variables_are_kept(change):
    block = Block(4)
    model = model_of(block, layers.Dense(2))
    change(block)
    rebuilt = assert_rebuilt_alike(model, np.ones((2, 3), "float32"))
    assert len(rebuilt.trainable_weights) == len(model.trainable_weights) < 6


def test_policies_integer_inputs_and_frozen_layers_are_kept():
    tokens = keras.Input((4,), dtype="int32", name="tokens")
    y = layers.Embedding(7, 3, dtype="mixed_bfloat16", name="embedding")(tokens)
    y = layers.Dense(2, dtype="mixed_float16", trainable=False, name="dense")(y)
    y = layers.Activation("softmax", dtype="float32", name="softmax")(y)
    model = keras.Model(tokens, y)
    rebuilt = assert_rebuilt_alike(model, random.integers(0, 7, (2, 4)).astype("int32"))
    assert rebuilt.inputs[0].dtype == "int32"
    assert rebuilt.get_layer("embedding").compute_dtype == "bfloat16"
    assert rebuilt.get_layer("dense").compute_dtype == "float16"
    assert rebuilt.get_layer("dense").variable_dtype == "float32"
    assert not rebuilt.get_layer("dense").trainable


# Layers of users


class Taught(layers.Layer):
    """A layer whose weights follow from its build config alone."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.rows = 1

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(self.rows, input_shape[-1]))

    def get_build_config(self):
        return {"rows": self.kernel.shape[0], "columns": self.kernel.shape[1]}

    def build_from_config(self, config):
        self.rows = config["rows"]
        self.build((None, config["columns"]))

    def call(self, inputs):
        return inputs * keras.ops.sum(self.kernel, 0)


def test_layer_that_says_how_it_is_built_is_built_so():
    taught = Taught()
    taught.rows = 5
    rebuilt = assert_rebuilt_alike(model_of(taught), np.ones((2, 3), "float32"))
    assert [tuple(v.shape) for v in rebuilt.weights] == [(5, 3)]


def double(x):
    return 2 * x


class Cell(layers.Layer):
    def __init__(self, units, function=None, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = units
        self.function = function

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], self.units))

    def call(self, inputs, states):
        output = keras.ops.tanh(keras.ops.matmul(inputs, self.kernel) + states[0])
        return output, [output]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class Ones(keras.initializers.Initializer):
    def __call__(self, shape, dtype=None):
        return keras.ops.ones(shape, dtype)


def test_what_layers_hold_need_not_be_registered():
    factor = 3.0
    model = model_of(
        layers.Dense(4, activation=double, kernel_initializer=Ones()),
        layers.Lambda(lambda x: keras.ops.relu(x) * factor),
        layers.TimeDistributed(keras.Sequential([layers.Dense(3, activation=double)])),
        layers.RNN(Cell(2)),
        shape=(5, 3),
    )
    assert_rebuilt_alike(model, np.ones((2, 5, 3), "float32"))
    assert "double" not in keras.saving.get_custom_objects()
    lambdas = keras.saving.serialize_keras_object(model.layers[2])
    with pytest.raises((ValueError, TypeError), match=r"lambda|deserializ"):  # elsewhere, as ever
        keras.saving.deserialize_keras_object(lambdas)


class OwnLambda(layers.Layer):
    """A layer whose lambda holds the layer itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(2)
        self.run = lambda x: self.dense(2 * x)

    def call(self, inputs):
        return self.run(inputs)


def test_lambda_that_holds_its_layer_is_not_carried_over():
    model = model_of(OwnLambda())
    rebuilt = assert_rebuilt_alike(model, np.ones((2, 3), "float32"))
    rebuilt.set_weights([np.zeros_like(w) for w in rebuilt.get_weights()])
    assert not np.asarray(rebuilt(np.ones((2, 3)))).any()
    assert np.asarray(model(np.ones((2, 3)))).any()


class Secret(layers.Layer):
    """A layer whose config lacks an argument."""

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = size

    def call(self, inputs):
        return inputs

    def get_config(self):
        return super().get_config()


class Growing(layers.Layer):
    """A layer that has more weights than its config says."""

    def __init__(self, size=1, **kwargs):
        super().__init__(**kwargs)
        self.size = size

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(self.size,))

    def call(self, inputs):
        return inputs + keras.ops.sum(self.kernel)

    def get_config(self):
        return super().get_config()


def test_layer_that_cannot_be_copied_is_one_clear_error():
    with pytest.raises(ValueError, match=r"'secret' cannot be copied.*'size'.*get_config\(\)"):
        Graph.read(model_of(Secret(3, name="secret"))).build()
    with pytest.raises(
        ValueError, match=r"'growing'.*\[\(1,\)\] against \[\(3,\)\].*complete get_"
    ):
        Graph.read(model_of(Growing(3, name="growing"))).build()


def test_copies_of_single_layers():
    dense = layers.Dense(2, name="dense")
    dense.build((None, 3))
    dense.bias.trainable = False
    assert not clone_operation(dense).built
    copy = clone_built(dense)
    assert copy.name == "dense"
    assert [v.trainable for v in copy.weights] == [True, False]
    copy.kernel.assign(keras.ops.zeros((3, 2)))
    assert np.asarray(dense.kernel).any()
    copy_state(dense, copy)
    np.testing.assert_array_equal(np.asarray(copy.kernel), np.asarray(dense.kernel))


# Classes of models


class Counting(keras.Model):
    """A Functional model with a training step of its own."""

    def train_step(self, data):
        return {"answer": 42.0}


class CountingChain(keras.Sequential):
    """A Sequential model with a training step of its own."""

    def train_step(self, data):
        return {"answer": 42.0}


class Odd(keras.Model):
    """A Functional model that is made in another way."""

    def __init__(self, units):
        x = keras.Input((3,))
        super().__init__(x, layers.Dense(units)(x))


class Weighted(keras.Model):
    """A Functional model whose config lacks an argument."""

    def __init__(self, *args, weight=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = weight


class OddChain(keras.Sequential):
    """A Sequential model that is made in another way."""

    def __init__(self, units):
        super().__init__([keras.Input((3,)), layers.Dense(units)])


def test_class_of_a_subclass_is_kept():
    x = keras.Input((3,))
    made = [Counting(x, layers.Dense(2)(x)), CountingChain([keras.Input((3,)), layers.Dense(2)])]
    for model in made:
        rebuilt = Graph.read(model).build()
        assert type(rebuilt) is type(model)
        rebuilt.compile("sgd", "mse")
        assert rebuilt.train_on_batch(np.ones((2, 3)), np.ones((2, 2)), return_dict=True) == {
            "answer": 42.0
        }


def test_class_that_is_made_in_another_way_is_refused():
    x = keras.Input((3,))
    for model in (Odd(2), Weighted(x, layers.Dense(2)(x), weight=3.0)):
        with pytest.raises(TypeError, match=r"constructor does not take \(inputs, outputs, name\)"):
            Graph.read(model).build()
    with pytest.raises(
        TypeError, match=r"is a OddChain.*does not take \(layers, trainable, name\)"
    ):
        Graph.read(OddChain(2)).build()
    graph = Graph.read(CountingChain([keras.Input((3,)), layers.Dense(3, name="only")]))
    (node,) = graph.calls(graph.layers()[0])
    graph.remove(node)
    with pytest.raises(TypeError, match=r"CountingChain.*is no chain.*train_step, would be lost"):
        graph.build()


def test_policy_and_flag_of_the_model_itself_are_kept_and_compilation_is_not():
    x = keras.Input((3,))
    model = keras.Model(x, layers.Dense(2)(layers.Dense(4, name="thawed")(x)))
    model.dtype_policy = keras.DTypePolicy("mixed_float16")  # what compile() goes by
    model.compile("sgd", "mse")
    model.trainable = False
    model.get_layer("thawed").trainable = True
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        rebuilt = Graph.read(model).build()
    finally:
        keras.config.set_dtype_policy("float32")
    assert rebuilt.dtype_policy.name == "mixed_float16"
    assert not rebuilt.compiled
    assert rebuilt.trainable_variables == []  # as Keras says of any model that is frozen itself
    assert fingerprint(rebuilt)["trainable"] == [True, True, False, False]
    assert [layer.compute_dtype for layer in rebuilt.layers[1:]] == ["float32"] * 2
    assert [tensor.dtype for tensor in (*rebuilt.inputs, *rebuilt.outputs)] == ["float32"] * 2
