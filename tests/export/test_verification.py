"""Figures of the comparison, what is refused, and the audit of a file."""

import dataclasses
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from tests.export import networks
from tests.export.networks import samples
from tfaccel.export import Verification, audit, to_tflite, verify
from tfaccel.export.verification import check_verified, distance
from tfaccel.quantization import quantize_aware

IMAGE = (12, 12, 3)


def shifted(model, by):
    """The same model with `by` added to its last biases."""
    other = keras.models.clone_model(model)
    weights = model.get_weights()
    other.set_weights([*weights[:-1], weights[-1] + np.asarray(by, "float32")])
    return other


def test_figures_are_those_of_the_difference(tmp_path):
    model, x = networks.plain(), samples(20, *IMAGE)
    path = to_tflite(model, tmp_path / "m.tflite").path
    expected = np.asarray(model(x))
    # The file lacks what is added here to two of five outputs: errors are 0.5 and 1000.
    found = verify(path, shifted(model, [0, 0.5, 0, 0, 1000]), x)
    assert found.samples == 20
    assert found.max_abs_error == pytest.approx(1000, abs=1e-3)
    assert found.mean_abs_error == pytest.approx(1000.5 / 5, abs=1e-3)
    after = expected + np.array([0, 0.5, 0, 0, 1000])
    assert found.largest_output == pytest.approx(np.abs(after).max(), rel=1e-5)
    assert found.mean_abs_output == pytest.approx(np.abs(after).mean(), rel=1e-5)
    # Keras now says class 4 for every sample.
    assert found.top1_agreement == np.mean(expected.argmax(-1) == 4) < 0.9


def test_nan_is_infinitely_far_off(tmp_path):
    model, x = networks.plain(), samples(20, *IMAGE)
    path = to_tflite(shifted(model, [0, np.nan, 0, 0, 0]), tmp_path / "m.tflite").path
    assert verify(path, model, x).max_abs_error == np.inf
    ours, expected = np.array([1.0, np.inf, np.inf, np.nan]), np.array([3.0, np.inf, 1.0, np.nan])
    np.testing.assert_array_equal(distance(ours, expected), [2.0, 0.0, np.inf, np.inf])


def test_maps_are_no_classes(tmp_path):
    model = keras.Sequential([keras.Input((4, 4, 3)), layers.Conv2D(3, 1)])
    path = to_tflite(model, tmp_path / "m.tflite").path
    assert verify(path, model, samples(4, 4, 4, 3)).top1_agreement is None


GOOD = Verification(
    samples=64,
    max_abs_error=1e-5,
    mean_abs_error=1e-6,
    largest_output=1.0,
    mean_abs_output=0.5,
    top1_agreement=1.0,
)
REFUSED = {
    "nan": ("float32", {"max_abs_error": float("inf")}),
    "nan_in_int8": ("int8", {"max_abs_error": float("inf")}),
    "float32_off": ("float32", {"max_abs_error": 2e-3}),
    "float16_off": ("float16", {"max_abs_error": 0.04}),
    "other_classes": ("int8", {"top1_agreement": 0.4}),
    "never_agrees": ("dynamic_int8", {"top1_agreement": 0.0}),
    "wild": ("int8", {"mean_abs_error": 0.3, "top1_agreement": None}),
}
KEPT = {
    "float16_rounding": ("float16", {"max_abs_error": 0.02}),
    "int8_rounding": ("int8", {"max_abs_error": 0.2, "mean_abs_error": 0.05}),
    "classes_of_few": ("int8", {"top1_agreement": 0.4, "samples": 15}),
    "no_classes": ("int8", {"top1_agreement": None}),
}


@pytest.mark.parametrize(("scheme", "figures"), REFUSED.values(), ids=REFUSED)
def test_refused(scheme, figures):
    with pytest.raises(ValueError, match=r"'m.tflite' was not kept: as .* outputs are up to"):
        check_verified(dataclasses.replace(GOOD, **figures), scheme, Path("m.tflite"))


@pytest.mark.parametrize(("scheme", "figures"), KEPT.values(), ids=KEPT)
def test_kept(scheme, figures):
    check_verified(dataclasses.replace(GOOD, **figures), scheme, Path("m.tflite"))


