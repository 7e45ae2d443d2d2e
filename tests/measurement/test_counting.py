import keras
import numpy as np
import pytest
from keras import layers, ops

from tests.measurement.masks import Masked
from tests.measurement.tflite_samples import classifier, convert
from tfaccel.core.transforms import transform_model, weight_keys
from tfaccel.measurement import Counts, count, count_layers


def of_layer(layer, *shapes):
    inputs = [keras.Input(shape) for shape in shapes]
    return keras.Model(inputs, layer(*inputs))


def attention(layer):
    return lambda query, value: layer(query, value=value)


# Each figure is worked out by hand: outputs times products for each of them.
LAYERS = {
    "dense": (layers.Dense(3), [(5,)], 5 * 3),
    "dense on sequences": (layers.Dense(3), [(4, 5)], 4 * 5 * 3),
    "conv 1d causal": (layers.Conv1D(4, 3, padding="causal"), [(10, 2)], 10 * 4 * 3 * 2),
    "conv 2d strided": (
        layers.Conv2D(4, 3, strides=2, padding="same"),
        [(8, 8, 3)],
        (4 * 4) * 4 * 9 * 3,
    ),
    "conv 2d grouped": (layers.Conv2D(6, 3, groups=2), [(6, 6, 4)], (4 * 4) * 6 * 9 * 2),
    "conv 2d dilated": (layers.Conv2D(2, 3, dilation_rate=2), [(8, 8, 3)], (4 * 4) * 2 * 9 * 3),
    "conv 3d": (layers.Conv3D(2, 2), [(3, 4, 5, 2)], (2 * 3 * 4) * 2 * 8 * 2),
    "depthwise": (
        layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same"),
        [(8, 8, 3)],
        64 * 6 * 9,
    ),
    "depthwise 1d": (layers.DepthwiseConv1D(3), [(8, 3)], 6 * 3 * 3),
    "separable": (
        layers.SeparableConv2D(5, 3, depth_multiplier=2, padding="same"),
        [(8, 8, 3)],
        64 * (6 * 9 + 6 * 5),
    ),
    "separable 1d": (layers.SeparableConv1D(5, 3), [(8, 3)], 6 * (3 * 3 + 3 * 5)),
    "transposed": (layers.Conv2DTranspose(5, 3, strides=2), [(4, 4, 3)], 16 * 3 * 9 * 5),
    "einsum dense": (layers.EinsumDense("abc,cde->abde", (4, 2, 3)), [(4, 5)], 4 * 5 * 2 * 3),
    "einsum dense with dots": (layers.EinsumDense("...x,xy->...y", 3), [(4, 6, 5)], 4 * 6 * 5 * 3),
    "attention": (
        attention(layers.MultiHeadAttention(2, 3, value_dim=5)),
        [(4, 6), (7, 6)],
        # query, key, value, output projections; scores; weighted sum
        4 * 6 * 6 + 7 * 6 * 6 + 7 * 6 * 10 + 4 * 10 * 6 + 2 * 4 * 7 * 3 + 2 * 4 * 7 * 5,
    ),
    "attention over columns": (
        lambda x: layers.MultiHeadAttention(2, 3, attention_axes=(2,))(x, x),
        [(5, 4, 6)],
        5 * (4 * (4 * 6 * 6) + 2 * 2 * 4 * 4 * 3),
    ),
    "grouped query attention": (
        attention(layers.GroupQueryAttention(3, 4, 2)),
        [(4, 6), (7, 6)],
        4 * 6 * 12 + 2 * (7 * 6 * 6) + 4 * 12 * 6 + 2 * (4 * 4 * 7 * 3),
    ),
    "dot attention": (
        lambda query, value: layers.Attention()([query, value]),
        [(4, 6), (7, 6)],
        4 * 7 * 6 * 2,
    ),
    "dot layer": (lambda a, b: layers.Dot(axes=(2, 1))([a, b]), [(4, 6), (6, 5)], 4 * 5 * 6),
    "lstm": (layers.LSTM(6), [(5, 4)], 5 * 4 * (4 * 6 + 6 * 6)),
    "gru": (layers.GRU(6, return_sequences=True), [(5, 4)], 5 * 3 * (4 * 6 + 6 * 6)),
    "simple rnn": (layers.SimpleRNN(6), [(5, 4)], 5 * (4 * 6 + 6 * 6)),
    "stacked cells": (
        layers.RNN([layers.LSTMCell(6), layers.GRUCell(2)]),
        [(5, 4)],
        5 * (4 * (4 * 6 + 6 * 6) + 3 * (6 * 2 + 2 * 2)),
    ),
    "bidirectional": (
        layers.Bidirectional(layers.LSTM(6)),
        [(5, 4)],
        2 * 5 * 4 * (4 * 6 + 6 * 6),
    ),
    "conv lstm": (
        layers.ConvLSTM2D(3, 3, padding="same", return_sequences=True),
        [(5, 4, 4, 2)],
        5 * 16 * 4 * 9 * (2 * 3 + 3 * 3),
    ),
    "time distributed": (
        layers.TimeDistributed(layers.Conv2D(4, 3)),
        [(5, 6, 6, 2)],
        5 * 16 * 4 * 9 * 2,
    ),
    "wrapper": (layers.SpectralNormalization(layers.Dense(3)), [(5,)], 15),
    "matmul": (ops.matmul, [(4, 6), (6, 5)], 4 * 6 * 5),
    "einsum": (lambda a, b: ops.einsum("bij,bkj->bik", a, b), [(4, 6), (5, 6)], 4 * 5 * 6),
    "tensordot": (lambda a: ops.tensordot(a, ops.ones((6, 5)), 1), [(4, 6)], 4 * 6 * 5),
    "conv operation": (
        lambda x: ops.conv(x, ops.ones((3, 3, 2, 4)), padding="same"),
        [(5, 5, 2)],
        25 * 4 * 9 * 2,
    ),
    "no products": (
        lambda x: layers.GlobalAveragePooling2D()(
            layers.ReLU()(layers.BatchNormalization()(layers.MaxPooling2D()(x)))
        ),
        [(8, 8, 3)],
        0,
    ),
    "embedding": (layers.Embedding(10, 4), [(5,)], 0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_macs_by_hand(name):
    layer, shapes, macs = LAYERS[name]
    model = of_layer(layer, *shapes)
    assert count(model).macs == macs
    assert count(model).parameters == model.count_params()


def test_parameters_are_trainable_or_not():
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3), layers.BatchNormalization()])
    assert count(model) == Counts(5 * 3 + 3 + 4 * 3, 5 * 3 + 3 + 2 * 3, 15)
    model.layers[0].trainable = False
    assert count(model).trainable_parameters == 2 * 3


