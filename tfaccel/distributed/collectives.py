"""Collective operations that combine tensors of all ranks, and those that only wait.

With Horovod's names and arguments; of a process that is alone they are the identity. Inside a
`tf.function` TensorFlow may drop an operation whose result is not used and merge operations of
equal inputs, on all ranks or on none; give every call a `name` of its own.
"""

from collections.abc import Sequence
from typing import Any

from tfaccel.distributed import process_sets, runtime
from tfaccel.distributed.gathering import to_tensor, unique_name
from tfaccel.distributed.graphs import untranslated
from tfaccel.distributed.runtime import Average, ReduceOp, Sum, check_op


@untranslated
def allreduce(
    tensor: Any,
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: Any = None,
    ignore_name_scope: bool = True,
) -> Any:
    """Combines a tensor of every rank, element by element.

    16-bit floats are combined in float32: Horovod has no bfloat16, and its float16 sum is slow. A
    `tf.IndexedSlices` is gathered.

    Args:
        tensor: any shape, the same on all ranks.
        average: Horovod's old argument: True for `op=Average`, False for `op=Sum`.
        device_dense: of the operation for tensors, as TensorFlow names it; "" for its own choice.
        device_sparse: of the operations for `tf.IndexedSlices`.
        compression: None, or one of `Compression`: floats then travel in 16 bits.
        op: Average (unless said otherwise), Sum, Min, Max, Product or Adasum.
        prescale_factor: what the tensor is multiplied by before it is combined.
        postscale_factor: what it is multiplied by afterwards.
        name: of the operation, the same on all ranks.
        process_set: the ranks that take part; None for all.
        ignore_name_scope: accepted for Horovod's sake; names never depend on TensorFlow's scopes.

    Returns:
        The same tensor on every rank, of the shape and data type given.
    """
    options = (average, device_dense, device_sparse, compression, op)
    factors = (prescale_factor, postscale_factor, process_set, ignore_name_scope)
    return grouped_allreduce([tensor], *options, *factors, name or "tfaccel_allreduce")[0]


@untranslated
def grouped_allreduce(
    tensors: Sequence[Any],
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
    ignore_name_scope: bool = True,  # noqa: ARG001
    name: str | None = None,
) -> list[Any]:
    """Combines several tensors of every rank at once; they may be of different data types.

    Args:
        tensors: as many on all ranks, of the same shapes.
        average: as for `allreduce`, and so is all else.
        device_dense: of the operations for tensors.
        device_sparse: of the operations for `tf.IndexedSlices`.
        compression: None, or one of `Compression`.
        op: how they are combined.
        prescale_factor: before.
        postscale_factor: afterwards.
        process_set: the ranks that take part; None for all.
        ignore_name_scope: accepted for Horovod's sake.
        name: of the operation, the same on all ranks.

    Returns:
        The same tensors on every rank, of the shapes and data types given.
    """
    op = resolve_op(op, average)
    values = [to_tensor(tensor) for tensor in tensors]
    if runtime.horovod() is None:
        # One rank's mean, sum, product or Adasum is its own value, scaled.
        factor = prescale_factor * postscale_factor
        return values if factor == 1.0 else [value * factor for value in values]
    from tfaccel.distributed.reduction import reduce_tensors

    device = device_sparse if _is_sparse(values) else device_dense
    with _placed(device):
        return reduce_tensors(
            values,
            op,
            unique_name(name, "tfaccel_allreduce"),
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            compression=compression,
            process_set=process_set,
        )


