"""Schemes by name and by number, and schemes of single layers."""

import keras
import pytest
from keras import layers

from tests.quantization.networks import conv, network
from tfaccel.core.graph import flat_layers
from tfaccel.core.transforms import TransformedLayer
from tfaccel.quantization import (
    SCHEMES,
    FakeQuantize,
    FakeQuantizeWeights,
    Scheme,
    plan,
    quantize_aware,
    scheme_of,
)


def body(x):
    x = conv(x, 4, activation="relu", name="first")
    x = conv(x, 4, activation="relu", name="middle")
    x = layers.Activation("tanh", name="tanh")(conv(x, 4, name="late"))
    return layers.Dense(3, name="logits")(layers.Flatten()(x))


def weight_bits(model):
    return {
        layer.name: transform.bits
        for layer in flat_layers(model)
        if isinstance(layer, TransformedLayer)
        for _, transform in layer.transforms
        if isinstance(transform, FakeQuantizeWeights)
    }


def value_bits(model):
    return {x.name.removesuffix("_quantize"): x.bits for x in model.layers if is_range(x)}


def is_range(layer):
    return isinstance(layer, FakeQuantize)


def test_names_with_bits_in_them():
    for weights in range(2, 9):
        for values in range(2, 9):
            scheme = SCHEMES.get(f"w{weights}a{values}")
            assert (scheme.weight_bits, scheme.activation_bits) == (weights, values)
            assert scheme.trainable
    for wrong in ("w1a8", "w9a8", "w4a16", "w4", "4w8a"):
        with pytest.raises(ValueError, match=rf"no quantization scheme '{wrong}'.*'w4a8'"):
            SCHEMES.get(wrong)


def test_few_bits_of_values_are_for_what_relus_give():
    aware = quantize_aware(network(body), "w3a4")
    assert set(weight_bits(aware).values()) == {3}
    bits = value_bits(aware)
    assert bits == {"image": 8, "first": 4, "middle": 4, "late": 8, "tanh": 8, "logits": 8}


def test_sixteen_bits_have_zero_in_the_middle():
    aware = quantize_aware(network(body), "int16x8")
    assert set(value_bits(aware).values()) == {16}
    assert all(x.symmetric for x in aware.layers if is_range(x))
    assert "tanh_dequantize" in {x.name for x in aware.layers}  # which the converter lacks


def test_symmetric_values_of_eight_bits():
    scheme = Scheme("mine", 8, 8, trainable=True, symmetric_activations=True)
    aware = quantize_aware(network(conv), scheme)
    (entry, *_) = [x for x in aware.layers if is_range(x)]
    entry.set_range(-1.0, 2.0)
    assert float(entry.maximum) == 2.0
    assert float(entry.minimum) == pytest.approx(-2.0 * 128 / 127)


def test_layers_with_a_scheme_of_their_own():
    per_layer = {"l*": "int8", "late": "w2a8", "first": "w5a6"}
    aware = quantize_aware(network(body), "w4a3", per_layer=per_layer)
    # Of the two patterns that fit "late" the first is taken.
    assert weight_bits(aware) == {"first": 5, "middle": 4, "late": 8, "logits": 8}
    assert value_bits(aware)["first"] == 6
    assert value_bits(aware)["middle"] == 3


def test_parts_of_a_layer_have_its_scheme():
    def written_out(x):
        x = layers.SeparableConv2D(4, 3, name="halves")(x)
        return layers.LSTM(4, name="memory")(layers.Reshape((6, 24))(x))

    aware = quantize_aware(network(written_out), "w4a8", per_layer={"memory": "w6a8"})
    bits = weight_bits(aware)
    assert bits["halves"] == bits["halves_depthwise"] == 4
    assert bits["memory_inputs"] == bits["memory_recurrent"] == 6


def test_ends_keep_eight_bits_in_int4():
    aware = quantize_aware(network(body), "int4")
    assert weight_bits(aware) == {"first": 8, "middle": 4, "late": 4, "logits": 8}


def test_weights_alone():
    for scheme in ("int4_weight_only", Scheme("mine", 5, 32, trainable=True)):
        aware = quantize_aware(network(body), scheme)
        assert not [x for x in aware.layers if is_range(x)]
        assert set(weight_bits(aware)) == {"first", "middle", "late", "logits"}
        assert scheme_of(aware).name == "int4_weight_only"


def test_blocks_are_for_dense_layers_that_they_fit():
    decisions = {d.name: d for d in plan(network(body), "int4_block32")}
    assert decisions["first"].reason == "Conv2D, but blocks of weights are for Dense"
    assert decisions["logits"].reason == "its 16 inputs are no multiple of blocks of 32"
    assert {d.action for d in decisions.values()} == {"float"}
    with pytest.raises(ValueError, match=r"nothing to quantize.*no multiple of blocks of 32"):
        quantize_aware(network(body), "int4_block32")


def test_which_file_a_model_is_for():
    model = network(body)
    expected = {
        "int8": "int8",
        "w5a4": "int8",
        "w4a8": "int4",
        "w2a2": "int4",
        "int16x8": "int16x8",
    }
    for scheme, file in expected.items():
        assert scheme_of(quantize_aware(model, scheme)).name == file


BAD = {
    "weights": (("x", 9, 8), {}, "weight_bits must be one of"),
    "values": (("x", 8, 1), {}, "activation_bits must be one of"),
    "ends": (("x", 8, 8), {"end_bits": 16}, "end_bits must be one of"),
    "sixteen": (("x", 8, 16), {}, "symmetric_activations=True"),
    "block": (("x", 4, 8), {"weight_block": 32}, "only where activations are float"),
    "no_block": (("x", 4, 32), {"weight_block": 0}, "weight_block must be above 0"),
}


@pytest.mark.parametrize(("numbers", "options", "message"), BAD.values(), ids=BAD)
def test_bad_schemes(numbers, options, message):
    with pytest.raises(ValueError, match=message):
        Scheme(*numbers, **options)


@pytest.mark.parametrize("other", ["int16x8", "int4_weight_only"])
def test_schemes_of_another_kind_do_not_go_together(other):
    with pytest.raises(ValueError, match=rf"'logits' the scheme '{other}'.*scheme 'int8' has"):
        quantize_aware(network(body), per_layer={"logits": other})
    with pytest.raises(TypeError, match="per_layer must be Mapping"):
        quantize_aware(network(body), per_layer=["logits"])
    with pytest.raises(ValueError, match=r"'logit' matches no layer.*'logits'"):
        quantize_aware(network(body), per_layer={"logit": "int8"})


def test_scheme_survives_its_config():
    scheme = Scheme("mine", 4, 32, trainable=True, weight_block=64)
    assert SCHEMES.get(keras.saving.serialize_keras_object(scheme)) == scheme


def test_what_the_converter_lacks_in_sixteen_bits_stays_float():
    def wide(x):
        x = layers.Concatenate(name="join")([conv(x, name="c"), layers.ReLU(name="r")(conv(x))])
        x = layers.Activation("sigmoid", name="s")(layers.Add(name="a")([x, 2.0 * x]))
        return layers.LayerNormalization(name="n")(layers.GlobalAveragePooling2D(name="m")(x))

    model = network(wide)
    decisions = {d.name: d for d in plan(model, "int16x8")}
    floats = {name.split("_")[0] for name, d in decisions.items() if d.action == "float"}
    assert floats == {"join", "s", "n", "multiply"}
    assert decisions["join"].reason == "Concatenate in 16 bits is not covered"
    assert decisions["n"].reason == "LayerNormalization in 16 bits is not covered"
    assert not [d for d in plan(model) if d.action == "float"]
