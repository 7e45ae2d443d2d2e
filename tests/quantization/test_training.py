"""What quantize_aware makes of a model, and that the artifact computes what was trained."""

import keras
import numpy as np
import pytest
from keras import layers

import tfaccel
from tests.contracts.tables import convolutional, make_data, nested, sequential
from tfaccel.core import Graph
from tfaccel.core.graph import flat_layers
from tfaccel.export import audit, to_tflite
from tfaccel.measurement.flatbuffer import TFLiteFile
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.quantization import FakeQuantize, freeze_ranges, plan, quantize_aware, scheme_of
from tfaccel.rewriting import fold_batch_norm

IMAGE = (8, 8, 3)


def conv(x, filters=4, size=3, name=None, **options):
    return layers.Conv2D(filters, size, name=name, **options)(x)


def _residual(x):
    return layers.ReLU()(conv(x, 3, padding="same") + x)


def _concatenated(x):
    a = layers.ReLU()(layers.BatchNormalization()(conv(x, padding="same")))
    return layers.Concatenate()([a, conv(x, 2, 1)])


def _shuffled(x):
    x = conv(x, 8, padding="same")
    a, b = x[..., :4], x[..., 4:]
    x = layers.Concatenate()([a, conv(b, 4, 1, activation="relu")])
    x = layers.Permute((1, 2, 4, 3))(layers.Reshape((8, 8, 2, 4))(x))
    return layers.Reshape((8, 8, 8))(x)


def _squeeze_and_excite(x):
    x = conv(x, 4)
    s = layers.GlobalAveragePooling2D(keepdims=True)(x)
    s = conv(conv(s, 2, 1, activation="relu"), 4, 1, activation="sigmoid")
    return layers.Multiply()([x, s])


# What is covered: each becomes integers all through, within one step of what was trained.
COVERED = {
    "conv": conv,
    "conv_relu": lambda x: conv(x, activation="relu"),
    "conv_relu6": lambda x: conv(x, activation="relu6"),
    "conv_bn_relu": lambda x: layers.ReLU()(layers.BatchNormalization()(conv(x))),
    "conv_bn_relu6": lambda x: layers.ReLU(6.0)(layers.BatchNormalization()(conv(x))),
    "strided_padded": lambda x: conv(layers.ZeroPadding2D()(x), strides=2),
    "dilated": lambda x: conv(x, dilation_rate=2),
    "grouped": lambda x: conv(x, 6, groups=3),
    "conv1d": lambda x: layers.Conv1D(4, 3)(layers.Reshape((16, 12))(x)),
    "depthwise_bn": lambda x: layers.BatchNormalization()(
        layers.DepthwiseConv2D(3, depth_multiplier=2)(x)
    ),
    "separable": lambda x: conv(layers.SeparableConv2D(4, 3, activation="relu")(x)),
    "transposed_bn": lambda x: layers.BatchNormalization()(layers.Conv2DTranspose(4, 3)(x)),
    "dense": lambda x: layers.Dense(5, activation="relu")(layers.Flatten()(x)),
    "dense_on_sequence": lambda x: layers.Dense(5)(layers.Reshape((8, 24))(x)),
    "dense_bn": lambda x: layers.BatchNormalization()(layers.Dense(5)(layers.Flatten()(x))),
    "softmax": lambda x: layers.Dense(5, activation="softmax")(layers.Flatten()(x)),
    "sigmoid": lambda x: conv(x, activation="sigmoid"),
    "tanh": lambda x: layers.Activation("tanh")(conv(x)),
    "residual": _residual,
    "add_layer": lambda x: layers.Add()([conv(x, padding="same"), conv(x, size=1)]),
    "multiply": lambda x: layers.Multiply()([conv(x, padding="same"), conv(x, size=1)]),
    "concatenate": _concatenated,
    "max_pool": lambda x: layers.MaxPooling2D()(conv(x)),
    "average_pool": lambda x: layers.AveragePooling2D(2)(conv(x)),
    "global_average": lambda x: layers.GlobalAveragePooling2D()(conv(x)),
    "global_max": lambda x: layers.GlobalMaxPooling2D()(conv(x)),
    "upsampling": lambda x: layers.UpSampling2D()(conv(x)),
    "cropping": lambda x: layers.Cropping2D(1)(conv(x)),
    "shuffle": _shuffled,
    "squeeze_and_excite": _squeeze_and_excite,
}