def nested_and_shared():
    shared = layers.Dense(5, name="shared")
    inner = keras.Sequential([keras.Input((5,)), layers.Dense(2, name="inside")], name="inner")
    inputs = keras.Input((5,))
    x = shared(shared(inputs))
    return keras.Model(inputs, layers.Concatenate(name="both")([inner(x), inner(inputs)]))


def test_shared_layers_have_their_parameters_once_and_their_macs_at_each_call():
    assert count(nested_and_shared()) == Counts(30 + 12, 30 + 12, 2 * 25 + 2 * 10)


def test_count_layers_flattens_and_adds_up():
    rows = {row.name: row for row in count_layers(nested_and_shared())}
    assert list(rows) == ["shared", "inside", "both"]
    assert (rows["shared"].parameters, rows["shared"].macs) == (30, 50)
    assert (rows["inside"].parameters, rows["inside"].macs) == (12, 20)
    assert (rows["both"].parameters, rows["both"].macs) == (0, 0)
    assert rows["both"].output_shape == (4,)
    assert rows["inside"].class_name == "Dense"


def test_a_nested_model_counts_for_what_it_is_called_on():
    inside = keras.Input((None, None, 3))
    inner = keras.Model(inside, layers.Conv2D(4, 1)(inside))
    inputs = keras.Input((6, 5, 3))
    assert count(keras.Model(inputs, inner(inputs))).macs == 30 * 12
    frames = keras.Input((7, 6, 5, 3))
    assert count(keras.Model(frames, layers.TimeDistributed(inner)(frames))).macs == 7 * 30 * 12


def test_open_sizes_need_the_shape_of_a_sample():
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, layers.Conv2D(4, 1)(inputs))
    assert count(model) == Counts(16, 16, None)
    assert count(model, input_shape=(6, 5, 3)).macs == 30 * 12
    assert count(model, input_shape=[(6, 5, 3)]).macs == 30 * 12
    with pytest.raises(ValueError, match="one shape for each of the 1 inputs"):
        count(model, input_shape=[(6, 5, 3), (1,)])


def test_a_fixed_batch_counts_for_one_sample():
    inputs = keras.Input(batch_shape=(8, 5))
    assert count(keras.Model(inputs, layers.Dense(3)(inputs))).macs == 15


@pytest.mark.parametrize(
    "layer",
    [
        layers.Dense(3),
        layers.LSTM(6),
        layers.Bidirectional(layers.GRU(6)),
        layers.TimeDistributed(layers.Dense(3)),
    ],
)
def test_masks_are_no_parameters(layer):
    model = of_layer(layer, (5, 4))
    plain = count(model)

    def rules(inner):
        return {key: Masked() for key in weight_keys(inner) if "kernel" in key}

    masked = transform_model(model, rules)
    assert masked.count_params() > model.count_params()
    assert count(masked) == plain
    assert count_layers(masked)[-1].class_name == type(layer).__name__


class Ranged(layers.Layer):
    """Holds what a technique needs and leaves nothing behind when it is stripped."""

    def build(self, _):
        self.range = self.add_weight(shape=(2,), name="range", trainable=False)

    def call(self, inputs):
        return inputs

    def strip_layer(self):
        return None


