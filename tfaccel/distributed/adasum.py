"""Adasum: gradients added where they agree, averaged where they say the same twice."""

from collections.abc import Sequence
from typing import Any


def adasum_pair(first: Any, second: Any) -> Any:
    """Combines two gradients of one variable (Maleki 2020, eq. 6).

    (1 - a·b / 2|a|²)·a + (1 - a·b / 2|b|²)·b: the sum of two that are orthogonal, the mean of two
    that are equal, and in between for all else.

    Args:
        first: any shape, float.
        second: of the same shape.

    Returns:
        A tensor of that shape.
    """
    import tensorflow as tf

    product = tf.reduce_sum(first * second)

    def share(gradient: Any) -> Any:
        norm = tf.reduce_sum(gradient * gradient)
        # A gradient of zeros takes nothing from the other.
        return 1.0 - tf.math.divide_no_nan(product, 2.0 * norm)

    return share(first) * first + share(second) * second


def adasum_tree(gradients: Sequence[Any]) -> Any:
    """Combines the gradients of all ranks, neighbours first, then neighbouring pairs.

    Args:
        gradients: one of every rank, all of one shape; as many as a power of two.

    Returns:
        A tensor of that shape.
    """
    level = list(gradients)
    while len(level) > 1:
        level = [adasum_pair(level[i], level[i + 1]) for i in range(0, len(level), 2)]
    return level[0]


def reduce_by_adasum(tensors: Sequence[Any], name: str, process_set: Any, count: int) -> list[Any]:
    """Combines tensors of every rank by Adasum, each on its own.

    Horovod's own Adasum needs MPI. This one gathers the tensors of all ranks, N times the bytes of
    one, and every rank adds them up in the same order.

    Args:
        tensors: float tensors, of the same shapes and data types on all ranks.
        name: of the operation, the same on all ranks and no other operation's.
        process_set: Horovod's own object for the ranks that take part.
        count: how many those are.

    Returns:
        Tensors of the shapes and data types given.

    Raises:
        ValueError: the number of ranks is no power of two, or a tensor is not of floats.
    """
    import tensorflow as tf

    from tfaccel.distributed.runtime import horovod

    if count & (count - 1):
        raise ValueError(
            f"Adasum combines ranks in pairs, and pairs of pairs: their number has to be a power "
            f"of two, but it is {count}."
        )
    for tensor in tensors:
        if not tensor.dtype.is_floating:
            raise ValueError(f"Adasum combines floats, but got a tensor of {tensor.dtype.name}.")
    if not tensors:
        return []
    wide = tf.float64 if any(t.dtype == tf.float64 for t in tensors) else tf.float32
    flat = tf.concat([tf.reshape(tf.cast(t, wide), [-1]) for t in tensors], axis=0)
    everyone = horovod().allgather(
        flat[tf.newaxis], name=name, ignore_name_scope=True, process_set=process_set
    )
    results, start = [], 0
    for tensor in tensors:
        length = tf.size(tensor)
        rows = everyone[:, start : start + length]
        combined = adasum_tree([rows[rank] for rank in range(count)])
        results.append(tf.cast(tf.reshape(combined, tf.shape(tensor)), tensor.dtype))
        start += length
    return results
