"""Samples as the user has them, one array per input of the model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.export.freezing import end_names

Array = npt.NDArray[Any]

MOST_SAMPLES = 512


def gather_samples(
    model: keras.Model, data: Any, argument: str, *, least: int = 1, most: int = MOST_SAMPLES
) -> list[Array]:
    """Returns one array [samples, ...] per input of the model, in its order.

    Args:
        model: what the samples are for.
        data: an array, a list of arrays or a dict by input name; or an iterable of batches of such,
            where a tuple is (inputs, labels, ...) as in `model.fit`.
        argument: what the user calls it, for the error.
        least: how many samples are needed.
        most: how many are taken.

    Raises:
        ValueError: there are too few, they do not have the shape that the model takes, or they hold
            a NaN or an infinity.
    """
    wanted = [tuple(tensor.shape) for tensor in model.inputs]
    try:
        arrays = read_arrays(end_names(model)[0], data, argument, most)
    except ValueError as error:
        raise _misfit(model, wanted, f"what cannot be read as such: {error}", argument) from error
    if len(arrays) != len(wanted) or not all(map(_fits, arrays, wanted)):
        raise _misfit(model, wanted, _listed([array.shape for array in arrays]), argument)
    lengths = sorted({len(array) for array in arrays})
    if len(lengths) > 1:
        raise ValueError(f"{argument} has different numbers of samples for the inputs: {lengths}.")
    if lengths[0] < least:
        raise ValueError(f"{argument} must hold samples, {least} at least, but got {lengths[0]}.")
    pairs = zip(arrays, model.inputs, strict=True)
    typed = [array[:most].astype(tensor.dtype, copy=False) for array, tensor in pairs]
    for array, name in zip(typed, end_names(model)[0], strict=True):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(
                f"{argument} holds a NaN or an infinity for input {name!r}, which would spoil "
                "every range and comparison. Clean the samples first."
            )
    return typed


def read_arrays(names: Sequence[str], data: Any, argument: str, most: int) -> list[Array]:
    """Returns an array for each input, whatever their shapes are.

    Args:
        names: of the inputs.
        data: as in `gather_samples`.
        argument: as in `gather_samples`.
        most: of batches no more are read than hold so many samples.

    Raises:
        ValueError: an input has no data.
    """
    whole = hasattr(data, "__array__") or isinstance(data, Mapping)
    if whole or (isinstance(data, (list, tuple)) and len(names) > 1):
        return _per_input(names, data, argument)
    if isinstance(data, Iterable):
        return _gather(names, data, argument, most)
    return [np.asarray(data)]


def _per_input(names: Sequence[str], x: Any, argument: str) -> list[Array]:
    if isinstance(x, Mapping):
        missing = [name for name in names if name not in x]
        if missing:
            raise ValueError(f"{argument} has {sorted(x)}, but lacks the inputs {missing}")
        return [np.asarray(x[name]) for name in names]
    return [np.asarray(value) for value in (x if isinstance(x, (list, tuple)) else [x])]


def _gather(names: Sequence[str], batches: Iterable[Any], argument: str, most: int) -> list[Array]:
    parts: list[list[Array]] = []
    total = 0
    for batch in batches:
        arrays = _per_input(names, _without_labels(names, batch), argument)
        parts.append(arrays)
        total += len(arrays[0]) if arrays and arrays[0].ndim else 0
        if total >= most:
            break
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _without_labels(names: Sequence[str], batch: Any) -> Any:
    if not isinstance(batch, tuple):
        return batch
    several = len(names) > 1
    # A tuple of plain arrays, one per input, has no labels.
    bare = several and len(batch) == len(names) and hasattr(batch[0], "__array__")
    return batch if bare else batch[0]


def _fits(array: Array, shape: tuple[int | None, ...]) -> bool:
    return array.ndim == len(shape) > 0 and all(
        size in (None, given) for size, given in zip(shape[1:], array.shape[1:], strict=True)
    )


def _misfit(
    model: keras.Model, wanted: list[tuple[int | None, ...]], found: str, argument: str
) -> ValueError:
    return ValueError(
        f"{argument} must hold samples for {model.name!r}, which takes {_listed(wanted)}, but got "
        f"{found}."
    )


def _listed(shapes: list[tuple[int | None, ...]]) -> str:
    named = [str([size if size is not None else "any" for size in shape]) for shape in shapes]
    return " and ".join(named) or "nothing"
