"""Outputs of a teacher in memory-mapped files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_SMALLEST_LOG = -6e4  # in the range of float16


class StoredOutputs:
    """What a teacher said about versions of samples: one .npy file for each output.

    Args:
        folder: of the files.
        shapes: of one sample's outputs, by name.
        views: versions of each sample.
        samples: how many there are.
        dtype: of what is kept.
        top: for how many classes logits of `top_of` are kept; None for all.
        top_of: name of the output that this is about.
        mode: "r" to read, "r+" to write on, "w+" for new files, over old ones.

    Raises:
        ValueError: a file is not of the type and shape that it should have.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        views: int,
        samples: int,
        dtype: str,
        top: int | None,
        top_of: str,
        mode: str = "r",
    ) -> None:
        self._folder, self._mode = folder, mode
        self._rows, self._top, self._top_of = (views, samples), top, top_of
        self._classes = shapes[top_of][-1] if top is not None else 0
        self._arrays: dict[str, dict[str, Any]] = {}
        for number, (name, shape) in enumerate(shapes.items()):
            file = f"output_{number}"
            if top is None or name != top_of:
                self._arrays[name] = {"values": self._open(file, dtype, shape)}
                continue
            kept = (*shape[:-1], top)
            places = "uint16" if self._classes <= 1 << 16 else "int32"
            self._arrays[name] = {
                "values": self._open(file, dtype, kept),
                "places": self._open(f"{file}_places", places, kept),
                "rest": self._open(f"{file}_rest", dtype, (*shape[:-1], 1)),
            }

    def _open(self, file: str, dtype: str, shape: tuple[int, ...]) -> Any:
        path = self._folder / f"{file}.npy"
        whole = (*self._rows, *shape)
        if self._mode == "w+":
            return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=whole)
        try:
            array: Any = np.load(path, mmap_mode=self._mode)  # type: ignore[arg-type]
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} is missing or damaged ({error}). Delete the folder and cache the "
                "teacher again."
            ) from error
        if array.shape != whole or array.dtype != dtype:
            raise ValueError(
                f"{str(path)!r} holds {array.dtype} {array.shape} instead of {dtype} {whole}. "
                "Delete the folder and cache the teacher again."
            )
        return array

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, without their headers."""
        return sum(int(a.nbytes) for parts in self._arrays.values() for a in parts.values())

    def write(self, view: int, start: int, outputs: Mapping[str, Any]) -> None:
        """Keeps the outputs of samples from `start` on.

        Raises:
            ValueError: a value is not finite, or beyond what the type holds.
        """
        for name, output in outputs.items():
            output = np.asarray(output).astype("float32")  # noqa: PLW2901
            parts = {"values": output}
            if self._top is not None and name == self._top_of:
                parts = _compact(output, self._top)
            for part, value in parts.items():
                array = self._arrays[name][part]
                with np.errstate(over="ignore"):
                    kept = value.astype(array.dtype)
                if not np.isfinite(kept).all():
                    raise ValueError(
                        f"The teacher's {name!r} has values up to {np.abs(value).max():g}, which "
                        f"{array.dtype} does not hold. Use dtype='float32' if they are finite."
                    )
                array[view, start : start + len(kept)] = kept

    def read(self, view: int, indices: Any) -> dict[str, Any]:
        """Returns the outputs of samples by name, float32."""
        found = {}
        for name, arrays in self._arrays.items():
            parts = {part: array[view][indices] for part, array in arrays.items()}
            whole = parts["values"].astype("float32")
            found[name] = _expand(whole, parts, self._classes) if "places" in parts else whole
        return found

    def flush(self) -> None:
        """Waits until everything is on the disk."""
        for parts in self._arrays.values():
            for array in parts.values():
                array.flush()


def _compact(logits: Any, top: int) -> dict[str, Any]:
    """Returns the largest log-probabilities, their classes, and the logarithm of what remains."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    order = np.argpartition(-logs, top - 1, axis=-1)
    places, others = order[..., :top], np.take_along_axis(logs, order[..., top:], axis=-1)
    largest = others.max(axis=-1, keepdims=True)
    rest = largest + np.log(np.exp(others - largest).sum(axis=-1, keepdims=True))
    return {
        "values": np.take_along_axis(logs, places, axis=-1),
        "places": places,
        "rest": np.maximum(rest, _SMALLEST_LOG),
    }


def _expand(values: Any, parts: Mapping[str, Any], classes: int) -> Any:
    """Returns all log-probabilities, those that were not kept all alike."""
    each = parts["rest"].astype("float32") - np.float32(np.log(classes - values.shape[-1]))
    whole = np.repeat(each, classes, axis=-1)
    np.put_along_axis(whole, parts["places"].astype("int64"), values, axis=-1)
    return whole
