"""Whether a .tflite file does what the Keras model does, and how much of it is quantized."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfaccel.core import keras_private
from tfaccel.core.checks import check_file, check_model
from tfaccel.export.freezing import to_float32
from tfaccel.export.samples import Array, gather_samples
from tfaccel.measurement.interpreter import TFLiteModel

_BATCH = 64
# The largest error, as a share of the largest output, that float arithmetic explains.
_TOLERANCES = {"float32": 1e-3, "float16": 3e-2}
# Below these an 8-bit file is not inexact but wrong.
_LEAST_AGREEMENT, _LEAST_SAMPLES = 0.5, 16
_MOST_MEAN_ERROR = 0.5


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far the outputs of a .tflite file are from those of the Keras model.

    Attributes:
        samples: how many were compared.
        max_abs_error: the largest difference of an output; infinite if the file gives NaN.
        mean_abs_error: the mean difference, likewise.
        largest_output: the largest output of Keras, in absolute value, to hold the largest error
            against.
        mean_abs_output: the mean output of Keras, in absolute value, to hold the mean error
            against.
        top1_agreement: share of samples for which both name the same class, over all outputs
            [batch, classes] with two or more classes; None if there is no such output.
    """

    samples: int
    max_abs_error: float
    mean_abs_error: float
    largest_output: float
    mean_abs_output: float
    top1_agreement: float | None


def verify(path: str | os.PathLike[str], model: keras.Model, data: Any) -> Verification:
    """Compares a .tflite file with the Keras model that it was exported from.

    Args:
        path: the file.
        model: a built Functional or Sequential model; a quantization-aware one rounds as in
            inference, one in mixed precision is compared in float32, as it is exported.
        data: an array [samples, ...], for several inputs a list of such or a dict by input name, or
            an iterable of batches. At most 512 samples are used.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the model is subclassed.
        ValueError: it is no .tflite file, or the data does not fit the model or the file.
    """
    check_file(path, "verify", suffixes=(".tflite",))
    check_model(model, "verify")
    return compare(path, to_float32(model), gather_samples(model, data, "data"))


def compare(path: str | os.PathLike[str], model: keras.Model, samples: list[Array]) -> Verification:
    """Compares a .tflite file with a model in float32, on one array per input."""
    file = TFLiteModel(path)
    found = file.predict(samples if len(samples) > 1 else samples[0])
    pairs = list(
        zip(
            [array.astype(np.float64) for array in (found if isinstance(found, list) else [found])],
            _predict(model, samples, file.inputs[0].shape[0]),
            strict=True,
        )
    )
    errors = np.concatenate([distance(ours, keras_s).ravel() for ours, keras_s in pairs])
    outputs = np.abs(np.concatenate([keras_s.ravel() for _, keras_s in pairs]))
    votes = [
        ours.argmax(-1) == keras_s.argmax(-1)
        for ours, keras_s in pairs
        if keras_s.ndim == 2 and keras_s.shape[-1] > 1
    ]
    return Verification(
        samples=len(samples[0]),
        max_abs_error=float(errors.max()),
        mean_abs_error=float(errors.mean()),
        largest_output=float(outputs.max()),
        mean_abs_output=float(outputs.mean()),
        top1_agreement=float(np.concatenate(votes).mean()) if votes else None,
    )


def _predict(model: keras.Model, samples: list[Array], portion: int) -> list[Array]:
    structure = keras_private.functional_of(model).input
    fixed = model.inputs[0].shape[0]
    step = fixed or max(_BATCH, portion)
    parts = []
    for begin in range(0, len(samples[0]), step):
        batch = [array[begin : begin + step] for array in samples]
        missing = step - len(batch[0]) if fixed else 0
        padded = [np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]) for a in batch]
        outputs = model(keras.tree.pack_sequence_as(structure, padded), training=False)
        arrays = [keras.ops.convert_to_numpy(value) for value in keras.tree.flatten(outputs)]
        parts.append([array[: len(batch[0])].astype(np.float64) for array in arrays])
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def distance(ours: Array, expected: Array) -> Array:
    """Returns |ours - expected|: zero for equal infinities, infinite where one is NaN."""
    with np.errstate(invalid="ignore"):
        apart = np.where(ours == expected, 0.0, np.abs(ours - expected))
    return np.where(np.isnan(apart), np.inf, apart)


def check_verified(verification: Verification, scheme: str, path: Path) -> None:
    """Refuses a file whose outputs rounding cannot explain.

    Raises:
        ValueError: an output is not finite, a float file is off, or an 8-bit file names other
            classes for most of 16 or more samples, or is off by half of its outputs on average.
    """
    v = verification
    agreement = 1.0 if v.top1_agreement is None else v.top1_agreement
    if not np.isfinite(v.max_abs_error):
        wrong = True
    elif scheme in _TOLERANCES:
        wrong = v.max_abs_error > _TOLERANCES[scheme] * max(v.largest_output, 1e-6)
    else:
        differs = v.samples >= _LEAST_SAMPLES and agreement < _LEAST_AGREEMENT
        wrong = differs or v.mean_abs_error > _MOST_MEAN_ERROR * v.mean_abs_output
    if wrong:
        share = "" if v.top1_agreement is None else f", top-1 agreement {v.top1_agreement:.1%}"
        remedy = (
            "A layer converts wrongly, overflows or draws random numbers: export parts of the "
            "model to find it."
            if scheme in _TOLERANCES
            else "Give more representative data, train quantization-aware, or use scheme='float16'."
        )
        raise ValueError(
            f"{path.name!r} was not kept: as {scheme} its outputs are up to {v.max_abs_error:.3g}, "
            f"on average {v.mean_abs_error:.3g}, from Keras's (largest {v.largest_output:.3g}, on "
            f"average {v.mean_abs_output:.3g}){share} on {v.samples} samples. {remedy}"
        )