def test_layers_that_strip_leaves_out_have_no_parameters():
    inputs = keras.Input((5,))
    model = keras.Model(inputs, Ranged()(layers.Dense(3)(inputs)))
    assert count(model) == Counts(18, 18, 15)


class Block(layers.Layer):
    """Layers and bare products in a layer of the user's own."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.first, self.second = layers.Dense(width), layers.Dense(width)

    def build(self, input_shape):
        self.first.build(input_shape)
        self.second.build((*input_shape[:-1], self.width))
        self.matrix = self.add_weight(shape=(self.width, 2), name="matrix")

    def call(self, inputs, training=None):
        return ops.matmul(ops.relu(self.second(self.first(inputs))), self.matrix)

    def get_config(self):
        return {**super().get_config(), "width": self.width}


class Opaque(Block):
    def call(self, inputs):
        return inputs * float(ops.sum(inputs))

    def compute_output_shape(self, input_shape):
        return input_shape


class SelfCounted(Opaque):
    def count_macs(self, input_shape):
        return 1000 * input_shape[-1]


def test_a_layer_of_the_users_own_is_looked_into():
    model = of_layer(Block(3), (4, 5))
    names = [layer.name for layer in model.layers]
    assert count(model).macs == 4 * (5 * 3 + 3 * 3 + 3 * 2)
    assert [layer.name for layer in model.layers] == names
    assert model.layers[1].first._inbound_nodes == []  # counting has left no call behind


def test_what_cannot_be_looked_into_is_unknown_unless_it_says_so():
    assert count(of_layer(Opaque(3), (5,))).macs is None
    assert count(of_layer(SelfCounted(3), (5,))).macs == 5000


FILES = {
    "classifier": (classifier, 10368 + 864 + 24),
    "transposed": (
        lambda: of_layer(layers.Conv2DTranspose(5, 3, strides=2), (4, 4, 3)),
        16 * 3 * 9 * 5,
    ),
    "conv 3d": (lambda: of_layer(layers.Conv3D(2, 2), (3, 4, 5, 2)), (2 * 3 * 4) * 2 * 8 * 2),
    "matmul": (lambda: of_layer(ops.matmul, (4, 6), (6, 5)), 120),
    "lstm": (lambda: of_layer(layers.LSTM(6), (5, 4)), 5 * 4 * (4 * 6 + 6 * 6)),
    "gru": (
        lambda: of_layer(layers.GRU(6, reset_after=False), (5, 4)),
        5 * 3 * (4 * 6 + 6 * 6),
    ),
    # Without a loop the first state is known to be zero, and its product is left out.
    "gru unrolled": (
        lambda: of_layer(layers.GRU(6, reset_after=False, unroll=True), (5, 4)),
        5 * 3 * (4 * 6 + 6 * 6) - 3 * 6 * 6,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_tflite_file_has_the_macs_of_its_model(name, tmp_path):
    build, macs = FILES[name]
    model = build()
    random = np.random.default_rng(0)
    model.set_weights([random.normal(size=w.shape) for w in model.get_weights()])
    counts = count(convert(model, tmp_path / "m.tflite"))
    assert counts.macs == macs
    assert counts.trainable_parameters == 0
    assert counts.parameters == model.count_params()


@pytest.mark.parametrize("scheme", ["float16", "dynamic", "int8"])
def test_counts_do_not_depend_on_how_numbers_are_stored(scheme, tmp_path):
    path = convert(classifier(), tmp_path / "m.tflite", scheme=scheme)
    assert count(path) == Counts(168 + 60 + 28, 0, 11256)


def test_a_fixed_batch_in_a_file_counts_for_one_sample(tmp_path):
    assert count(convert(classifier(), tmp_path / "m.tflite", batch=4)).macs == 11256


def test_a_keras_file_counts_as_its_model(tmp_path):
    classifier().save(tmp_path / "m.keras")
    assert count(tmp_path / "m.keras") == Counts(256, 256, 11256)


class Own(keras.Model):
    def call(self, inputs):
        return inputs


@pytest.mark.parametrize("verb", [count, count_layers])
def test_models_without_a_graph_are_refused(verb):
    with pytest.raises(TypeError, match="subclassed"):
        verb(Own())
    with pytest.raises(ValueError, match="no weights yet"):
        verb(keras.Sequential([layers.Dense(3)]))


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        count(tmp_path / "missing.tflite")
    (tmp_path / "m.h5").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"reads \.keras or \.tflite files"):
        count(tmp_path / "m.h5")
    classifier().save(tmp_path / "m.keras")
    content = (tmp_path / "m.keras").read_bytes()
    (tmp_path / "m.keras").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"not a whole \.keras file"):
        count(tmp_path / "m.keras")
    whole = convert(classifier(), tmp_path / "m.tflite").read_bytes()
    (tmp_path / "m.tflite").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut off"):
        count(tmp_path / "m.tflite")
