"""Collective operations that move tensors between ranks as they are: gather, broadcast, exchange.

With Horovod's names and arguments; of a process that is alone they are the identity. Any data type
travels: those that Horovod does not know, bit by bit.
"""

from collections.abc import Sequence
from typing import Any

from tfaccel.distributed import process_sets, runtime
from tfaccel.distributed.graphs import untranslated

# Tensors of these travel as they are; all others bit by bit.
_SENT = ("bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64")


@untranslated
def allgather(
    tensor: Any,
    name: str | None = None,
    ignore_name_scope: bool = True,
    process_set: Any = None,
) -> Any:
    """Joins a tensor of every rank along its first dimension, whose length may differ.

    Args:
        tensor: [rows, ...], equal on all ranks but for the rows.
        name: of the operation, the same on all ranks.
        ignore_name_scope: accepted for Horovod's sake.
        process_set: the ranks that take part; None for all.

    Returns:
        [rows of all ranks, ...], in the order of ranks.
    """
    return grouped_allgather([tensor], name or "tfaccel_allgather", ignore_name_scope, process_set)[
        0
    ]


@untranslated
def grouped_allgather(
    tensors: Sequence[Any],
    name: str | None = None,
    ignore_name_scope: bool = True,  # noqa: ARG001
    process_set: Any = None,
) -> list[Any]:
    """Joins several tensors of every rank, each along its first dimension.

    Args:
        tensors: [rows, ...] each; as many on all ranks.
        name: of the operation, the same on all ranks.
        ignore_name_scope: accepted for Horovod's sake.
        process_set: the ranks that take part; None for all.

    Returns:
        [rows of all ranks, ...] each.

    Raises:
        ValueError: a tensor has no first dimension.
    """
    hvd = runtime.horovod()
    values = [to_tensor(tensor) for tensor in tensors]
    for value in values:
        if len(value.shape) == 0:
            raise ValueError("allgather() joins rows, but got a single value. Give it as [value].")
    if hvd is None:
        return values
    native = process_sets.native_process_set(process_set)
    own = unique_name(name, "tfaccel_allgather")
    return [
        _restore(
            hvd.allgather(
                _sendable(value), name=f"{own}.{i}", ignore_name_scope=True, process_set=native
            ),
            value.dtype,
        )
        for i, value in enumerate(values)
    ]


@untranslated
def broadcast(
    tensor: Any,
    root_rank: int = 0,
    name: str | None = None,
    ignore_name_scope: bool = True,  # noqa: ARG001
    process_set: Any = None,
) -> Any:
    """Gives every rank the tensor of one.

    Args:
        tensor: any shape, the same on all ranks.
        root_rank: the rank whose tensor it is.
        name: of the operation, the same on all ranks.
        ignore_name_scope: accepted for Horovod's sake.
        process_set: the ranks that take part; None for all.

    Returns:
        The tensor of rank `root_rank`.
    """
    runtime.check_rank(root_rank)
    hvd = runtime.horovod()
    value = to_tensor(tensor)
    if hvd is None:
        return value
    sent = hvd.broadcast(
        _sendable(value),
        root_rank,
        name=unique_name(name, "tfaccel_broadcast"),
        ignore_name_scope=True,
        process_set=process_sets.native_process_set(process_set),
    )
    return _restore(sent, value.dtype)


@untranslated
def alltoall(
    tensor: Any,
    splits: Any = None,
    name: str | None = None,
    ignore_name_scope: bool = True,  # noqa: ARG001
    process_set: Any = None,
) -> Any:
    """Sends a part of the tensor to every rank, and receives one from each.

    Args:
        tensor: [rows, ...], equal on all ranks but for the rows.
        splits: [ranks] int, how many rows go to each rank; None for as many to all.
        name: of the operation, the same on all ranks.
        ignore_name_scope: accepted for Horovod's sake.
        process_set: the ranks that take part; None for all.

    Returns:
        [rows received, ...] in the order of ranks; with `splits` a pair of that and of [ranks]
        int32, how many came from each.

    Raises:
        ValueError: the rows cannot be split so.
    """
    hvd = runtime.horovod()
    value = to_tensor(tensor)
    count = process_sets.members(process_set)
    _check_splits(value, splits, count)
    if hvd is None:
        return value if splits is None else (value, to_tensor(splits))
    import tensorflow as tf

    parts = hvd.alltoall(
        _sendable(value),
        splits=None if splits is None else tf.cast(splits, tf.int32),
        name=unique_name(name, "tfaccel_alltoall"),
        ignore_name_scope=True,
        process_set=process_sets.native_process_set(process_set),
    )
    if splits is None:
        return _restore(parts, value.dtype)
    received, sizes = parts
    return _restore(received, value.dtype), sizes


def unique_name(name: str | None, default: str) -> str:
    """Returns a name that no other operation of this graph has, the same on all ranks."""
    import tensorflow as tf

    if tf.executing_eagerly() or (name is not None and name != default):
        return name or default
    return str(tf.compat.v1.get_default_graph().unique_name(default).replace("/", "."))


def to_tensor(value: Any) -> Any:
    """Returns a tensor of the Keras backend; `tf.IndexedSlices` stay what they are."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if isinstance(value, tf.IndexedSlices):
            return value
    return keras.ops.convert_to_tensor(value)


def _check_splits(value: Any, splits: Any, count: int) -> None:
    import tensorflow as tf

    rows = value.shape[0] if len(value.shape) else None
    if splits is None:
        if rows is not None and rows % count:
            raise ValueError(
                f"{rows} rows cannot be dealt out evenly to {count} ranks. Say how many each gets "
                "by splits=[...]."
            )
        return
    given = tf.get_static_value(tf.convert_to_tensor(splits))
    if given is None:
        return
    if len(given) != count or (rows is not None and given.sum() != rows) or (given < 0).any():
        raise ValueError(
            f"splits must be {count} numbers from 0 with a sum of {rows}, one for each rank, but "
            f"got {given.tolist()}."
        )


def _sendable(value: Any) -> Any:
    """The bits of a tensor in a type that Horovod knows; one dimension more where it is not so."""
    import tensorflow as tf

    return value if value.dtype.name in _SENT else tf.bitcast(value, tf.uint8)


def _restore(value: Any, dtype: Any) -> Any:
    import tensorflow as tf

    return value if dtype.name in _SENT else tf.bitcast(value, dtype)
