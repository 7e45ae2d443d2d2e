"""What does not convert: which layer, and what to do."""

import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from keras import layers

from tests.export import networks
from tests.export.networks import samples
from tfaccel.export import to_tflite
from tfaccel.export.diagnosis import explain
from tfaccel.quantization import quantize_aware


@keras.saving.register_keras_serializable("tfaccel_tests")
class Svd(layers.Layer):
    def call(self, inputs):
        return keras.ops.svd(inputs, compute_uv=False)


@keras.saving.register_keras_serializable("tfaccel_tests")
class Noisy(layers.Layer):
    def call(self, inputs):
        return inputs + keras.random.normal((3,), seed=1)


@keras.saving.register_keras_serializable("tfaccel_tests")
class Counting(layers.Layer):
    def build(self, input_shape):
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs):
        self.count.assign_add(1.0)
        return inputs + self.count


def around(layer, shape=(3, 3)):
    """A model in whose midst a layer stands."""
    inputs = keras.Input(shape, name="image")
    x = layer(layers.Dense(3, name="before")(inputs))
    return keras.Model(inputs, layers.Dense(2, name="after")(x), name="odd")


def free_sizes():
    model = [keras.Input((None, None, 3), name="image"), layers.Conv2D(2, 3), layers.Conv2D(2, 3)]
    return keras.Sequential(model, name="odd")


def nested():
    inputs = keras.Input((3, 3), name="image")
    return keras.Model(inputs, around(Svd(name="deep one"))(inputs), name="outside")


def outside_layers():
    inputs = keras.Input((4,), name="image")
    return keras.Model(inputs, keras.ops.argmax(inputs, -1), name="odd")


REFUSED = {
    "operator": (
        lambda: around(Svd(name="svd")),
        {},
        r"'odd'.* 'svd' \(Svd\) \(tf\.Svd\).*no such",
    ),
    "odd_name": (lambda: around(Svd(name="s v:d")), {}, r"at layer 's v:d' \(Svd\) \(tf\.Svd\)"),
    "nested": (nested, {}, r"'outside' does not convert.* at layer 'deep one' \(Svd\)"),
    "random": (lambda: around(Noisy(name="noisy")), {}, r"'noisy' \(Noisy\).*no random numbers"),
    "state": (lambda: around(Counting(name="count")), {}, r"'count' \(Counting\).*its own state"),
    "stateful": (
        lambda: keras.Sequential(
            [keras.Input(batch_shape=(1, 6, 4)), layers.LSTM(3, stateful=True, name="memory")]
        ),
        {},
        r"at layer 'memory' \(LSTM\).*stateful=False",
    ),
    "loop_in_int8": (
        lambda: networks.recurrent(layers.LSTM),
        {"scheme": "int8", "representative_data": samples(8, 6, 4)},
        r"at layer 'memory' \(LSTM\).*cannot be calibrated.*unroll=True",
    ),
    "loop_for_any_batch": (
        lambda: networks.recurrent(layers.GRU),
        {"batch_size": None},
        r"at layer 'memory' \(GRU\).*Leave batch_size at 1",
    ),
    "outside_layers": (outside_layers, {}, r"at one of the operations 'argmax' \(tf\.BitwiseAnd\)"),
    "free_sizes": (free_sizes, {}, r"LiteRT cannot run it.*Input 'image' has free sizes"),
    "text": (
        lambda: keras.Sequential(
            [
                keras.Input((), dtype="string", name="words"),
                layers.TextVectorization(vocabulary=["a"], output_sequence_length=2),
            ]
        ),
        {},
        "Input 'words' .* takes text",
    ),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("make_model", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_error_names_layer_and_remedy_and_leaves_nothing(make_model, options, message, tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match=message) as caught:
        to_tflite(model, tmp_path / "m.tflite", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_layer_is_told_from_others_of_like_names():
    text = "loc(\"model/odd_1/ab_c_1/Svd\"): 'tf.Svd' op is neither a custom op nor a flex op"
    scopes = {"ab.c": "'ab.c'", "ab": "'ab'", "ab_c": "'ab_c'", "c": "'c'"}
    error = explain(RuntimeError(text), networks.plain(), "float32", scopes)
    assert str(error).startswith("'plain' does not convert to float32 .tflite at layer 'ab_c' (tf.")


def test_unknown_failure_says_its_first_line_and_how_to_see_more():
    text = '<unknown>:0: error: loc("x"): it is broken.\nMore.\n'
    error = explain(RuntimeError(text), networks.plain(), "int8", {})
    assert str(error) == (
        "'plain' does not convert to int8 .tflite: it is broken. "
        "Export with verbose=True to see all that the converter says."
    )


def test_model_that_keras_has_quantized_is_refused(tmp_path):
    model = networks.plain()
    model.get_layer("logits").quantize("int8")
    with pytest.raises(ValueError, match=r"'logits' was quantized by Keras \(int8\)"):
        to_tflite(model, tmp_path / "m.tflite")


@pytest.mark.parametrize(("layer", "end"), [("first", "image"), ("logits", "logits")])
def test_integer_ends_of_a_float_layer_are_refused(layer, end, tmp_path):
    aware = quantize_aware(networks.plain(), exclude=layer)
    aware.compile("sgd", "mse")
    aware.fit(samples(16, 12, 12, 3), np.zeros((16, 5)), verbose=0)
    with pytest.raises(ValueError, match=f"io_dtype='int8' cannot be had: '{end}' would stay"):
        to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8")
    assert not list(tmp_path.iterdir())
    assert to_tflite(aware, tmp_path / "m.tflite").float_tensors


def test_places_that_cannot_be_written_to_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("tfaccel.export.conversion.prepare", None)
    (tmp_path / "file").write_text("here")
    (tmp_path / "folder.tflite").mkdir()
    with pytest.raises(NotADirectoryError, match=r"A part of .* is a file, not a folder"):
        to_tflite(networks.plain(), tmp_path / "file" / "m.tflite")
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
        to_tflite(networks.plain(), tmp_path / "folder.tflite")


def test_models_that_are_none(tmp_path):
    path = tmp_path / "m.tflite"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        to_tflite(tmp_path / "none.keras", path)
    networks.plain().save(tmp_path / "cut.keras")
    whole = (tmp_path / "cut.keras").read_bytes()
    (tmp_path / "cut.keras").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"is not a whole \.keras file"):
        to_tflite(tmp_path / "cut.keras", path)
    with pytest.raises(ValueError, match="has no weights yet"):
        to_tflite(keras.Sequential([layers.Dense(2)]), path)

    class Own(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(TypeError, match=r"subclassed Own.*keras\.Model\(inputs, outputs\)"):
        to_tflite(Own(), path)
    assert not path.exists()


def test_another_backend_is_refused(tmp_path):
    script = """
        import os, sys
        os.environ["KERAS_BACKEND"] = "jax"
        import keras
        from tfaccel.export import to_tflite
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        try:
            to_tflite(model, sys.argv[1])
        except ValueError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "m.tflite")],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert "needs Keras on TensorFlow, but the backend is 'jax'" in done.stdout
