"""What a .tflite file holds and computes: nothing in float unless named, operators as trained."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from tfaccel.core.checks import check_file, check_model
from tfaccel.core.graph import flat_layers
from tfaccel.export.agreement import OperatorAgreement, compare_operators
from tfaccel.export.packing import unpack
from tfaccel.export.preparation import prepare
from tfaccel.export.samples import Array, gather_samples
from tfaccel.export.verification import Verification, verify
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.quantization import FakeQuantize, scheme_of

# What is more than a step off in more than so many of its values is no matter of rounding.
_MOST_BEYOND = 0.02


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A value or constant that is stored as integers: real = scale * (integer - zero_point).

    Attributes:
        dtype: "int8", "uint8", "int32" (biases) and so on.
        scales: one, or one per slice along `axis`; none for blocks that have steps of their own.
        zero_points: likewise.
        axis: of the scales, where there are several.
    """

    dtype: str
    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int


@dataclasses.dataclass(frozen=True)
class Audit:
    """Which values of a .tflite file are float, which are integers, and what operators compute.

    Attributes:
        float_tensors: names of the float values and constants inside, inputs and outputs of the
            file apart.
        quantized_tensors: those that are integers with a scale, by name.
        operators: for a file of a quantized model, how far each value that is rounded is from what
            Keras makes of the same inputs.
        missing: Keras layers whose rounded output was not found in the file.
        verification: how far the outputs are from Keras's, if data was given.
    """

    float_tensors: tuple[str, ...]
    quantized_tensors: dict[str, QuantizedTensor]
    operators: tuple[OperatorAgreement, ...] = ()
    missing: tuple[str, ...] = ()
    verification: Verification | None = None

    @property
    def max_steps(self) -> float:
        """The largest difference of an operator, in steps of its output; 0 if none was compared."""
        return max((row.max_steps for row in self.operators), default=0.0)


def audit(
    path: str | os.PathLike[str], model: keras.Model | None = None, data: Any = None
) -> Audit:
    """Says of a .tflite file what is float, what is quantized, and what its operators compute.

    Args:
        path: the file.
        model: the quantized Keras model that the file was exported from. Its operators are then
            compared one by one, each given the integers that the runtime had before it.
        data: samples for that and for the outputs, as in `verify`; by default random inputs within
            the trained range for the operators, and none for the outputs.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the model is subclassed.
        ValueError: it is no .tflite file, the model is not quantized or a range was never learnt,
            or the data does not fit.
    """
    found = read_audit(path)
    if model is None:
        return found
    check_model(model, "audit")
    if scheme_of(model) is None:
        raise ValueError(
            f"audit() compares operators with a quantized model, but {model.name!r} is plain. Use "
            "verify(path, model, data), or quantize_aware(model) or quantize(model, data) first."
        )
    samples = None if data is None else gather_samples(model, data, "data")
    verification = None if data is None else verify(path, model, data)
    found = audit_operators(path, prepare(model), samples)
    return dataclasses.replace(found, verification=verification)


def audit_operators(
    path: str | os.PathLike[str], model: keras.Model, samples: list[Array] | None
) -> Audit:
    """Returns the audit of a file, with its operators, for a model as it was converted."""
    found = read_audit(path)
    if not any(isinstance(layer, FakeQuantize) for layer in flat_layers(model)):
        return found  # nothing is rounded between layers
    operators, missing = compare_operators(path, model, samples)
    return dataclasses.replace(found, operators=tuple(operators), missing=tuple(missing))


def check_operators(found: Audit, path: Path) -> None:
    """Refuses a file with an operator that computes something else than Keras.

    What layers make that stay in float is left to the audit: it is not what was trained for.

    Raises:
        ValueError: more than a few values are more than one step apart.
    """
    integers = [row for row in found.operators if not row.from_float]
    wrong = [row for row in integers if row.share_beyond > _MOST_BEYOND]
    if wrong:
        worst = max(wrong, key=lambda row: row.max_steps)
        raise ValueError(
            f"{path.name!r} was not kept: {worst.name!r} is up to {worst.max_steps:.3g} steps from "
            f"Keras on the same inputs, {worst.share_beyond:.1%} of its values more than one. "
            "Leave that layer in float (exclude=), and please report it."
        )


def read_audit(path: str | os.PathLike[str]) -> Audit:
    """Reads from a .tflite file what is float and what is quantized, without running it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no .tflite file.
    """
    from ai_edge_litert import schema_py_generated as schema

    types = {value: name for name, value in vars(schema.TensorType).items()}
    floats: list[str] = []
    quantized: dict[str, QuantizedTensor] = {}
    for tensor, is_end in _tensors(path):
        name, dtype = tensor.name.decode("utf-8"), types[tensor.type].lower()
        scales = getattr(tensor.quantization, "scale", None)
        if "float" in dtype:
            if not is_end:
                floats.append(name)
        elif (scales is not None and len(scales)) or dtype in ("int4", "int2"):
            scales = () if scales is None else scales
            zeros = tensor.quantization.zeroPoint
            quantized[name] = QuantizedTensor(
                dtype=dtype,
                scales=tuple(map(float, scales)),
                zero_points=() if zeros is None else tuple(map(int, zeros)),
                axis=int(tensor.quantization.quantizedDimension),
            )
    return Audit(tuple(floats), quantized)


def _tensors(path: str | os.PathLike[str]) -> Iterator[tuple[Any, bool]]:
    """Yields every tensor of every subgraph, and whether it is an input or output of the file."""
    file = check_file(path, "audit", suffixes=(".tflite",))
    TFLiteModel(file, delegates=False)  # verifies every offset, which the reader does not
    model = unpack(file.read_bytes())
    for number, graph in enumerate(model.subgraphs):
        ends = {*graph.inputs, *graph.outputs} if number == 0 else set()
        for index, tensor in enumerate(graph.tensors):
            yield tensor, index in ends
