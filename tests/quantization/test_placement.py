"""Where models are quantized, and that the artifact computes what was trained."""

import keras
import numpy as np
import pytest
from keras import layers

import tfaccel
from tests.contracts.tables import sequential
from tests.quantization.networks import (
    aware_network,
    calibrate,
    conv,
    images,
    network,
    steps_apart,
)
from tfaccel.core import Graph
from tfaccel.core.graph import flat_layers
from tfaccel.core.transforms import TransformedLayer
from tfaccel.export import audit, to_tflite
from tfaccel.export.packing import unpack
from tfaccel.measurement.flatbuffer import TFLiteFile
from tfaccel.quantization import Dequantize, FakeQuantize, plan, quantize_aware

# Some values are out of the ranges that were learnt, so that clipping is compared as well.
UNSEEN = 1.5 * images(64, seed=9)


def bn(x):
    return layers.BatchNormalization()(x)


def flat_dense(x, units=5, **options):
    return layers.Dense(units, **options)(layers.Flatten()(x))


def transposed(x):
    return bn(layers.Conv2DTranspose(4, 3)(x))


def sequence(x):
    return layers.Reshape((16, 12))(x)


# One operator behind the rounded image, besides such that hand integers on.
OPERATORS = {
    "conv": conv,
    "conv_relu": lambda x: conv(x, activation="relu"),
    "conv_relu6": lambda x: conv(x, activation="relu6"),
    "conv_bn": lambda x: bn(conv(x, use_bias=False)),
    "conv_bn_relu": lambda x: layers.ReLU()(bn(conv(x))),
    "conv_bn_relu6": lambda x: layers.ReLU(6.0)(bn(conv(x))),
    "conv_bn_activation": lambda x: layers.Activation("relu6")(bn(conv(x))),
    "conv_functional_relu": lambda x: keras.ops.relu(conv(x)),
    "strided_padded": lambda x: conv(layers.ZeroPadding2D()(x), strides=2),
    "dilated": lambda x: conv(x, dilation_rate=2),
    "grouped": lambda x: conv(x, 6, groups=3),
    "conv1d": lambda x: layers.Conv1D(4, 3)(sequence(x)),
    "depthwise_bn": lambda x: bn(layers.DepthwiseConv2D(3, depth_multiplier=2)(x)),
    "depthwise1d": lambda x: layers.DepthwiseConv1D(3)(sequence(x)),
    "transposed_bn": transposed,
    "transposed1d": lambda x: layers.Conv1DTranspose(4, 3, strides=2)(sequence(x)),
    "dense": lambda x: flat_dense(x, activation="relu"),
    "dense_bn": lambda x: bn(flat_dense(x)),
    "dense_on_sequence": lambda x: layers.Dense(5)(layers.Reshape((8, 24))(x)),
    "lone_bn": bn,
    "lone_bn_relu": lambda x: layers.ReLU()(bn(sequence(x))),
    "rescaling": layers.Rescaling(1 / 127.5, offset=-1.0),
    "relu": layers.ReLU(),
    "sigmoid": layers.Activation("sigmoid"),
    "tanh": layers.Activation("tanh"),
    "softmax": layers.Softmax(),
    "leaky_relu": layers.LeakyReLU(0.1),
    "hard_swish": layers.Activation("hard_swish"),
    "gelu": layers.Activation("gelu"),
    "sum": lambda x: x + x,
    "number": lambda x: 1.0 - 0.5 * x,
    "product": lambda x: layers.Multiply()([x, x]),
    "global_average": layers.GlobalAveragePooling2D(),
    "functional_mean": lambda x: keras.ops.mean(x, axis=(1, 2)),
    "max_pool": lambda x: layers.MaxPooling2D()(conv(x)),
    "global_max": lambda x: layers.GlobalMaxPooling2D()(conv(x)),
    "average_pool": lambda x: layers.AveragePooling2D(2)(conv(x)),
    "upsampling": lambda x: layers.UpSampling2D()(conv(x)),
    "cropping": lambda x: layers.Cropping2D(1)(conv(x)),
    "pad": lambda x: keras.ops.pad(conv(x), ((0, 0), (1, 1), (1, 1), (0, 0))),
    "slice": lambda x: conv(x)[:, 1:5, ::2],
}


