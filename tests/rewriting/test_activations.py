import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tests.comparing import assert_same_outputs, fingerprint
from tests.random_models import random_inputs, random_model
from tfaccel.core.keras_private import functional_of
from tfaccel.core.stripping import strip
from tfaccel.export import to_tflite
from tfaccel.measurement.flatbuffer import TFLiteFile
from tfaccel.pruning import prune, update_masks
from tfaccel.rewriting.activations import replace_activations


def hard_sigmoid(x):
    return np.clip(x + 3, 0, 6) / 6


def hard_swish(x):
    return x * hard_sigmoid(x)


def gated():
    """Swish in every spelling, a squeeze-and-excitation gate, and probabilities."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, activation="swish", name="built_in")(inputs)
    x = keras.ops.silu(layers.Conv2D(4, 3, name="second")(x))
    x = layers.Activation("silu", name="layer")(layers.Conv2D(4, 1, name="third")(x))
    gate = layers.GlobalAveragePooling2D(keepdims=True, name="squeeze")(x)
    gate = layers.Conv2D(4, 1, activation="sigmoid", name="gate")(gate)
    x = layers.GlobalAveragePooling2D(name="pool")(layers.Multiply(name="scale")([x, gate]))
    return keras.Model(inputs, layers.Dense(3, activation="sigmoid", name="odds")(x), name="gated")


def images(size=16):
    return np.random.default_rng(0).normal(size=(size, 8, 8, 3)).astype("float32")


def of(model, name):
    return model.get_layer(name).activation.__name__


def test_every_spelling_is_replaced_and_the_probabilities_stay():
    model = gated()
    was = fingerprint(model)
    hard = replace_activations(model)
    assert of(hard, "built_in") == of(hard, "layer") == "hard_silu"
    assert of(hard, "gate") == "hard_sigmoid"
    assert of(hard, "odds") == "sigmoid"
    kinds = [type(operation).__name__ for operation in functional_of(hard).operations]
    assert "Silu" not in kinds
    assert kinds.count("Activation") == 2
    for ours, theirs in zip(hard.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert fingerprint(model) == was


def test_values_are_those_of_the_formulas():
    x = np.linspace(-5, 5, 101, dtype="float32")[:, np.newaxis]
    inputs = keras.Input((1,))
    outputs = [
        layers.Activation("swish")(inputs),
        keras.activations.silu(inputs),
        keras.ops.sigmoid(inputs),
        inputs * keras.activations.sigmoid(inputs),
    ]
    model = keras.Model(inputs, outputs)
    found = replace_activations(model, outputs=True)(x)
    wanted = [hard_swish(x), hard_swish(x), hard_sigmoid(x), hard_swish(x)]
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    # How far they are from what they replace, as the documentation says.
    assert np.abs(found[0] - np.asarray(model(x)[0])).max() == pytest.approx(0.142, abs=1e-3)
    assert np.abs(found[2] - np.asarray(model(x)[2])).max() == pytest.approx(0.069, abs=1e-3)


@pytest.mark.parametrize("scheme", ["float32", "int8"])
def test_hard_swish_is_one_operator_in_the_file(scheme, tmp_path):
    data = images() if scheme == "int8" else None
    path = tmp_path / "model.tflite"
    to_tflite(
        replace_activations(gated()),
        path,
        scheme,
        representative_data=data,
        verify_data=images(),
    )
    names = [operator.name for operator in TFLiteFile.read(path).operators()]
    assert names.count("HARD_SWISH") == 3
    assert names.count("LOGISTIC") == 1  # the probabilities


def test_outputs_stay_behind_what_hands_them_on():
    def inner():
        x = keras.Input((4, 4, 2))
        return keras.Model(x, [layers.ReLU()(x), keras.ops.sigmoid(x)], name="inner")

    inputs = keras.Input((4, 4, 2))
    scores = layers.Conv2D(3, 1, activation="sigmoid", name="scores")(inputs)
    boxes = layers.Conv2D(2, 1, activation="sigmoid", name="boxes")(inputs)
    inside = layers.Conv2D(2, 1, activation="sigmoid", name="inside")(inputs)
    both = layers.Concatenate()([layers.Reshape((16, 3))(scores), layers.Reshape((16, 2))(boxes)])
    model = keras.Model(inputs, [layers.Dropout(0.5)(both), inner()(inside)[1]])
    hard = replace_activations(model)
    assert of(hard, "scores") == of(hard, "boxes") == "sigmoid"
    assert of(hard, "inside") == "hard_sigmoid"
    nested = [type(o).__name__ for o in functional_of(hard.get_layer("inner")).operations]
    assert "Sigmoid" in nested
    everything = replace_activations(model, outputs=True)
    assert of(everything, "scores") == "hard_sigmoid"
    nested = [type(o).__name__ for o in functional_of(everything.get_layer("inner")).operations]
    assert "Sigmoid" not in nested


def test_include_and_exclude_choose():
    only = replace_activations(gated(), include="gate")
    assert (of(only, "built_in"), of(only, "gate")) == ("silu", "hard_sigmoid")
    assert "Silu" in [type(o).__name__ for o in functional_of(only).operations]
    most = replace_activations(gated(), exclude=["built_in", "layer"])
    assert (of(most, "built_in"), of(most, "layer")) == ("silu", "silu")
    assert of(most, "gate") == "hard_sigmoid"
    with pytest.raises(ValueError, match="matches no layer"):
        replace_activations(gated(), include="gates")


def test_recurrent_layers_are_replaced_only_if_asked():
    inputs = keras.Input((5, 3))
    x = layers.LSTM(4, return_sequences=True, name="lstm")(inputs)
    x = layers.Bidirectional(layers.GRU(2, return_sequences=True), name="both")(x)
    x = layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)], return_sequences=True, name="cells")(x)
    x = layers.TimeDistributed(layers.Dense(3, activation="swish"), name="each")(x)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))
    kept = replace_activations(model)
    assert kept.get_layer("lstm").recurrent_activation is keras.activations.sigmoid
    assert kept.get_layer("each").layer.activation is keras.activations.hard_silu
    hard = replace_activations(model, recurrent=True)
    hard_one = keras.activations.hard_sigmoid
    assert hard.get_layer("lstm").recurrent_activation is hard_one
    assert hard.get_layer("lstm").activation is keras.activations.tanh
    assert hard.get_layer("both").forward_layer.recurrent_activation is hard_one
    assert hard.get_layer("both").backward_layer.recurrent_activation is hard_one
    assert [c.recurrent_activation for c in hard.get_layer("cells").cell.cells] == [hard_one] * 2
    # It is what is computed too: one step of an LSTM by hand.
    lstm = hard.get_layer("lstm")
    x = np.random.default_rng(0).normal(size=(1, 1, 3)).astype("float32")
    kernel, _, bias = lstm.get_weights()
    i, _, c, o = np.split(x[0, 0] @ kernel + bias, 4)
    step = hard_sigmoid(o) * np.tanh(hard_sigmoid(i) * np.tanh(c))
    np.testing.assert_allclose(np.asarray(lstm(x))[0, 0], step, atol=1e-6)


def test_other_activations_by_name_and_by_function():
    inputs = keras.Input((4,))
    x = layers.ReLU(name="plain")(layers.Dense(4, activation="relu", name="dense")(inputs))
    x = layers.ReLU(6.0, name="capped")(keras.ops.relu(x))
    x = layers.ReLU(negative_slope=0.1, name="leaky")(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    other = replace_activations(model, {"relu": "relu6", "relu6": keras.activations.relu})
    assert of(other, "dense") == of(other, "plain") == "relu6"
    assert of(other, "capped") == "relu"
    assert other.get_layer("leaky").negative_slope == pytest.approx(0.1)
    assert "Relu" not in [type(o).__name__ for o in functional_of(other).operations]


def test_shared_layers_stay_shared():
    inputs = keras.Input((3,))
    shared = layers.Dense(3, activation="swish", name="shared")
    model = keras.Model(inputs, layers.Dense(2)(shared(shared(inputs))))
    hard = replace_activations(model)
    assert of(hard, "shared") == "hard_silu"
    assert len(hard.weights) == len(model.weights)


def test_wrapped_layers_stay_wrapped():
    pruned = prune(gated(), 0.5)
    update_masks(pruned, 0)
    hard = replace_activations(pruned)
    assert type(hard.get_layer("third")) is type(pruned.get_layer("third"))
    x = images(2)
    plain = strip(hard)
    assert of(plain, "gate") == "hard_sigmoid"
    np.testing.assert_allclose(plain(x), replace_activations(strip(pruned))(x), atol=1e-6)


def test_mixed_precision_goes_on_in_half():
    inputs = keras.Input((4,), dtype="float16")
    x = keras.ops.silu(inputs)
    model = keras.Model(inputs, layers.Dense(2, dtype="float16")(x))
    hard = replace_activations(model)
    assert {str(tensor.dtype) for tensor in (hard.layers[1].output, hard.output)} == {"float16"}


def test_replaced_models_are_saved_and_loaded(tmp_path):
    hard = replace_activations(gated())
    hard.save(tmp_path / "model.keras")
    assert_same_outputs(keras.saving.load_model(tmp_path / "model.keras"), hard, images(2))


@settings(max_examples=15)
@given(seed=st.integers(0, 2**16))
def test_random_models_lose_all_but_what_they_give_out(seed):
    model = random_model(seed)
    was, x = fingerprint(model), random_inputs(model, seed)
    assert_same_outputs(replace_activations(model, {"selu": "relu"}), model, x)
    hard = replace_activations(model, outputs=True)
    config = str(hard.get_config())
    assert "'silu'" not in config
    assert "'sigmoid'" not in config
    assert fingerprint(model) == was


def test_a_layer_that_forgets_its_activation_is_named():
    class Forgetful(layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.activation = keras.activations.silu

        def call(self, inputs):
            return self.activation(inputs)

    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Dense(2)(Forgetful(name="odd")(inputs)))
    with pytest.raises(ValueError, match=r"'odd' \(Forgetful\) does not keep its activation"):
        replace_activations(model)
    assert replace_activations(model, exclude="odd").get_layer("odd") is not model.get_layer("odd")


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="knows no 'swisch'"):
        replace_activations(gated(), {"swisch": "relu"})
    with pytest.raises(TypeError, match="but got 3"):
        replace_activations(gated(), {"swish": 3})
    with pytest.raises(TypeError, match="mapping must be Mapping"):
        replace_activations(gated(), "swish")
    with pytest.raises(ValueError, match="no weights yet"):
        replace_activations(keras.Sequential([layers.Dense(3)]))
