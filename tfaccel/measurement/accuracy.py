"""How often a classifier is right."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def measure_accuracy(
    predict: Callable[[Any], Any], data: Any, *, batch_size: int = 32
) -> tuple[float, int]:
    """Measures top-1 accuracy: the share of samples whose largest output is that of the label.

    Args:
        predict: from samples to outputs [batch, classes], logits or probabilities.
        data: (x, y) arrays, or an iterable of (x, y) batches such as a tf.data.Dataset. Labels are
            integers [batch] or [batch, 1], or one-hot [batch, classes].
        batch_size: samples handed over at once, if `data` are arrays.

    Returns:
        Accuracy from 0 to 1, and the number of samples that it is over.

    Raises:
        TypeError: `data` is of another kind.
        ValueError: there is no sample, or shapes or labels do not fit.
    """
    right = total = 0
    for x, y in batches(data, batch_size):
        outputs = np.asarray(predict(x))
        labels = to_classes(np.asarray(y), outputs)
        right += int((outputs.argmax(axis=-1) == labels).sum())
        total += len(labels)
    if total == 0:
        raise ValueError("The data set is empty: accuracy needs one sample at least.")
    return right / total, total


def batches(data: Any, batch_size: int = 32) -> Iterator[tuple[Any, Array]]:
    """Yields (x, y) batches of NumPy arrays from arrays or from an iterable of batches.

    Raises:
        TypeError: `data` is neither.
        ValueError: x and y are of different length.
    """
    if isinstance(data, tuple) and len(data) == 2:
        yield from _cut(*data, batch_size)
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, dict, np.ndarray)):
        for batch in data:
            if not isinstance(batch, (tuple, list)) or len(batch) < 2:
                raise TypeError(
                    f"Each batch of the data must be (x, y), but got {type(batch).__name__}. "
                    "Labels are needed to measure accuracy."
                )
            yield _to_numpy(batch[0]), np.asarray(batch[1])
    else:
        raise TypeError(
            "data must be (x, y) arrays or a tf.data.Dataset of (x, y) batches, "
            f"but got {type(data).__name__}."
        )


def to_classes(labels: Array, outputs: Array) -> Array:
    """Returns integer labels [batch] for outputs [batch, classes], from integers or one-hot rows.

    Raises:
        ValueError: the labels fit in neither way, or name a class that there is not.
    """
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise ValueError(
            "Accuracy needs outputs [batch, classes] of two classes at least, "
            f"but the model gives {list(outputs.shape)}."
        )
    count, classes = outputs.shape
    if labels.shape == (count, classes):
        return np.asarray(labels.argmax(axis=-1))
    if labels.shape not in ((count,), (count, 1)):
        raise ValueError(
            f"Labels must be integers [{count}] or one-hot [{count}, {classes}] "
            f"for outputs {list(outputs.shape)}, but got {list(labels.shape)}."
        )
    flat = labels.reshape(count)
    if count and (flat.min() < 0 or flat.max() >= classes or (flat != np.floor(flat)).any()):
        raise ValueError(
            f"Labels must be integers from 0 to {classes - 1}, the model's classes, "
            f"but range from {flat.min()} to {flat.max()}."
        )
    return flat.astype(np.int64)


def _cut(x: Any, y: Any, batch_size: int) -> Iterator[tuple[Any, Array]]:
    inputs = list(x) if isinstance(x, (list, tuple)) else [np.asarray(x)]
    labels = np.asarray(y)
    lengths = {len(array) for array in (*inputs, labels)}
    if len(lengths) > 1:
        raise ValueError(
            f"x and y must hold as many samples, but got {len(inputs[0])} and {len(labels)}."
        )
    for begin in range(0, len(labels), batch_size):
        parts = [np.asarray(array[begin : begin + batch_size]) for array in inputs]
        yield parts if len(parts) > 1 else parts[0], labels[begin : begin + batch_size]


def _to_numpy(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: np.asarray(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [np.asarray(value) for value in x]
    return np.asarray(x)