def _residual(x):
    return layers.ReLU()(conv(x, 3, padding="same") + x)


def _concatenated(x):
    a = layers.ReLU()(bn(conv(x, padding="same")))
    return layers.Concatenate()([a, conv(x, 2, 1)])


def _concatenated_twice(x):
    a = layers.Concatenate()([conv(x, padding="same"), x])
    return layers.Concatenate()([a, conv(x, 2, 1)])


def _read_by_two_concatenations(x):
    a, b = conv(x, padding="same"), 5.0 * x
    c = layers.Concatenate()([a, b])
    return layers.Concatenate()([layers.Concatenate()([a, conv(x, 2, 1)]), c])


def _shuffled(x):
    x = conv(x, 8, padding="same")
    a, b = keras.ops.split(x, 2, axis=-1)
    x = layers.Concatenate()([a, conv(b, 4, 1, activation="relu")])
    x = layers.Permute((1, 2, 4, 3))(layers.Reshape((8, 8, 2, 4))(x))
    return layers.Reshape((8, 8, 8))(x)


def _squeeze_and_excite(x):
    x = conv(x, 4)
    s = layers.GlobalAveragePooling2D(keepdims=True)(x)
    s = conv(conv(s, 2, 1, activation="relu"), 4, 1, activation="sigmoid")
    return layers.Multiply()([x, s])


def _chosen_ranges_concatenated(x):
    makers = [
        layers.ReLU(),
        layers.LeakyReLU(0.1),
        layers.Activation("hard_swish"),
        layers.Activation("gelu"),
        layers.Activation("swish"),
        lambda y: y - 0.5,
        layers.MaxPooling2D(2, 1, padding="same"),
        layers.Activation("tanh"),
    ]
    return layers.Concatenate()([3.0 * x, *(make(conv(x, 2, 1)) for make in makers)])


# Some operators in a row.
COMPOSED = {
    "chosen_ranges_concatenated": _chosen_ranges_concatenated,
    "residual": _residual,
    "add_layer": lambda x: layers.Add()([conv(x, padding="same"), conv(x, size=1)]),
    "subtract": lambda x: layers.Subtract()([conv(x, padding="same"), conv(x, size=1)]),
    "concatenated": _concatenated,
    "concatenated_twice": _concatenated_twice,
    "two_concatenations": _read_by_two_concatenations,
    "means_concatenated": lambda x: layers.Concatenate()(
        [layers.GlobalAveragePooling2D()(conv(x)), layers.GlobalAveragePooling2D()(conv(x, 2))]
    ),
    "sigmoid_concatenated": lambda x: layers.Concatenate()(
        [conv(x, activation="sigmoid"), conv(x)]
    ),
    "shuffled": _shuffled,
    "squeeze_and_excite": _squeeze_and_excite,
    "separable": layers.SeparableConv2D(4, 3, activation="relu"),
    "swish": lambda x: layers.Activation("swish")(bn(conv(x))),
    "conv_softmax": lambda x: flat_dense(x, activation="softmax"),
    "leaky_relu_inside": lambda x: conv(x, activation=layers.LeakyReLU(0.1)),
    "preactivated": lambda x: conv(layers.ReLU()(bn(layers.MaxPooling2D()(conv(x)))), size=1),
}


def _attention(x):
    x = sequence(x)
    return layers.MultiHeadAttention(2, 4, value_dim=3)(x, layers.MaxPooling1D()(x))


def _recurrent(layer):
    return lambda x: layer(layers.Reshape((4, 48))(x))


