"""Gradients of all ranks combined inside the training step."""

from collections.abc import Sequence
from typing import Any

from tfaccel.distributed.runtime import Average, ReduceOp, Sum, horovod, size

# Horovod has no bfloat16, and float16 sums in software; both are exact in float32 on the way.
_SENT_AS_FLOAT32 = ("float16", "bfloat16")


def reduce_tensors(tensors: Sequence[Any], op: ReduceOp, name: str) -> list[Any]:
    """Combines tensors of every rank, all of one data type in one operation.

    Args:
        tensors: tensors, `tf.IndexedSlices` or None; the same kinds, data types and shapes on all
            ranks (but for the number of slices).
        op: how they are combined; for `tf.IndexedSlices` Average or Sum.
        name: of the operation, the same on all ranks and no other operation's.

    Returns:
        As given: data types are kept, None stays None, and slices of all ranks stand one after
        another.
    """
    import tensorflow as tf

    hvd = horovod()
    reduced = list(tensors)
    groups: dict[tf.DType, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, tf.IndexedSlices):
            reduced[index] = _gather_slices(tensor, op, f"{name}.sparse{index}")
        elif tensor is not None:
            groups.setdefault(_sent_type(tensor.dtype), []).append(index)
    for sent_type, indices in groups.items():
        # With the scope ignored the name does not depend on where in the graph this is called.
        results = hvd.grouped_allreduce(
            [tf.cast(tensors[i], sent_type) for i in indices],
            op=getattr(hvd, op.name),
            name=f"{name}.{sent_type.name}",
            ignore_name_scope=True,
        )
        for index, result in zip(indices, results, strict=True):
            reduced[index] = tf.cast(result, tensors[index].dtype)
    return reduced


def _gather_slices(slices: Any, op: ReduceOp, name: str) -> Any:
    """Puts the rows of all ranks together: their sum is the sum of the gradients."""
    import tensorflow as tf

    if op not in (Average, Sum):
        raise ValueError(
            f"Sparse gradients (tf.IndexedSlices) can be averaged or summed, but got op={op.name}."
        )
    hvd = horovod()
    values = hvd.allgather(
        tf.cast(slices.values, _sent_type(slices.dtype)),
        name=f"{name}.values",
        ignore_name_scope=True,
    )
    if op == Average:
        values = values / size()
    indices = hvd.allgather(slices.indices, name=f"{name}.indices", ignore_name_scope=True)
    return tf.IndexedSlices(tf.cast(values, slices.dtype), indices, slices.dense_shape)


def _sent_type(dtype: Any) -> Any:
    import tensorflow as tf

    return tf.float32 if dtype.name in _SENT_AS_FLOAT32 else dtype