def trained(body, *, steps=4):
    """A quantization-aware model whose ranges and batch norm have seen some data."""
    keras.utils.set_random_seed(6)
    inputs = keras.Input(IMAGE, name="image")
    model = keras.Model(inputs, body(inputs), name="small")
    aware = quantize_aware(model)
    aware.compile(keras.optimizers.SGD(0.01), "mse")
    x = make_data(64)[0]
    aware.fit(x, np.zeros((64, *aware.output_shape[1:])), batch_size=64 // steps, verbose=0)
    return model, aware


def steps_apart(path, aware, x):
    """Distances between file and Keras, in steps of the file's output."""
    file = TFLiteModel(path)
    difference = np.abs(file.predict(x) - np.asarray(aware(x, training=False)))
    return difference / file.outputs[0].scale


@pytest.mark.parametrize("body", COVERED.values(), ids=COVERED)
def test_covered_layer_is_all_integers_and_within_one_step(body, tmp_path):
    model, aware = trained(body)
    assert not [d for d in plan(model) if d.action == "float"]
    artifact = to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8")
    assert artifact.float_tensors == ()
    apart = steps_apart(artifact.path, aware, make_data(32, seed=5)[0])
    # A sum in the middle of two steps may fall on either side, and where an operator's output has
    # finer steps than its input, the next one makes two steps of that: seen in 2 of 10,000 values.
    assert apart.max() <= 2.001
    assert (apart > 1.001).mean() <= 1e-3


UNCOVERED = {
    "swish": (lambda x: conv(x, activation="swish"), "Activation is not covered"),
    "softplus": (lambda x: conv(conv(x, activation="softplus")), "Activation is not covered"),
    "lone_norm": (lambda x: conv(layers.BatchNormalization()(x)), "cannot be folded"),
    "norm_after_relu": (
        lambda x: layers.BatchNormalization()(conv(x, activation="relu")),
        "cannot be folded",
    ),
}


@pytest.mark.parametrize(("body", "reason"), UNCOVERED.values(), ids=UNCOVERED)
def test_what_is_not_covered_stays_float_is_named_and_still_agrees(body, reason, tmp_path):
    model, aware = trained(body)
    (decision,) = [d for d in plan(model) if d.action == "float"]
    assert reason in decision.reason
    artifact = to_tflite(aware, tmp_path / "m.tflite")
    assert artifact.float_tensors
    x = make_data(32, seed=5)[0]
    expected = np.asarray(aware(x, training=False))
    assert np.abs(TFLiteModel(artifact.path).predict(x) - expected).max() < 0.05


@pytest.mark.parametrize("make_model", [convolutional, sequential, nested])
def test_scales_in_the_file_are_the_trained_ones(make_model, tmp_path):
    aware = quantize_aware(make_model())
    aware.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    aware.fit(*make_data(64), verbose=0)
    path = to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8").path
    file = TFLiteModel(path, delegates=False)
    found = [t["quantization_parameters"]["scales"] for t in file.tensor_details()]
    single = np.array([s[0] for s in found if len(s) == 1])
    for layer in flat_layers(aware):
        if isinstance(layer, FakeQuantize):
            scale = (float(layer.maximum) - float(layer.minimum)) / 255
            assert np.abs(single / scale - 1).min() < 1e-6, layer.name
    folded = fold_batch_norm(tfaccel.core.bake_weights(freeze_ranges(aware)))
    per_channel = [s for s in found if len(s) > 1]
    for layer in flat_layers(folded):
        if isinstance(layer, layers.Conv2D):
            scales = np.abs(np.asarray(layer.kernel)).max(axis=(0, 1, 2)) / 127
            assert any(
                len(s) == len(scales) and np.allclose(s, scales, rtol=1e-6) for s in per_channel
            ), layer.name


def test_pruned_zeros_stay_zeros_in_the_file(tmp_path):
    pruned = tfaccel.pruning.prune(sequential(), 0.75, include=["conv", "hidden", "logits"])
    aware = quantize_aware(pruned)
    aware.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    aware.fit(*make_data(64), verbose=0, callbacks=[tfaccel.pruning.UpdatePruning()])
    path = to_tflite(aware, tmp_path / "m.tflite").path
    assert TFLiteFile.read(path).sparsity() >= 0.75


def test_separable_convolution_is_split_without_a_change():
    inputs = keras.Input(IMAGE)
    model = keras.Model(inputs, layers.SeparableConv2D(4, 3, depth_multiplier=2, name="s")(inputs))
    aware = quantize_aware(model)
    assert {x.name for x in aware.layers} >= {"s_depthwise", "s"}
    x = make_data(4)[0]
    plain = tfaccel.strip(aware)  # only the rounding of the weights is left
    assert np.abs(np.asarray(plain(x)) - np.asarray(model(x))).max() < 0.05


def test_excluded_layer_stays_float_and_is_named():
    decisions = {d.name: d for d in plan(sequential(), exclude="hidden")}
    assert (decisions["hidden"].action, decisions["hidden"].reason) == ("float", "excluded")
    aware = quantize_aware(sequential(), exclude="hidden")
    assert isinstance(aware.get_layer("hidden"), layers.Dense)
    # What follows reads integers again.
    graph = Graph.read(aware)
    (node,) = graph.calls(aware.get_layer("logits"))
    assert isinstance(graph.producer(node.inputs[0]).layer, (FakeQuantize, layers.Dropout))


def test_included_layers_only():
    aware = quantize_aware(sequential(), include="hidden")
    names = {x.name for x in aware.layers if isinstance(x, FakeQuantize)}
    assert names == {"conv_quantize", "hidden_quantize"} or len(names) == 2


def test_inputs_of_a_concatenation_have_no_range_of_their_own():
    _, aware = trained(_concatenated)
    names = [x.name for x in aware.layers if isinstance(x, FakeQuantize)]
    assert len(names) == 2  # the image and the concatenation
    assert any("concatenate" in name for name in names)


def test_never_trained_model_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"is not known yet.*Run model\.fit"):
        to_tflite(quantize_aware(sequential()), tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_scheme_of_a_model():
    assert scheme_of(sequential()) is None
    assert scheme_of(quantize_aware(sequential())).name == "int8"


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"no quantization scheme 'int7'.*Did you mean 'int8'"):
        quantize_aware(sequential(), "int7")
    with pytest.raises(ValueError, match=r"float16.*needs no training"):
        quantize_aware(sequential(), "float16")
    with pytest.raises(ValueError, match="quantization-aware already"):
        quantize_aware(quantize_aware(sequential()))
    with pytest.raises(ValueError, match=r"exclude='hiden' matches no layer.*'hidden'"):
        quantize_aware(sequential(), exclude="hiden")
    inputs = keras.Input((4, 3))
    lone = keras.Model(inputs, layers.LayerNormalization()(inputs))
    with pytest.raises(ValueError, match=r"nothing to quantize.*LayerNormalization is not covered"):
        quantize_aware(lone)


@pytest.mark.parametrize("name", ["MobileNetV2", "ShuffleNetV2"])
def test_light_networks_are_integers_all_through(name, tmp_path):
    keras.utils.set_random_seed(0)
    network = getattr(tfaccel.architectures, name)
    width = {"MobileNetV2": 0.35, "ShuffleNetV2": 0.5}[name]
    model = network((8, 8, 3), 4, width=width)
    assert not [d for d in plan(model) if d.action == "float"]
    aware = quantize_aware(model)
    aware.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = make_data(64)
    aware.fit(x, y, verbose=0)
    artifact = to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8")
    assert audit(artifact.path).float_tensors == ()