# Layers that are written as several operators: what is one step off may be more behind the next.
WRITTEN_OUT = {
    "layer_norm": lambda x: layers.LayerNormalization()(sequence(x)),
    "layer_norm_of_images": lambda x: layers.LayerNormalization(scale=False)(conv(x)),
    "layer_norm_of_rows": lambda x: layers.LayerNormalization(center=False)(flat_dense(x, 16)),
    "attention": _attention,
    "lstm": _recurrent(layers.LSTM(5)),
    "lstm_sequences": _recurrent(layers.LSTM(5, return_sequences=True, go_backwards=True)),
    "gru": _recurrent(layers.GRU(5)),
    "gru_reset_before": _recurrent(layers.GRU(5, reset_after=False, use_bias=False)),
    "bidirectional": _recurrent(layers.Bidirectional(layers.LSTM(4, return_sequences=True))),
}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("body", OPERATORS.values(), ids=OPERATORS)
def test_operator_is_all_integers_and_within_one_step(body, tmp_path):
    model, aware = aware_network(body)
    assert not [d for d in plan(model) if d.action == "float"]
    artifact = to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8")
    assert artifact.float_tensors == ()
    _check_audit(artifact)
    assert steps_apart(artifact.path, aware, UNSEEN).max() <= 1.001


def _check_audit(artifact):
    assert artifact.audit.operators
    assert artifact.audit.missing == ()
    assert artifact.audit.max_steps <= 1.001


@pytest.mark.one_in(5)
@pytest.mark.parametrize("body", WRITTEN_OUT.values(), ids=WRITTEN_OUT)
def test_layer_of_many_operators_is_all_integers_and_each_within_one_step(body, tmp_path):
    model, aware = aware_network(body)
    assert not [d for d in plan(model) if d.action == "float"]
    artifact = to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8")
    assert artifact.float_tensors == ()
    _check_audit(artifact)
    apart = steps_apart(artifact.path, aware, UNSEEN)
    assert apart.max() <= 4.001
    assert (apart > 1.001).mean() <= 1e-2


@pytest.mark.one_in(6)
@pytest.mark.parametrize("body", COMPOSED.values(), ids=COMPOSED)
def test_composition_is_all_integers_and_close(body, tmp_path):
    model, aware = aware_network(body)
    assert not [d for d in plan(model) if d.action == "float"]
    artifact = to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8")
    assert artifact.float_tensors == ()
    _check_audit(artifact)
    apart = steps_apart(artifact.path, aware, UNSEEN)
    # A value in the middle between two steps may fall on either side; where the next operator's
    # steps are finer, one becomes several of those. Clipping and other mistakes hit many values.
    assert apart.max() <= 4.001
    assert (apart > 1.001).mean() <= 1e-3


def _normalized(x):
    return flat_dense(layers.GroupNormalization(4)(conv(x)))


def _three_terms(x):
    return conv(layers.Add()([x, conv(x, 3, padding="same"), conv(x, 3, 1)]))


def _read_by_both(x):
    x = layers.GroupNormalization(2)(conv(x))  # float, and the first of its readers is too
    return layers.Concatenate()([layers.Activation("softplus")(x), conv(x, 4, 1)])


def _shared_norm(x):
    norm = layers.BatchNormalization()
    return layers.Add()([norm(conv(x)), norm(conv(x))])


def _resized(x):
    return conv(layers.UpSampling2D(interpolation="bilinear")(conv(x)))


# What must stay in float, though the converter has integers for it or for parts of it.
UNCOVERED = {
    "softplus": (lambda x: conv(conv(x, activation="softplus")), "activation softplus"),
    "group_norm": (_normalized, "GroupNormalization is not covered"),
    "maximum": (lambda x: conv(layers.Maximum()([x, conv(x, 3, 1)])), "Maximum is not"),
    "stack": (lambda x: keras.ops.stack([3.0 * x, conv(x, 3, 1)], axis=-1), "Stack is not"),
    "three_terms": (_three_terms, "Add of an array"),
    "array": (lambda x: conv(x) * np.array([1, 9, 0.1, 3], "float32"), "Multiply of an array"),
    "bilinear": (_resized, "with these"),
    "relu_to_one": (lambda x: conv(layers.ReLU(1.0)(conv(x))), "ReLU with these arguments"),
    "norm_of_rows": (lambda x: bn(flat_dense(x, activation="relu")), "cannot be folded"),
    "both": (_read_by_both, "not covered yet"),
    "shared_norm": (_shared_norm, "cannot be folded"),
}


