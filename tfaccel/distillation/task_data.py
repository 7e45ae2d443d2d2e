"""Data sets that are each labelled for one task, as one data set for a student of all tasks."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from tfaccel.core.checks import check_number, check_positive


def merge_tasks(data: Mapping[str, tuple[Any, Any]]) -> tuple[Any, dict[str, np.ndarray]]:
    """Merges data sets, each labelled for a task of its own, into one with labels for all tasks.

    The samples follow each other in the order of the data sets. Where a sample has no label for a
    task, it gets -1 if that task's labels are integers, NaN if they are floats: see `skip_missing`.
    Labels of an unsigned type become signed.

    Args:
        data: for each task its inputs, an array [samples, ...] or a structure of such, and its
            labels, [samples, ...].

    Returns:
        All inputs, and for each task the labels of all samples.

    Raises:
        TypeError: labels are neither numbers nor bool.
        ValueError: there is no task, a data set is empty, its inputs and labels differ in number,
            or the inputs of two differ in structure or shape.

    >>> x, y = merge_tasks({"a": ([[1.0], [2.0]], [0, 2]), "b": ([[3.0]], [0.5])})
    >>> x.ravel().tolist(), y["a"].tolist(), y["b"].tolist()
    ([1.0, 2.0, 3.0], [0, 2, -1], [nan, nan, 0.5])
    """
    x, y, _ = _merged(data)
    return x, y


class TaskBatches(keras.utils.PyDataset):
    """Batches of several data sets, in which a task has its share of size ** power.

    With power 1 a task has as many samples as its data set is large, as MT-DNN draws them (Liu
    2019); with 0.75 a large data set dominates less (BAM, Clark 2019); with 0 all tasks are equal.
    In an epoch, a task's number of samples (with `one_task`, of batches) is that share rounded up
    or down. No sample of a task comes again before all of its others have.

    Args:
        data: as for `merge_tasks`.
        batch_size: samples of a batch.
        power: of a data set's size.
        one_task: all samples of a batch are of one task, as in MT-DNN.
        batches: of an epoch; by default as many as hold all samples once.
        seed: of the order.
        options: others of `keras.utils.PyDataset`.

    Raises:
        TypeError, ValueError: as of `merge_tasks`, or an argument makes no sense.

    >>> data = {"a": (np.zeros((81, 2)), np.zeros(81)), "b": (np.ones((16, 2)), np.ones(16))}
    >>> x, y = TaskBatches(data, batch_size=35, power=0.75, batches=1)[0]  # 27 : 8
    >>> sorted(int(np.isfinite(labels).sum()) for labels in y.values())
    [8, 27]
    """

    def __init__(
        self,
        data: Mapping[str, tuple[Any, Any]],
        batch_size: int = 32,
        *,
        power: float = 0.75,
        one_task: bool = False,
        batches: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_positive("batch_size", batch_size)
        check_number("power", power)
        if batches is not None:
            check_positive("batches", batches)
        super().__init__(**options)
        self._x, self._y, sizes = _merged(data)
        samples = sum(sizes) if batches is None else batches * batch_size
        self._batches = -(-samples // batch_size)
        self._units = self._batches if one_task else samples  # what is shared out among the tasks
        self._samples_of_unit = batch_size if one_task else 1
        self._batch_size = batch_size
        shares = np.asarray(sizes, float) ** power
        self._shares = shares / shares.sum()
        self._ends = np.cumsum(sizes)
        self._waiting = [np.empty(0, int)] * len(sizes)
        self._random = np.random.default_rng(seed)
        self._order = self._next_order()

    def __len__(self) -> int:
        """Returns the number of batches in an epoch."""
        return self._batches

    def __getitem__(self, index: int) -> tuple[Any, dict[str, np.ndarray]]:
        """Returns a batch: inputs, and labels of all tasks."""
        rows = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        x = keras.tree.map_structure(lambda values: values[rows], self._x)
        return x, {task: labels[rows] for task, labels in self._y.items()}

    def on_epoch_end(self) -> None:
        """Draws the next epoch."""
        self._order = self._next_order()

    def _next_order(self) -> np.ndarray:
        # Evenly spaced points with one random offset: a task gets its share rounded down or up,
        # and over the epochs just its share, however small that is.
        points = (np.arange(self._units) + self._random.random()) / self._units
        tasks = np.searchsorted(np.cumsum(self._shares)[:-1], points, side="right")
        counts = np.bincount(tasks, minlength=len(self._shares)) * self._samples_of_unit
        drawn = [self._draw(task, count) for task, count in enumerate(counts)]
        units = [rows.reshape(-1, self._samples_of_unit) for rows in drawn]
        return self._random.permutation(np.concatenate(units)).reshape(-1)

    def _draw(self, task: int, count: int) -> np.ndarray:
        first = 0 if task == 0 else self._ends[task - 1]
        rows = self._waiting[task]
        while len(rows) < count:
            rows = np.append(rows, first + self._random.permutation(self._ends[task] - first))
        self._waiting[task] = rows[count:]
        return rows[:count]


def _merged(
    data: Mapping[str, tuple[Any, Any]],
) -> tuple[Any, dict[str, np.ndarray], list[int]]:
    """Returns inputs, labels and the sizes of the data sets."""
    arrays = {task: _arrays(task, pair) for task, pair in data.items()}
    if not arrays:
        raise ValueError("data holds no task. Give {task: (inputs, labels), ...}.")
    (first, (inputs, _)), *others = arrays.items()
    for task, (more, _) in others:
        if _shapes(more) != _shapes(inputs):
            raise ValueError(
                "The tasks of one student share its inputs, but a sample has the shape "
                f"{_shapes(inputs)} in {first!r} and {_shapes(more)} in {task!r}. "
                "Bring the data sets into one form first."
            )
    sizes = [len(labels) for _, labels in arrays.values()]
    every = [x for x, _ in arrays.values()]
    x = keras.tree.map_structure(lambda *parts: np.concatenate(parts), *every)
    y = {}
    for index, (task, (_, labels)) in enumerate(arrays.items()):
        start = sum(sizes[:index])
        y[task] = np.full((sum(sizes), *labels.shape[1:]), _gap(labels.dtype), labels.dtype)
        y[task][start : start + len(labels)] = labels
    return x, y, sizes


def _arrays(task: str, pair: tuple[Any, Any]) -> tuple[Any, np.ndarray]:
    x, labels = pair
    # A list is an array that is not made yet: what Keras takes for several inputs is a dict.
    x = np.asarray(x) if isinstance(x, list) else keras.tree.map_structure(np.asarray, x)
    labels = np.asarray(labels)
    if labels.dtype.kind not in "biuf":
        raise TypeError(
            f"The labels of {task!r} must be numbers or bool, but are {labels.dtype}. "
            "Give each class a number."
        )
    if labels.dtype.kind in "bu":
        labels = labels.astype(np.promote_types(labels.dtype, "int8"))
    found = {len(values) for values in keras.tree.flatten(x)} | {len(labels)}
    if len(found) > 1 or found == {0}:
        raise ValueError(
            f"{task!r} needs a label for each of its samples, but got {len(labels)} labels and "
            f"inputs of length {', '.join(str(len(v)) for v in keras.tree.flatten(x))}."
        )
    return x, labels


def _gap(dtype: Any) -> float:
    return np.nan if dtype.kind == "f" else -1


def _shapes(x: Any) -> Any:
    return keras.tree.map_structure(lambda values: values.shape[1:], x)
