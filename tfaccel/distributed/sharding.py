"""Each rank's share of the data."""

from typing import Any, TypeVar

import keras

from tfaccel.distributed import runtime

Data = TypeVar("Data")


def shard(data: Data) -> Data:
    """Returns this rank's share of a data set: every N-th sample, as many for every rank.

    As many, because a rank that runs out of data would leave the others waiting: up to N - 1
    samples at the end are left out. Shard samples before they are shuffled and batched; a data set
    that is batched already is dealt out batch by batch.

    Args:
        data: arrays [samples, ...] in any structure (as `(x, y)`), or a `tf.data.Dataset`.

    Returns:
        The same structure, or a data set.

    Raises:
        ValueError: there are fewer samples than ranks, or the arrays differ in length.

    >>> import numpy as np
    >>> shard((np.arange(3), np.arange(3) * 2))  # alone: everything
    (array([0, 1, 2]), array([0, 2, 4]))
    """
    count = runtime.workers()
    return share(data, runtime.rank() if count > 1 else 0, count)


def share(data: Data, rank: int, size: int) -> Data:
    """Returns what `shard` gives to one rank of `size`.

    Args:
        data: as for `shard`.
        rank: whose share, from 0.
        size: number of ranks.
    """
    if _is_dataset(data):
        return data if size == 1 else _share_dataset(data, rank, size)
    lengths = {len(array) for array in keras.tree.flatten(data)}
    if len(lengths) != 1:
        raise ValueError(
            f"All arrays to shard must have as many samples, but got {sorted(lengths)}."
        )
    length = lengths.pop()
    _check_enough(length, size)
    used = length // size * size
    return keras.tree.map_structure(lambda array: array[rank:used:size], data)


def _share_dataset(dataset: Any, rank: int, size: int) -> Any:
    import tensorflow as tf

    length = int(dataset.cardinality())
    if length == tf.data.INFINITE_CARDINALITY:
        return dataset.shard(size, rank)
    if length == tf.data.UNKNOWN_CARDINALITY:
        # Rounds of N elements, of which each rank takes its own; the last round counts if it is
        # full.
        rounds = dataset.window(size, drop_remainder=True)
        return rounds.flat_map(lambda *parts: _whole(parts).skip(rank).take(1))
    _check_enough(length, size)
    return dataset.take(length // size * size).shard(size, rank)


def _whole(parts: Any) -> Any:
    """A window as one data set, whatever the structure of its elements."""
    import tensorflow as tf

    return tf.data.Dataset.zip(parts if len(parts) > 1 else parts[0])


def _check_enough(length: int, size: int) -> None:
    if length < size:
        raise ValueError(
            f"There are {length} samples (or batches) for {size} ranks. Every rank needs one."
        )


def _is_dataset(data: Any) -> bool:
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return isinstance(data, tf.data.Dataset)