@pytest.mark.one_in(6)
@pytest.mark.parametrize(("body", "reason"), UNCOVERED.values(), ids=UNCOVERED)
def test_what_is_not_covered_stays_float_is_named_and_agrees(body, reason, tmp_path):
    model, aware = aware_network(body)
    decisions = [d for d in plan(model) if d.action == "float"]
    assert decisions
    assert all(reason in d.reason for d in decisions)
    artifact = to_tflite(aware, tmp_path / "m.tflite")
    assert artifact.float_tensors
    apart = steps_apart(artifact.path, aware, UNSEEN)
    assert (apart > 1.5).mean() <= 5e-3
    assert apart.max() <= 8


def _float_constants(path):
    flatbuffer = unpack(path.read_bytes())
    return [
        np.frombuffer(bytes(flatbuffer.buffers[tensor.buffer].data), "float32").reshape(
            tensor.shape
        )
        for tensor in flatbuffer.subgraphs[0].tensors
        if tensor.type == 0 and flatbuffer.buffers[tensor.buffer].data is not None
    ]


def test_excluded_layer_keeps_its_float_weights_in_the_file(tmp_path):
    # It stands between integers, where the converter would round weights that never trained for it.
    aware = calibrate(quantize_aware(sequential(), exclude="hidden"))
    path = to_tflite(aware, tmp_path / "m.tflite").path
    kernel = np.asarray(aware.get_layer("hidden").kernel).T
    assert any(np.array_equal(c, kernel) for c in _float_constants(path) if c.shape == kernel.shape)
    apart = steps_apart(path, aware, UNSEEN)
    assert (apart > 1.5).mean() <= 5e-3


def test_what_computes_in_one_with_an_excluded_layer_is_float_too():
    model = network(lambda x: conv(layers.ReLU(name="r")(bn(conv(conv(x), name="c")))))
    decisions = {d.name: d for d in plan(model, exclude="c")}
    assert decisions["c"].reason == "excluded"
    assert decisions["r"].action == "float"
    assert "stays in float" in decisions["r"].reason


def test_excluded_concatenation_leaves_its_inputs_their_ranges(tmp_path):
    def body(x):
        return layers.Concatenate(name="join")([conv(x, padding="same"), 5.0 * conv(x, size=1)])

    model, aware = aware_network(body, exclude="join")
    assert [d.name for d in plan(model, exclude="join") if d.action == "float"] == ["join"]
    path = to_tflite(aware, tmp_path / "m.tflite").path
    assert not [c for c in _float_constants(path) if c.ndim == 4]  # both kernels are integers
    assert steps_apart(path, aware, UNSEEN).max() <= 1.5


def test_excluded_layer_stays_plain_and_is_named():
    decisions = {d.name: d for d in plan(sequential(), exclude="hidden")}
    assert (decisions["hidden"].action, decisions["hidden"].reason) == ("float", "excluded")
    aware = quantize_aware(sequential(), exclude="hidden")
    assert isinstance(aware.get_layer("hidden"), layers.Dense)
    graph = Graph.read(aware)
    (node,) = graph.calls(aware.get_layer("hidden"))
    assert isinstance(graph.producer(node.inputs[0]).layer, Dequantize)
    # What follows reads integers again.
    (node,) = graph.calls(aware.get_layer("logits"))
    dropout = graph.producer(node.inputs[0])
    assert isinstance(graph.producer(dropout.inputs[0]).layer, FakeQuantize)


def test_included_layers_only():
    aware = quantize_aware(sequential(), include="hidden")
    names = {x.name for x in aware.layers if isinstance(x, FakeQuantize)}
    assert names == {"flatten_quantize", "hidden_quantize"}
    assert {d.name for d in plan(sequential(), include="hidden") if d.action == "quantized"} == {
        "hidden"
    }


def test_float_territory_is_not_rounded():
    def body(x):
        x = layers.GroupNormalization(2)(flat_dense(x, 8))
        return layers.GroupNormalization(2)(layers.Reshape((2, 4))(layers.Dropout(0.1)(x)))

    aware = quantize_aware(network(body))
    assert len([x for x in aware.layers if isinstance(x, FakeQuantize)]) == 2  # image and dense


