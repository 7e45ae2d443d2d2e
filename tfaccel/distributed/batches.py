"""Whole batches of a data set or of arrays, the same on all ranks."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from tfaccel.distributed.arguments import check_count


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one step works on.

    Attributes:
        x: the model's inputs, a structure of arrays or tensors [samples, ...].
        y: targets, likewise.
        sample_weight: [samples, ...] or None.
    """

    x: Any
    y: Any
    sample_weight: Any = None

    @property
    def samples(self) -> int:
        """How many."""
        return int(keras.tree.flatten(self.x)[0].shape[0])

    def part(self, samples: slice) -> "Batch":
        """Returns some of the samples."""

        def cut(tree: Any) -> Any:
            return keras.tree.map_structure(lambda array: array[samples], tree)

        return Batch(*(None if t is None else cut(t) for t in (self.x, self.y, self.sample_weight)))


def batches_of(
    x: Any, y: Any, sample_weight: Any, batch_size: int, shuffle: bool, seed: int
) -> Callable[[int], Iterator[Batch]]:
    """Returns a function that gives the batches of an epoch.

    Args:
        x: arrays [samples, ...] in any structure, or a `tf.data.Dataset` of batches.
        y: targets; None for a data set, which has its own.
        sample_weight: [samples, ...] or None.
        batch_size: of arrays.
        shuffle: whether arrays are mixed anew in each epoch.
        seed: of the mixing.

    Raises:
        ValueError: `y` is missing, or given besides a data set; or arrays differ in length.
    """
    check_count("batch_size", batch_size)
    if hasattr(x, "element_spec"):
        if y is not None or sample_weight is not None:
            raise ValueError("A data set brings its own targets: leave out y and sample_weight.")
        return lambda _: _of_dataset(x)
    if y is None:
        raise ValueError("fit() and evaluate() need targets: give y, or a data set of (x, y).")
    leaves = keras.tree.flatten((x, y) if sample_weight is None else (x, y, sample_weight))
    lengths = {len(leaf) for leaf in leaves}
    if len(lengths) != 1:
        raise ValueError(f"All arrays must have as many samples, but got {sorted(lengths)}.")
    whole = Batch(*(_to_numpy(tree) for tree in (x, y, sample_weight)))

    def of_epoch(epoch: int) -> Iterator[Batch]:
        order = np.arange(whole.samples)
        if shuffle:
            np.random.default_rng([seed, epoch]).shuffle(order)
        for begin in range(0, len(order), batch_size):
            yield whole.part(order[begin : begin + batch_size])  # type: ignore[arg-type]

    return of_epoch


def _of_dataset(dataset: Any) -> Iterator[Batch]:
    for element in dataset:
        batch = Batch(*keras.utils.unpack_x_y_sample_weight(element))
        if batch.y is None:
            raise ValueError("The data set must give (x, y) or (x, y, sample weights).")
        yield batch


def _to_numpy(tree: Any) -> Any:
    return None if tree is None else keras.tree.map_structure(np.asarray, tree)
