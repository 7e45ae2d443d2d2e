import dataclasses
import json

import keras
import numpy as np
import pytest
from keras import layers

from tests.measurement.tflite_samples import classifier, convert, images
from tfaccel.measurement import Measurement, measure

FAST = {"runs": 3, "warmup": 1}


@pytest.fixture(scope="module")
def model():
    return classifier()


@pytest.fixture(scope="module")
def data(model):
    """Ten samples; the labels are what the model says, but for the last three."""
    x = images(10)
    labels = np.asarray(model(x)).argmax(axis=-1)
    labels[7:] = (labels[7:] + 1) % 4
    return x, labels


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return convert(model, tmp_path_factory.mktemp("measure") / "small.tflite")


def test_a_tflite_file_has_every_figure(file, data):
    record = measure(file, data, threads=2, **FAST)
    assert (record.name, record.format, record.threads) == ("small", "tflite", 2)
    assert (record.accuracy, record.samples) == (0.7, 10)
    assert (record.parameters, record.macs, record.sparsity) == (256, 11256, 0.0)
    assert record.size_bytes == file.stat().st_size
    assert 0 < record.gzip_bytes < record.size_bytes
    assert 0 < record.latency_ms <= record.latency_p95_ms
    assert record.latency_threads_ms > 0
    assert record.peak_memory_bytes > 0
    assert Measurement(**json.loads(json.dumps(dataclasses.asdict(record)))) == record


def test_a_tflite_file_without_data(file):
    record = measure(file, name="other", **FAST)
    assert record.name == "other"
    assert (record.accuracy, record.samples, record.latency_threads_ms) == (None, None, None)
    assert record.latency_ms > 0


def test_a_quantized_file_is_accurate_by_its_real_outputs(model, data, tmp_path):
    path = convert(model, tmp_path / "m.tflite", scheme="int8", io_dtype="uint8")
    assert measure(path, data, **FAST).accuracy == pytest.approx(0.7, abs=0.1)


def test_a_file_with_a_larger_batch_is_timed_too(model, data, tmp_path):
    record = measure(convert(model, tmp_path / "m.tflite", batch=4), data, **FAST)
    assert record.accuracy == 0.7
    assert record.latency_ms > 0


@pytest.mark.parametrize("as_file", [True, False])
def test_a_keras_model(model, data, as_file, tmp_path):
    path = tmp_path / "saved.keras"
    model.save(path)
    record = measure(path if as_file else model, data, **FAST)
    assert record.name == ("saved" if as_file else model.name)
    assert record.format == "keras"
    assert (record.accuracy, record.parameters, record.macs) == (0.7, 256, 11256)
    assert record.size_bytes == pytest.approx(path.stat().st_size, rel=0.05)
    assert record.latency_ms > 0
    assert (record.latency_threads_ms, record.peak_memory_bytes) == (None, None)


def test_batches_of_tf_data(file, data):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(data).batch(4)
    assert measure(file, dataset, **FAST).accuracy == 0.7


def test_a_generator_is_read_once(model, data):
    batches = ((data[0][i : i + 4], data[1][i : i + 4]) for i in range(0, 10, 4))
    assert measure(model, batches, **FAST).accuracy == 0.7


def test_the_model_is_left_as_it_was(model):
    before = [weight.copy() for weight in model.get_weights()]
    measure(model, **FAST)
    assert model.predict_function is None
    for weight, was in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, was)


def test_open_sizes_are_taken_from_the_data():
    inputs = keras.Input((None, None, 3))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 1)(inputs))
    model = keras.Model(inputs, x)
    assert (measure(model, **FAST).macs, measure(model, **FAST).latency_ms) == (None, None)
    record = measure(model, (images(2, (6, 5, 3)), [0, 1]), **FAST)
    assert record.macs == 30 * 12
    assert record.latency_ms > 0


def test_several_inputs_and_whole_numbers(tmp_path):
    tokens, rest = keras.Input((5,), dtype="int32", name="tokens"), keras.Input((3,), name="rest")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(10, 4)(tokens))
    model = keras.Model(
        {"tokens": tokens, "rest": rest}, layers.Dense(2)(layers.Concatenate()([x, rest]))
    )
    assert measure(model, **FAST).latency_ms > 0
    x = {"tokens": np.ones((2, 5), "int32"), "rest": images(2, (3,))}
    record = measure(model, [(x, np.array([0, 1]))], **FAST)
    assert record.samples == 2


def test_bad_data_are_refused(file, model, data):
    x, y = data
    for target in (file, model):
        with pytest.raises(ValueError, match="data set is empty"):
            measure(target, (x[:0], y[:0]), **FAST)
        with pytest.raises(ValueError, match="Labels must be"):
            measure(target, (x, np.zeros((10, 2))), **FAST)
        with pytest.raises(TypeError, match=r"\(x, y\) arrays"):
            measure(target, x, **FAST)


@pytest.mark.parametrize("arguments", [{"threads": 0}, {"runs": 0}])
def test_bad_arguments_are_refused(file, arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be above 0"):
        measure(file, **arguments)


class Own(keras.Model):
    def call(self, inputs):
        return inputs


def test_bad_models_and_files_are_refused(file, tmp_path):
    with pytest.raises(TypeError, match="subclassed"):
        measure(Own())
    with pytest.raises(TypeError, match=r"needs a keras\.Model"):
        measure(None)
    with pytest.raises(ValueError, match="no weights yet"):
        measure(keras.Sequential([layers.Dense(2)]))
    with pytest.raises(FileNotFoundError, match="no file"):
        measure(tmp_path / "missing.tflite")
    with pytest.raises(ValueError, match=r"reads \.keras or \.tflite files"):
        measure(__file__)
    cut = tmp_path / "cut.tflite"
    cut.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="cut off"):
        measure(cut)
    foreign = tmp_path / "foreign.keras"
    foreign.write_bytes(b"no zip archive")
    with pytest.raises(ValueError, match=r"not a whole \.keras file"):
        measure(foreign)


def test_prints_nothing(file, data, capfd):
    measure(file, data, threads=2, **FAST)
    seen = capfd.readouterr()
    assert (seen.out, seen.err) == ("", "")