@pytest.mark.parametrize("end", ["float", "integer", "handed_on"])
def test_what_a_nested_model_gives_is_rounded_where_it_is_not_yet(end, tmp_path):
    def body(x):
        inside = keras.Input((6, 6, 4))
        inner = conv(inside, 4, 1)
        if end == "float":
            inner = layers.Activation("softplus")(inner)
        if end == "handed_on":
            inner = layers.MaxPooling2D()(inner)
        return conv(keras.Model(inside, inner, name="nested")(conv(x)), name="last")

    _, aware = aware_network(body)
    outer = [x.name for x in aware.layers if isinstance(x, FakeQuantize)]
    assert ("nested_quantize" in outer) == (end == "float")
    path = to_tflite(aware, tmp_path / "m.tflite").path
    assert not [c for c in _float_constants(path) if c.ndim == 4]  # all kernels are integers
    apart = steps_apart(path, aware, UNSEEN)
    assert (apart > 1.5).mean() <= 5e-3


def test_channels_without_weights_and_negative_factors(tmp_path):
    def body(x):
        x = layers.ReLU()(bn(conv(x, name="c")))
        return flat_dense(layers.ReLU()(bn(layers.DepthwiseConv2D(3, name="d")(x))))

    model = network(body)
    for name in "cd":  # a pruned channel
        kernel = np.array(model.get_layer(name).kernel)
        kernel[np.s_[..., 1] if name == "c" else np.s_[:, :, 1]] = 0
        model.get_layer(name).kernel.assign(kernel)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.gamma.assign([0.0, 1.0, -1.3, 0.4])
    aware = calibrate(quantize_aware(model))
    artifact = to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8")
    assert artifact.float_tensors == ()
    assert steps_apart(artifact.path, aware, UNSEEN).max() <= 1.001


def test_inputs_of_a_concatenation_have_no_range_of_their_own():
    _, aware = aware_network(_concatenated)
    names = [x.name for x in aware.layers if isinstance(x, FakeQuantize)]
    assert len(names) == 2  # the image and the concatenation
    assert any("concatenate" in name for name in names)


@pytest.mark.parametrize(
    ("activation", "operator"),
    [("sigmoid", "LOGISTIC"), ("tanh", "TANH"), ("softmax", "SOFTMAX")],
)
def test_prescribed_range_is_trained_with_so_that_nothing_converts_it(
    activation, operator, tmp_path
):
    _, aware = aware_network(lambda x: flat_dense(x, activation=activation))
    path = to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8").path
    names = [op.name for op in TFLiteFile.read(path).operators()]
    assert names == ["RESHAPE", "FULLY_CONNECTED", operator]


def test_function_of_the_same_name_is_not_taken_for_keras_activation():
    def relu(x):
        return x * x

    model = network(lambda x: layers.Activation(relu)(conv(x)))
    (decision,) = [d for d in plan(model) if d.action == "float"]
    assert "activation relu is not covered" in decision.reason


@pytest.mark.parametrize("name", ["MobileNetV2", "ShuffleNetV2"])
def test_nothing_of_the_light_networks_stays_in_float(name):
    model = getattr(tfaccel.architectures, name)((8, 8, 3), 4, width={"M": 0.35, "S": 0.5}[name[0]])
    decisions = plan(model)
    assert {d.action for d in decisions} == {"quantized", "follows"}
    kernels = [x for x in flat_layers(model) if hasattr(x, "kernel")]
    quantized = [d.name for d in decisions if d.reason == "kernel" or "concatenation" in d.reason]
    assert {x.name for x in kernels} <= set(quantized)


def test_audit_of_a_plan_agrees_with_the_file(tmp_path):
    _, aware = aware_network(_normalized)
    path = to_tflite(aware, tmp_path / "m.tflite").path
    found = audit(path)
    kernels = [t for t in found.quantized_tensors.values() if len(t.scales) > 1]
    assert {t.dtype for t in kernels} >= {"int8"}
    assert found.float_tensors


