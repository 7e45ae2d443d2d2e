"""Gradients of all ranks combined inside the training step."""

from collections.abc import Sequence
from typing import Any

from tfaccel.distributed import process_sets
from tfaccel.distributed.adasum import reduce_by_adasum
from tfaccel.distributed.half_precision import reduce_in_16_bits, sent_in_16_bits
from tfaccel.distributed.runtime import Adasum, Average, ReduceOp, Sum, horovod

# Horovod has no bfloat16, and float16 sums in software; both are exact in float32 on the way.
_SENT_AS_FLOAT32 = ("float16", "bfloat16")
# Horovod adds up none of these; each fits into the other.
_SENT_WIDER = {"bool": "uint8", "int16": "int32", "uint16": "int32", "uint32": "int64"}


def reduce_tensors(
    tensors: Sequence[Any],
    op: ReduceOp,
    name: str,
    *,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    compression: Any = None,
    process_set: Any = None,
) -> list[Any]:
    """Combines tensors of every rank, all of one data type in one operation.

    Args:
        tensors: tensors, `tf.IndexedSlices` or None; the same kinds, data types and shapes on all
            ranks (but for the number of slices).
        op: how they are combined; for `tf.IndexedSlices` Average or Sum.
        name: of the operation, the same on all ranks and no other operation's.
        prescale_factor: what tensors are multiplied by before they are combined.
        postscale_factor: what they are multiplied by afterwards.
        compression: None, or one of `Compression`: floats then travel in 16 bits.
        process_set: the ranks that take part; None for all.

    Returns:
        As given: data types are kept, None stays None, and slices of all ranks stand one after
        another.
    """
    import tensorflow as tf

    if horovod() is None:  # an elastic job that is down to one worker
        scale = prescale_factor * postscale_factor
        return [t if t is None else scaled(t, scale) for t in tensors]
    bits = sent_in_16_bits(compression)
    native = process_sets.native_process_set(process_set)
    count = process_sets.members(process_set)
    scale = prescale_factor * postscale_factor
    reduced = list(tensors)
    groups: dict[tf.DType, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, tf.IndexedSlices):
            slices = _gather_slices(tensor, op, f"{name}.sparse{index}", native, count)
            reduced[index] = scaled(slices, scale)
        elif tensor is not None:
            groups.setdefault(_sent_type(tensor.dtype), []).append(index)
    for sent_type, indices in groups.items():
        own = f"{name}.{sent_type.name}"
        sent = [tf.cast(tensors[i], sent_type) for i in indices]
        if op == Adasum:
            sent = [scaled(tensor, prescale_factor) for tensor in sent]
            results = reduce_by_adasum(sent, own, native, count)
            results = [scaled(tensor, postscale_factor) for tensor in results]
        elif bits and sent_type.is_floating:
            sent = [scaled(tensor, prescale_factor) for tensor in sent]
            results = reduce_in_16_bits(sent, bits, op, own, process_set)
            results = [scaled(tensor, postscale_factor) for tensor in results]
        else:
            # With the scope ignored the name does not depend on where in the graph this is called.
            results = horovod().grouped_allreduce(
                sent,
                op=int(op),
                name=own,
                ignore_name_scope=True,
                prescale_factor=prescale_factor,
                postscale_factor=postscale_factor,
                process_set=native,
            )
        for index, result in zip(indices, results, strict=True):
            reduced[index] = tf.cast(result, tensors[index].dtype)
    return reduced


def _gather_slices(slices: Any, op: ReduceOp, name: str, native: Any, count: int) -> Any:
    """Puts the rows of all ranks together: their sum is the sum of the gradients."""
    import tensorflow as tf

    if op not in (Average, Sum):
        raise ValueError(
            f"Sparse gradients (tf.IndexedSlices) can be averaged or summed, but got op={op.name}."
            " sparse_as_dense=True makes them dense."
        )
    hvd = horovod()
    values = hvd.allgather(
        tf.cast(slices.values, _sent_type(slices.dtype)),
        name=f"{name}.values",
        ignore_name_scope=True,
        process_set=native,
    )
    if op == Average:
        values = values / count
    indices = hvd.allgather(
        slices.indices, name=f"{name}.indices", ignore_name_scope=True, process_set=native
    )
    return tf.IndexedSlices(tf.cast(values, slices.dtype), indices, slices.dense_shape)


def scaled(value: Any, factor: float) -> Any:
    """Returns a tensor, or slices, times a factor."""
    import tensorflow as tf

    if factor == 1.0:
        return value
    if isinstance(value, tf.IndexedSlices):
        return tf.IndexedSlices(scaled(value.values, factor), value.indices, value.dense_shape)
    return value * tf.cast(factor, value.dtype)


def _sent_type(dtype: Any) -> Any:
    import tensorflow as tf

    if dtype.name in _SENT_AS_FLOAT32:
        return tf.float32
    return tf.as_dtype(_SENT_WIDER.get(dtype.name, dtype))