def test_overflow_in_half_precision_is_refused_and_the_old_file_stays(tmp_path):
    model = networks.plain()
    model.set_weights([w * 1e6 for w in model.get_weights()])  # float16 ends at 65,504
    path = tmp_path / "m.tflite"
    path.write_bytes(b"older file")
    with pytest.raises(ValueError, match=r"'m\.tflite' was not kept: as float16"):
        to_tflite(model, path, "float16", verify_data=samples(4, *IMAGE))
    assert path.read_bytes() == b"older file"
    assert [file.name for file in tmp_path.iterdir()] == ["m.tflite"]


def test_ranges_from_other_data_are_refused_with_figures(tmp_path):
    x = samples(64, *IMAGE)
    with pytest.raises(ValueError, match=r"top-1 agreement \d.*64 samples. Give more represent"):
        to_tflite(
            networks.plain(),
            tmp_path / "m.tflite",
            "int8",
            representative_data=1e-3 * x,
            verify_data=x,
        )
    assert not list(tmp_path.iterdir())


def test_quantization_aware_model_agrees_to_one_step(tmp_path):
    keras.utils.set_random_seed(0)
    aware = quantize_aware(networks.plain())
    aware.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = samples(64, *IMAGE)
    aware.fit(x, np.arange(64) % 5, batch_size=16, verbose=0)
    for io_dtype in ("int8", "uint8", "float32"):
        artifact = to_tflite(aware, tmp_path / "m.tflite", io_dtype=io_dtype, verify_data=x)
        assert (artifact.scheme, artifact.io_dtype) == ("int8", io_dtype)
        assert artifact.float_tensors == ()
        step = (float(aware.layers[-1].maximum) - float(aware.layers[-1].minimum)) / 255
        assert artifact.verification.max_abs_error <= 1.001 * step
    assert verify(artifact.path, aware, x) == artifact.verification


def test_audit_reads_the_grid_of_a_kernel(tmp_path):
    model, x = networks.plain(), samples(64, *IMAGE)
    path = to_tflite(model, tmp_path / "m.tflite", "int8", representative_data=x).path
    found = audit(path)
    assert found.float_tensors == ()
    largest = np.abs(model.get_layer("second").get_weights()[0]).max(axis=(0, 1, 2))
    (kernel,) = [
        tensor
        for tensor in found.quantized_tensors.values()
        if tensor.dtype == "int8" and np.allclose(tensor.scales[:1], largest[0] / 127, rtol=1e-5)
    ]
    np.testing.assert_allclose(kernel.scales, largest / 127, rtol=1e-5)
    assert (kernel.zero_points, kernel.axis) == ((0,) * 8, 0)
    biases = [t for t in found.quantized_tensors.values() if t.dtype == "int32"]
    assert len(biases) == 3


def test_audit_sees_into_loops(tmp_path):
    path = to_tflite(networks.recurrent(layers.LSTM), tmp_path / "m.tflite").path
    outer = len(audit(path).float_tensors)
    dense = keras.Sequential([keras.Input((6, 4)), layers.Flatten(), layers.Dense(3)])
    assert outer > 15 > len(audit(to_tflite(dense, tmp_path / "n.tflite").path).float_tensors)


READERS = {
    "audit": audit,
    "verify": lambda path: verify(path, networks.plain(), samples(2, *IMAGE)),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_missing_foreign_and_cut_off_files(read, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read(tmp_path / "none.tflite")
    whole = to_tflite(networks.plain(), tmp_path / "m.tflite").path.read_bytes()
    (tmp_path / "cut.tflite").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "foreign.tflite").write_bytes(b"not a flatbuffer")
    with pytest.raises(ValueError, match=r"cut.tflite'.*may be cut"):
        read(tmp_path / "cut.tflite")
    with pytest.raises(ValueError, match=r"is not a \.tflite file"):
        read(tmp_path / "foreign.tflite")


def test_verify_checks_its_arguments(tmp_path):
    path = to_tflite(networks.plain(), tmp_path / "m.tflite").path
    with pytest.raises(ValueError, match=r"data must hold samples.*12, 12, 3\], but got \[2, 5\]"):
        verify(path, networks.plain(), samples(2, 5))
    with pytest.raises(TypeError, match=r"verify\(\) needs a keras.Model, but got str"):
        verify(path, "plain.keras", samples(2, *IMAGE))
    with pytest.raises(ValueError, match="takes \\[batch, 12, 12, 3\\]"):
        verify(path, networks.nested(), samples(2, 8, 8, 4))
