"""SlicedRNN against the plain recurrent network, by the paper's equivalences."""

import keras
import numpy as np
import pytest
from keras import layers

from tfaccel.architectures.recurrent import QRNN, SRU
from tfaccel.architectures.sliced import SlicedRNN
from tfaccel.export import to_tflite
from tfaccel.measurement import TFLiteModel, count

TEMPLATES = {
    "GRU": lambda **a: layers.GRU(3, **a),
    "LSTM": lambda **a: layers.LSTM(3, **a),
    "SimpleRNN": lambda **a: layers.SimpleRNN(3, **a),
    "QRNN": lambda **a: QRNN(3, **a),
    "SRU": lambda **a: SRU(3, **a),
    "Bidirectional": lambda **a: layers.Bidirectional(layers.GRU(3, **a)),
    "cell": lambda **a: layers.RNN(layers.LSTMCell(3), **a),
    "stacked cells": lambda **a: layers.RNN([layers.GRUCell(4), layers.LSTMCell(3)], **a),
}
each = pytest.mark.parametrize("make", TEMPLATES.values(), ids=TEMPLATES)


def sequences(batch=2, steps=12, features=4):
    return np.random.default_rng(0).normal(size=(batch, steps, features)).astype("float32")


@each
@pytest.mark.parametrize("cut", [{"slices": 1, "levels": 2}, {"slices": 4, "levels": 0}])
def test_one_slice_is_the_plain_network(make, cut):
    plain, sliced = make(), SlicedRNN(make(), **cut)
    x = sequences(steps=11)
    expected = plain(x)
    sliced.build(x.shape)
    sliced.set_weights(plain.get_weights())
    np.testing.assert_allclose(sliced(x), expected, rtol=1e-5, atol=1e-6)


@each
def test_levels_by_hand(make):
    sliced = SlicedRNN(make(), slices=2, levels=2)
    x = sequences()
    outputs = sliced(x)
    first, second, third = sliced.level_layers
    low = [first(x[:, 3 * part : 3 * part + 3]) for part in range(4)]
    middle = [second(np.stack([low[2 * i], low[2 * i + 1]], axis=1)) for i in range(2)]
    np.testing.assert_allclose(outputs, third(np.stack(middle, 1)), rtol=1e-4, atol=1e-6)
    # Three layers with weights of their own.
    assert len({id(w) for w in sliced.weights}) == sum(len(x.weights) for x in sliced.level_layers)


