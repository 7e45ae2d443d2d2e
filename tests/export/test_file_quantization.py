"""A float .tflite file becomes a quantized one."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.quantization.networks import images, network
from tfaccel.export import audit, quantize_file, to_tflite
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.quantization.calibration import MinMax, Percentile

STATIC = ("int8", "int16x8", "int4")


def body(x):
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="stem")(x)
    x = layers.DepthwiseConv2D(3, activation="relu", name="depthwise")(x)
    x = layers.Conv2D(16, 1, activation="relu", name="pointwise")(x)
    return layers.Dense(4, name="logits")(layers.Flatten(name="flat")(x))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "float.tflite"
    return to_tflite(network(body), path).path


def kernels(path):
    return sorted(
        t.dtype
        for t in audit(path).quantized_tensors.values()
        if len(t.scales) > 1 and t.dtype not in ("int32", "int64")
    )


@pytest.mark.parametrize(
    ("scheme", "most", "share"),
    [
        ("float16", 1e-3, 0.75),
        ("dynamic_int8", 0.05, 0.6),
        ("int8", 0.05, 0.6),
        ("int16x8", 0.05, 0.6),
        ("int4", 0.5, 0.6),
        ("int4_weight_only", 0.5, 0.5),
    ],
)
def test_outputs_stay_near_and_the_file_gets_small(scheme, most, share, source, tmp_path):
    data = images(32) if scheme in STATIC else None
    artifact = quantize_file(source, tmp_path / "q.tflite", scheme, data)
    x = images(16, 5)
    expected, found = (TFLiteModel(path).predict(x) for path in (source, artifact.path))
    assert 0 < np.abs(found - expected).max() < most * np.ptp(expected)
    assert artifact.size_bytes < share * source.stat().st_size
    assert (artifact.scheme, artifact.io_dtype, artifact.float_tensors) == (scheme, "float32", ())
    if scheme in STATIC:
        wanted = ["int4", "int8", "int8", "int8"] if scheme == "int4" else ["int8"] * 4
        assert kernels(artifact.path) == wanted


def test_ranges_are_those_of_the_calibrator(source, tmp_path):
    """The grid of the input, by what a calibrator makes of the samples."""
    x = images(32)
    x[0, 0, 0, 0] = 100.0  # one value in 6,144
    steps = {}
    for calibrator in (MinMax(), Percentile(99.9)):
        path = quantize_file(
            source, tmp_path / "q.tflite", "int8", x, calibrator=calibrator, io_dtype="int8"
        ).path
        steps[type(calibrator)] = TFLiteModel(path).inputs[0].scale
    assert steps[MinMax] == pytest.approx((100 - x.min()) / 255, rel=1e-3)
    assert steps[Percentile] < 0.5 * steps[MinMax]


def test_inputs_and_outputs_in_integers(source, tmp_path):
    for scheme, kind in (("int8", "int8"), ("int16x8", "int16")):
        path = quantize_file(source, tmp_path / "q.tflite", scheme, images(16), io_dtype=kind).path
        file = TFLiteModel(path)
        assert {info.dtype for info in (*file.inputs, *file.outputs)} == {np.dtype(kind)}


def test_several_inputs_by_name_or_in_order(tmp_path):
    first, second = keras.Input((6,), name="first"), keras.Input((3,), name="second")
    joined = layers.Concatenate(name="join")([layers.Dense(3, name="a")(first), second])
    model = keras.Model([first, second], layers.Dense(2, name="b")(joined))
    source = to_tflite(model, tmp_path / "two.tflite").path
    random = np.random.default_rng(0)
    x = [random.normal(size=(20, n)).astype("float32") for n in (6, 3)]
    in_order = quantize_file(source, tmp_path / "a.tflite", "int8", x)
    by_name = quantize_file(source, tmp_path / "b.tflite", "int8", {"second": x[1], "first": x[0]})
    assert in_order.sha256 == by_name.sha256
    expected = np.asarray(model(x))
    assert np.abs(TFLiteModel(in_order.path).predict(x) - expected).max() < 0.05 * np.ptp(expected)


def test_nonsense_is_refused(source, tmp_path):
    path, x = tmp_path / "q.tflite", images(8)
    with pytest.raises(FileNotFoundError):
        quantize_file(tmp_path / "none.tflite", path, "int8", x)
    with pytest.raises(ValueError, match="scheme must be one of"):
        quantize_file(source, path, "int5", x)
    with pytest.raises(ValueError, match="int8 needs calibration_data="):
        quantize_file(source, path, "int8")
    with pytest.raises(ValueError, match="float16 needs no calibration_data"):
        quantize_file(source, path, "float16", x)
    with pytest.raises(ValueError, match="io_dtype must be one of 'float32', 'int8'"):
        quantize_file(source, path, "int4", x, io_dtype="uint8")
    with pytest.raises(ValueError, match=r"writes a \.tflite file"):
        quantize_file(source, tmp_path / "q.bin", "int8", x)
    with pytest.raises(ValueError, match=r"must hold samples of the shapes \[\(8, 8, 3\)\]"):
        quantize_file(source, path, "int8", x[:, :4])
    with pytest.raises(ValueError, match="NaN or an infinity for 'image'"):
        quantize_file(source, path, "int8", np.where(x > 2, np.nan, x))
    with pytest.raises(ValueError, match="lacks"):
        quantize_file(source, path, "int8", {"photo": x})
    quantized = quantize_file(source, path, "int8", x).path
    with pytest.raises(ValueError, match="quantized values already"):
        quantize_file(quantized, tmp_path / "again.tflite", "int8", x)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("batch", "samples"), [(8, 5), (12, 16), (32, 20), (32, 40)])
def test_every_sample_counts_whatever_the_files_batch(batch, samples, tmp_path):
    model = network(body)
    path = to_tflite(model, tmp_path / "float.tflite", batch_size=batch).path
    x = images(samples)
    x[-1, 0, 0, 0] = 50.0
    made = quantize_file(
        path, tmp_path / "q.tflite", "int8", x, calibrator="minmax", io_dtype="int8"
    )
    step = TFLiteModel(made.path).inputs[0].scale
    assert step == pytest.approx((50 - x.min()) / 255, rel=1e-3)


def test_batches_of_a_data_set(source, tmp_path):
    x = images(32)
    flow = tf.data.Dataset.from_tensor_slices((x, np.zeros(32))).batch(8)
    files = [
        quantize_file(source, tmp_path / f"{n}.tflite", "int8", data).path.read_bytes()
        for n, data in enumerate((x, flow))
    ]
    assert files[0] == files[1]