@pytest.mark.parametrize("name", ["c", "p", "logits"])
def test_excluded_linear_layer_takes_no_reader_along(name):
    def body(x):
        x = conv(conv(x, 8, name="c"), 8, name="p")
        x = layers.Dense(4, name="logits")(layers.Flatten()(x))
        return layers.Softmax(name="soft")(x)

    floats = [d.name for d in plan(network(body), exclude=name) if d.action == "float"]
    assert floats == [name]


IN_SIXTEEN_BITS = {
    "pooled": lambda x: layers.Concatenate(name="join")(
        [layers.GlobalAveragePooling2D()(conv(x)), layers.GlobalAveragePooling2D()(conv(x, 2))]
    ),
    "sigmoid": lambda x: layers.Concatenate(name="join")([conv(x, activation="sigmoid"), conv(x)]),
    "convolutions": lambda x: conv(
        layers.Concatenate(name="join")([conv(x), conv(x, 2, activation="relu")])
    ),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("body", IN_SIXTEEN_BITS.values(), ids=IN_SIXTEEN_BITS)
def test_what_a_float_concatenation_reads_keeps_its_own_range(body, tmp_path):
    """In 16 bits a concatenation is float; what it reads must not wait for its range."""
    model, aware = aware_network(body, scheme="int16x8")
    decisions = {d.name: d for d in plan(model, "int16x8")}
    assert decisions["join"].action == "float"
    artifact = to_tflite(aware, tmp_path / "m.tflite")
    assert artifact.audit.operators
    assert artifact.audit.missing == ()
    assert artifact.audit.max_steps <= 1.01  # a float32 is no exact multiple of so fine a step
    kernels = [constant for constant in _float_constants(artifact.path) if constant.ndim == 4]
    assert not kernels


def test_scheme_of_a_layer_holds_for_its_own_relu_apart():
    def body(x):
        x = layers.ReLU(name="r")(bn(conv(x, name="c", use_bias=False)))
        return conv(x, name="last")

    aware = quantize_aware(network(body), per_layer={"c": "w4a4"})
    assert aware.get_layer("r_quantize").bits == 4
    assert aware.get_layer("last_quantize").bits == 8


def _two_heads(x):
    x = conv(layers.ReLU()(conv(x, name="first")), name="mid")
    x = layers.GlobalAveragePooling2D()(x)
    return [layers.Dense(2, name="one")(x), layers.Dense(3, name="two")(x)]


def _attend(x):
    x = sequence(x)
    return layers.MultiHeadAttention(2, 4, name="a")(x, x)


ENDS = {
    "heads": (_two_heads, {"first": 8, "mid": 4, "one": 8, "two": 8}),
    "separable": (
        lambda x: conv(conv(layers.SeparableConv2D(4, 3, name="s")(x), name="mid"), name="last"),
        {"s_depthwise": 8, "s": 8, "mid": 4, "last": 8},
    ),
    "attention": (
        lambda x: layers.Dense(3, name="last")(layers.Dense(5, name="mid")(_attend(x))),
        {"a_query": 8, "a_key": 8, "a_value": 8, "a": 8, "mid": 4, "last": 8},
    ),
}


@pytest.mark.parametrize(("body", "expected"), ENDS.values(), ids=ENDS)
def test_ends_keep_eight_bits_whatever_they_are_written_as(body, expected):
    aware = quantize_aware(network(body), "int4")
    found = {
        layer.name: transform.bits
        for layer in aware.layers
        if isinstance(layer, TransformedLayer)
        for _, transform in layer.transforms
    }
    assert found == expected


def test_a_line_names_what_stays_in_float_unasked(caplog):
    def body(x):
        return conv(layers.GroupNormalization(4, name="gn")(conv(x, name="c")))

    quantize_aware(network(body), exclude="c")
    (record,) = caplog.records
    assert "'gn' (GroupNormalization is not covered" in record.getMessage()
    assert "'c'" not in record.getMessage()
    caplog.clear()
    quantize_aware(network(conv))
    assert not caplog.records
