"""What a batch brings besides the student's inputs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

_KEYS = {"inputs", "sample_index", "teacher_outputs"}


@dataclasses.dataclass(frozen=True)
class Batch:
    """The x of a batch, taken apart.

    Attributes:
        inputs: what teacher and student take.
        sample_index: [batch] int, which training sample each is, or None.
        teacher_outputs: by layer name, "final_output" for the model's output; None if the teacher
            has to be asked.
    """

    inputs: Any
    sample_index: Any = None
    teacher_outputs: Mapping[str, Any] | None = None


def read_batch(x: Any) -> Batch:
    """Returns what the x of a batch brings.

    Args:
        x: what the student takes, or {"inputs": that} with "sample_index" or "teacher_outputs" (a
            tensor for the model's output, or a dict by layer name) beside it.
    """
    if not (isinstance(x, Mapping) and "inputs" in x and len(x) > 1 and set(x) <= _KEYS):
        return Batch(x)
    taught = x.get("teacher_outputs")
    if taught is not None and not (isinstance(taught, Mapping) and "final_output" in taught):
        taught = {"final_output": taught}
    return Batch(x["inputs"], x.get("sample_index"), taught)


@runtime_checkable
class StoredTeacher(Protocol):
    """Stands for a teacher whose outputs come with the data.

    Attributes:
        name: of the teacher.
        output_shapes: shape by layer name, "final_output" for the model's output, the batch first,
            as None.
    """

    name: str
    output_shapes: Mapping[str, Any]