def test_linear_networks_are_equivalent_at_any_slicing():
    """Section 3.4 there: an upper level with input matrix I and recurrent matrix U^steps."""
    plain = layers.SimpleRNN(3, activation="linear", use_bias=False)
    x = sequences(steps=18)
    expected = plain(x)
    inner, recurrent = plain.get_weights()
    sliced = SlicedRNN(layers.SimpleRNN(3, activation="linear", use_bias=False), 3, 2)
    sliced.build(x.shape)
    power = np.linalg.matrix_power
    levels = [
        (inner, recurrent),
        (np.eye(3), power(recurrent, 2)),  # minimum subsequences of 18 / 9 steps
        (np.eye(3), power(recurrent, 6)),
    ]
    sliced.set_weights([w for level in levels for w in level])
    np.testing.assert_allclose(sliced(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["GRU", "LSTM", "SimpleRNN"])
def test_masked_subsequences_are_passed_over(name):
    sliced = SlicedRNN(TEMPLATES[name](), slices=2, levels=1)
    x = sequences(steps=8)
    mask = np.ones((2, 8), bool)
    mask[0, :4] = False  # the whole first slice
    mask[1, :2] = False
    outputs = np.asarray(sliced(x, mask=mask))
    low, high = sliced.level_layers
    first = high(np.asarray(low(x[:1, 4:]))[:, np.newaxis])
    np.testing.assert_allclose(outputs[:1], first, rtol=1e-5, atol=1e-6)
    second = high(np.stack([low(x[1:, 2:4]), low(x[1:, 4:])], axis=1))
    np.testing.assert_allclose(outputs[1:], second, rtol=1e-5, atol=1e-6)


def test_mask_of_an_embedding_reaches_it():
    model = keras.Sequential(
        [
            keras.Input((8,), dtype="int32"),
            layers.Embedding(5, 4, mask_zero=True),
            SlicedRNN(layers.GRU(3), 2, 1, name="sliced"),
        ]
    )
    tokens = np.array([[0, 0, 0, 0, 1, 2, 3, 4]])
    x = model.layers[0](tokens)
    expected = model.get_layer("sliced")(x, mask=tokens != 0)
    np.testing.assert_allclose(model(tokens), expected, rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_trains_and_survives_save_and_load(jit, tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 4))
    x = SlicedRNN(layers.GRU(8, kernel_regularizer="l2"), slices=2, levels=3, name="s")(inputs)
    model = keras.Model(inputs, layers.Dense(1)(x))
    model.compile(keras.optimizers.Adam(0.03), "mse", jit_compile=jit)
    x = sequences(64, 16)
    history = model.fit(x, x[:, 0, :1], epochs=25, verbose=0).history["loss"]
    assert history[-1] < 0.3 * history[0]
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    assert loaded.get_layer("s").get_config() == model.get_layer("s").get_config()


@each
def test_each_level_is_copied_and_loaded_with_its_own_shapes(make, tmp_path):
    inputs = keras.Input((8, 5))
    template = make()
    template.build((None, 8, 5))  # which must not decide on the shapes of the upper levels
    model = keras.Model(inputs, SlicedRNN(template, 2, 2, name="s")(inputs))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    x = sequences(steps=8, features=5)
    np.testing.assert_array_equal(loaded(x), model(x))
    copied = keras.models.clone_model(model)
    copied.set_weights(model.get_weights())
    np.testing.assert_array_equal(copied(x), model(x))


def test_half_precision_is_the_templates():
    half = SlicedRNN(layers.GRU(3, dtype="mixed_bfloat16"), 2, 1)
    x = sequences(steps=8)
    assert keras.backend.standardize_dtype(half(x).dtype) == "bfloat16"
    full = SlicedRNN(layers.GRU(3), 2, 1)
    full.build(x.shape)
    full.set_weights(half.get_weights())
    np.testing.assert_allclose(keras.ops.cast(half(x), "float32"), full(x), atol=0.05)
    assert half.compute_output_spec(keras.KerasTensor(x.shape)).dtype == "bfloat16"


@pytest.mark.parametrize(("name", "gates"), [("SimpleRNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_macs_are_those_of_the_levels(name, gates):
    inputs = keras.Input((12, 4))
    model = keras.Model(inputs, SlicedRNN(TEMPLATES[name](), 2, 1)(inputs))
    # Level 0: 12 steps of 4 x 3 and 3 x 3 a gate; level 1: 2 steps of 3 x 3 twice.
    assert count(model).macs == gates * (12 * (4 * 3 + 3 * 3) + 2 * (3 * 3 + 3 * 3))


@pytest.mark.parametrize("name", ["GRU", "LSTM", "SimpleRNN", "QRNN"])
def test_tflite(name, tmp_path):
    arguments = {} if name == "QRNN" else {"unroll": True}
    inputs = keras.Input((8, 4))
    model = keras.Model(inputs, SlicedRNN(TEMPLATES[name](**arguments), 2, 1)(inputs))
    data = sequences(64, 8)
    expected = np.asarray(model(data))
    floats = to_tflite(model, tmp_path / "f.tflite").path
    np.testing.assert_allclose(TFLiteModel(floats).predict(data), expected, atol=1e-4)
    artifact = to_tflite(model, tmp_path / "i.tflite", "int8", representative_data=data)
    # The converter may leave the splits of products for several gates in float: now it does, and
    # the next time, of the same model, it does not.
    assert artifact.float_tensors == () or name in ("GRU", "LSTM")
    error = np.abs(TFLiteModel(artifact.path).predict(data) - expected) / expected.std()
    assert error.mean() < 0.08


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SlicedRNN(layers.Dense(3)), TypeError, "needs a recurrent layer .* got Dense"),
        (lambda: SlicedRNN("gru"), TypeError, "layer must be Layer"),
        (lambda: SlicedRNN(layers.GRU(3, return_sequences=True)), ValueError, "last output only"),
        (lambda: SlicedRNN(layers.GRU(3, stateful=True)), ValueError, "stateful=True"),
        (lambda: SlicedRNN(layers.GRU(3), 0), ValueError, "slices must be above 0"),
        (lambda: SlicedRNN(layers.GRU(3), 2.5), TypeError, "slices must be int or integer"),
        (lambda: SlicedRNN(layers.GRU(3), 2, 1.5), TypeError, "levels must be int or integer"),
        (
            lambda: SlicedRNN(layers.GRU(3), dtype="mixed_bfloat16"),
            ValueError,
            "template's dtype, 'float32', but got dtype='mixed_bfloat16'",
        ),
        (lambda: SlicedRNN(layers.GRU(3), 2, -1), ValueError, "levels must be 0 or above"),
        (
            lambda: SlicedRNN(layers.GRU(3), 2, 2, name="s")(keras.Input((10, 4))),
            ValueError,
            r"'s' cuts sequences into 4 parts .* got 10 steps. Pad them in front to 12 .*\(\(2, 0",
        ),
        (lambda: SlicedRNN(layers.GRU(3))(keras.Input((None, 4))), ValueError, "time and features"),
    ],
)
def test_wrong_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