@untranslated
def reducescatter(
    tensor: Any,
    device_dense: str = "",
    compression: Any = None,
    op: ReduceOp | None = None,
    name: str | None = None,
    process_set: Any = None,
    ignore_name_scope: bool = True,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Any:
    """Combines a tensor of every rank and leaves each rank its part of the rows.

    Args:
        tensor: [rows, ...], the same on all ranks.
        device_dense: of the operation, as TensorFlow names it; "" for its own choice.
        compression: None; anything else of `Compression` rounds what is sent.
        op: Average (unless said otherwise) or Sum.
        name: of the operation, the same on all ranks.
        process_set: the ranks that take part; None for all.
        ignore_name_scope: accepted for Horovod's sake.
        prescale_factor: what the tensor is multiplied by before it is combined.
        postscale_factor: what it is multiplied by afterwards.

    Returns:
        [own rows, ...]: rows / ranks, and one more for the first `rows % ranks` ranks.

    Raises:
        ValueError: another op.
    """
    op = Average if op is None else check_op(op)
    if op not in (Average, Sum):
        raise ValueError(f"reducescatter() averages or sums, but got op={op.name}.")
    hvd = runtime.horovod()
    value = to_tensor(tensor)
    if hvd is None:
        factor = prescale_factor * postscale_factor
        return value if factor == 1.0 else value * factor
    import tensorflow as tf

    from tfaccel.distributed.half_precision import sent_in_16_bits

    bits = sent_in_16_bits(compression)
    sent = value
    if value.dtype.is_floating:
        # Rounded as it would be on the way, and summed in float32, which Horovod can.
        sent = tf.cast(value, bits) if bits else value
        sent = tf.cast(sent, tf.float32 if value.dtype.size < 4 else value.dtype)
    with _placed(device_dense):
        part = hvd.reducescatter(
            sent,
            op=int(op),
            name=unique_name(name, "tfaccel_reducescatter"),
            ignore_name_scope=ignore_name_scope,
            process_set=process_sets.native_process_set(process_set),
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
        )
    return tf.cast(part, value.dtype)


@untranslated
def grouped_reducescatter(
    tensors: Sequence[Any],
    device_dense: str = "",
    compression: Any = None,
    op: ReduceOp | None = None,
    name: str | None = None,
    process_set: Any = None,
    ignore_name_scope: bool = True,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Any]:
    """Combines several tensors of every rank and leaves each rank its part of the rows of each.

    Args:
        tensors: [rows, ...] each; as many on all ranks, of the same shapes.
        device_dense: as for `reducescatter`, and so is all else.
        compression: None, or one of `Compression`.
        op: Average (unless said otherwise) or Sum.
        name: that the operations' names begin with, the same on all ranks.
        process_set: the ranks that take part; None for all.
        ignore_name_scope: accepted for Horovod's sake.
        prescale_factor: before.
        postscale_factor: afterwards.

    Returns:
        [own rows, ...] each.
    """
    own = unique_name(name, "tfaccel_reducescatters")
    more = (process_set, ignore_name_scope, prescale_factor, postscale_factor)
    return [
        reducescatter(tensor, device_dense, compression, op, f"{own}.{index}", *more)
        for index, tensor in enumerate(tensors)
    ]


def barrier(process_set: Any = None) -> None:
    """Waits until every rank has come here.

    Args:
        process_set: the ranks that wait for one another; None for all.
    """
    hvd = runtime.horovod()
    if hvd is not None:
        import numpy as np

        native = process_sets.native_process_set(process_set)
        own = np.zeros(1, np.float32)
        hvd.allreduce(own, op=hvd.Sum, name="tfaccel_barrier", process_set=native)


def join() -> int:
    """Says that this rank has no more data, and goes on summing zeros until all have said so.

    Meanwhile it takes part in the allreduces of the others, as if its tensors were zeros (so that
    an average is one over all ranks). It cannot take part in anything else: `DistributedOptimizer`
    compares weights and gathers sparse gradients. For `fit`, shares of equal length (`shard`) or
    data that ends on all ranks at once (`end_together`) are the way.

    Returns:
        The rank that joined last; 0 in a process that is alone.
    """
    hvd = runtime.horovod()
    if hvd is None:
        return 0
    import tensorflow as tf

    # In eager mode Horovod's operation works once per process. A graph and a session of its own
    # works each time.
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        return int(session.run(hvd.join()))


def resolve_op(op: Any, average: bool | None) -> ReduceOp:
    """Returns the op that Horovod's two arguments stand for.

    Raises:
        ValueError: both are given, or the op is none.
    """
    if average is not None:
        if op is not None:
            raise ValueError(f"Give op={op!r} or average={average!r}, not both.")
        return Average if average else Sum
    return Average if op is None else check_op(op)


def _is_sparse(values: Sequence[Any]) -> bool:
    import tensorflow as tf

    return any(isinstance(value, tf.IndexedSlices) for value in values)


def _placed(device: str) -> Any:
    import tensorflow as tf

    return tf.device(device or None)
