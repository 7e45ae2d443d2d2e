"""Whether a .tflite file does what the Keras model does, and how much of it is quantized."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfaccel.core import keras_private
from tfaccel.export.freezing import input_names, output_names
from tfaccel.measurement.interpreter import TFLiteModel

# The largest error, as a share of the largest output, that float arithmetic explains.
_TOLERANCES = {"float32": 1e-3, "float16": 3e-2}
_LEAST_AGREEMENT = 0.5


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far the outputs of a .tflite file are from those of the Keras model.

    Attributes:
        samples: how many were compared.
        max_abs_error: the largest difference of an output.
        mean_abs_error: the mean difference.
        largest_output: the largest output of Keras, in absolute value, to hold the errors against.
        top1_agreement: share of samples for which both name the same class (over all outputs with
            two or more classes); None if there is no such output.
    """

    samples: int
    max_abs_error: float
    mean_abs_error: float
    largest_output: float
    top1_agreement: float | None


def verify(
    path: str | os.PathLike[str], model: keras.Model, data: list[np.ndarray[Any, Any]]
) -> Verification:
    """Compares a .tflite file with a Keras model.

    Args:
        path: the file, exported from `model`.
        model: a Functional or Sequential model; a quantization-aware one rounds as in inference.
        data: one array [samples, ...] per input.
    """
    file = TFLiteModel(path)
    given = dict(zip(input_names(model), data, strict=True))
    names = [info.name for info in file.inputs]
    ours = file.predict([given[n] for n in names] if len(names) > 1 else given[names[0]])
    found = dict(zip([info.name for info in file.outputs], _as_list(ours), strict=True))
    structure = keras_private.functional_of(model).input
    outputs: list[list[np.ndarray[Any, Any]]] = []
    for begin in range(0, len(data[0]), 64):
        batch = [array[begin : begin + 64] for array in data]
        packed = keras.tree.pack_sequence_as(structure, batch)
        raw = keras.tree.flatten(model(packed, training=False))
        outputs.append([np.asarray(keras.ops.convert_to_numpy(value)) for value in raw])
    expected = [np.concatenate(parts).astype(np.float64) for parts in zip(*outputs, strict=True)]
    pairs = [
        (found[n].astype(np.float64), e) for n, e in zip(output_names(model), expected, strict=True)
    ]
    errors = np.concatenate([np.abs(a - b).ravel() for a, b in pairs])
    votes = [a.argmax(-1).ravel() == b.argmax(-1).ravel() for a, b in pairs if b.shape[-1] > 1]
    return Verification(
        samples=len(data[0]),
        max_abs_error=float(errors.max()),
        mean_abs_error=float(errors.mean()),
        largest_output=max(float(np.abs(e).max()) for e in expected),
        top1_agreement=float(np.concatenate(votes).mean()) if votes else None,
    )


def check_verified(verification: Verification, scheme: str, path: Path) -> None:
    """Refuses a file whose outputs rounding cannot explain.

    Raises:
        ValueError: an output is not finite, a float file is off, or most classes differ.
    """
    v = verification
    tolerance = _TOLERANCES.get(scheme)
    limit = None if tolerance is None else tolerance * max(v.largest_output, 1e-6)
    off = not np.isfinite(v.max_abs_error) or (limit is not None and v.max_abs_error > limit)
    differs = v.samples >= 16 and (v.top1_agreement or 1.0) < _LEAST_AGREEMENT
    if off or (limit is None and differs):
        agreement = "none" if v.top1_agreement is None else f"{v.top1_agreement:.1%}"
        raise ValueError(
            f"{path.name!r} was not kept: as {scheme} its outputs are up to {v.max_abs_error:.3g} "
            f"from Keras's (largest output {v.largest_output:.3g}), top-1 agreement {agreement} on "
            f"{v.samples} samples. For int8, give more representative data or train "
            "quantization-aware; for float, a layer converts wrongly: export parts of the model to "
            "find it."
        )


@dataclasses.dataclass(frozen=True)
class Audit:
    """Which values of a .tflite file are float and which are integers.

    Attributes:
        float_tensors: names of the float values and constants inside, inputs and outputs of the
            file apart.
        quantized_tensors: names of those that are integers with a scale.
    """

    float_tensors: tuple[str, ...]
    quantized_tensors: tuple[str, ...]


def audit(path: str | os.PathLike[str]) -> Audit:
    """Reads from a .tflite file what is float and what is quantized, without running it."""
    file = TFLiteModel(path, delegates=False)
    ends = {info.index for info in (*file.inputs, *file.outputs)}
    floats, quantized = [], []
    for tensor in file.tensor_details():
        if np.issubdtype(tensor["dtype"], np.floating) and tensor["index"] not in ends:
            floats.append(tensor["name"])
        elif len(tensor["quantization_parameters"]["scales"]):
            quantized.append(tensor["name"])
    return Audit(tuple(name for name in floats if name), tuple(quantized))


def _as_list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list) else [values]
