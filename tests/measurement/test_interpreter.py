import os

import keras
import numpy as np
import pytest

from tests.measurement.tflite_samples import classifier, convert, export_with_signature, images
from tfaccel.measurement import TensorInfo, TFLiteModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tflite")


@pytest.fixture(scope="module")
def model():
    return classifier()


@pytest.fixture(scope="module")
def float_file(model, folder):
    return convert(model, folder / "float.tflite")


def run_by_hand(path, x):
    """Runs each sample in LiteRT itself; quantizes with NumPy only."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    (entry,), (end,) = interpreter.get_input_details(), interpreter.get_output_details()
    outputs = []
    for sample in x:
        value = sample[np.newaxis]
        if entry["dtype"] != np.float32:
            scale, zero_point = entry["quantization"]
            value = np.clip(np.floor(value / scale + 0.5) + zero_point, -128, 255)
        interpreter.set_tensor(entry["index"], value.astype(entry["dtype"]))
        interpreter.invoke()
        output = interpreter.get_tensor(end["index"])[0].astype(np.float32)
        if end["dtype"] != np.float32:
            scale, zero_point = end["quantization"]
            output = (output - zero_point) * scale
        outputs.append(output)
    return np.stack(outputs)


def test_float_outputs_are_those_of_keras(model, float_file):
    x = images(5)
    predicted = TFLiteModel(float_file, threads=2).predict(x)
    assert predicted.dtype == np.float32
    np.testing.assert_allclose(predicted, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("io_dtype", ["int8", "uint8", "float32"])
def test_quantized_ends_take_and_give_real_numbers(model, folder, io_dtype):
    path = convert(model, folder / f"{io_dtype}.tflite", scheme="int8", io_dtype=io_dtype)
    tflite = TFLiteModel(path)
    assert tflite.inputs[0].dtype == tflite.outputs[0].dtype == np.dtype(io_dtype)
    x = images(7)
    predicted = tflite.predict(x)
    assert predicted.dtype == np.float32
    np.testing.assert_allclose(predicted, run_by_hand(path, x), rtol=1e-6, atol=1e-6)
    # Within a few steps of the output's grid of what the float model gives.
    np.testing.assert_allclose(predicted, model(x), atol=0.05 * np.abs(model(x)).max())


def test_a_batch_of_any_size_runs_at_once(model, folder):
    path = convert(model, folder / "free.tflite", batch=None)
    tflite = TFLiteModel(path)
    assert tflite.inputs[0].dynamic_batch
    for count in (3, 1, 6):
        x = images(count, seed=count)
        np.testing.assert_allclose(tflite.predict(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_fixed_batch_runs_in_portions(model, folder):
    path = convert(model, folder / "four.tflite", batch=4)
    tflite = TFLiteModel(path)
    assert not tflite.inputs[0].dynamic_batch
    for count in (1, 4, 6):
        x = images(count)
        np.testing.assert_allclose(tflite.predict(x), model(x), rtol=1e-4, atol=1e-4)


def test_several_inputs_and_outputs_by_name_and_in_order(tmp_path):
    left, right = keras.Input((3,), name="z_left"), keras.Input((2,), name="a_right")
    both = keras.layers.Concatenate()([left, right])
    model = keras.Model(
        [left, right],
        {"dense": keras.layers.Dense(4)(both), "twice": keras.ops.multiply(left, 2.0)},
    )
    path = export_with_signature(model, tmp_path / "saved", tmp_path / "m.tflite")
    tflite = TFLiteModel(path)
    by_name = {"z_left": images(3, (3,)), "a_right": images(3, (2,))}
    expected = model([by_name["z_left"], by_name["a_right"]])
    outputs = tflite.predict(by_name)
    assert {info.name for info in tflite.inputs} == set(by_name)
    for info, output in zip(tflite.outputs, outputs, strict=True):
        np.testing.assert_allclose(output, expected[info.name], rtol=1e-5, atol=1e-5)
    in_order = tflite.predict([by_name[info.name] for info in tflite.inputs])
    for output, again in zip(outputs, in_order, strict=True):
        np.testing.assert_array_equal(output, again)
    with pytest.raises(ValueError, match="The inputs are"):
        tflite.predict({"z_left": by_name["z_left"]})
    with pytest.raises(ValueError, match="has 2 inputs"):
        tflite.predict(by_name["z_left"])
    with pytest.raises(ValueError, match="different numbers of samples"):
        tflite.predict({**by_name, "a_right": images(2, (2,))})


def test_free_length_of_a_sequence(tmp_path):
    import tensorflow as tf

    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    saved = tmp_path / "saved"
    spec = [tf.TensorSpec((None, None, 3), "float32")]
    model.export(saved, input_signature=spec, verbose=False)
    path = tmp_path / "m.tflite"
    path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(str(saved)).convert())
    tflite = TFLiteModel(path)
    for length in (4, 9):
        x = images(2, (length, 3))
        np.testing.assert_allclose(tflite.predict(x), model(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"takes \[batch, any, 3\]"):
        tflite.predict(images(2, (4, 5)))


def test_rounding_is_half_away_from_zero_and_saturates():
    info = TensorInfo("x", (1,), (1,), np.dtype("int8"), 0.5, 10, 0)
    values = np.array([0.25, -0.25, 0.74, -0.75, 1e6, -1e6])
    # In steps of 0.5: 0.5, -0.5, 1.48, -1.5, which round to 1, -1, 1, -2; then 10 is added.
    np.testing.assert_array_equal(info.quantize(values), [11, 9, 11, 8, 127, -128])
    np.testing.assert_array_equal(
        info.dequantize(np.array([11, -128], np.int8)), np.float32([0.5, -69.0])
    )


def test_prints_nothing(float_file, capfd):
    TFLiteModel(float_file).predict(images(2))
    seen = capfd.readouterr()
    assert (seen.out, seen.err) == ("", "")


@pytest.mark.parametrize("kept", [4, 30, 0.3, 0.7, 0.99])
def test_a_file_that_is_cut_off_is_refused(float_file, tmp_path, kept, capfd):
    content = float_file.read_bytes()
    cut = tmp_path / "cut.tflite"
    cut.write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
    with pytest.raises(ValueError, match=r"cut\.tflite"):
        TFLiteModel(cut)
    assert capfd.readouterr().err == ""


def test_foreign_missing_empty_and_wrongly_named_files_are_refused(tmp_path):
    foreign = tmp_path / "foreign.tflite"
    foreign.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match=r"not a \.tflite file"):
        TFLiteModel(foreign)
    with pytest.raises(FileNotFoundError, match="no file"):
        TFLiteModel(tmp_path / "missing.tflite")
    empty = tmp_path / "empty.tflite"
    empty.touch()
    with pytest.raises(ValueError, match="is empty"):
        TFLiteModel(empty)
    with pytest.raises(ValueError, match=r"reads \.tflite files"):
        TFLiteModel(foreign.rename(tmp_path / "model.bin"))


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 8, 8, 1), (8, 8, 3)])
def test_samples_of_another_shape_are_refused(float_file, shape):
    with pytest.raises(ValueError, match=r"takes \[batch, 8, 8, 3\]"):
        TFLiteModel(float_file).predict(np.zeros(shape, "float32"))


def test_no_samples_and_no_threads_are_refused(float_file):
    with pytest.raises(ValueError, match="one sample at least"):
        TFLiteModel(float_file).predict(images(0))
    with pytest.raises(ValueError, match="threads must be above 0"):
        TFLiteModel(float_file, threads=0)


def test_works_with_a_relative_path(float_file, monkeypatch):
    monkeypatch.chdir(float_file.parent)
    assert TFLiteModel(os.path.relpath(float_file)).predict(images(1)).shape == (1, 4)
