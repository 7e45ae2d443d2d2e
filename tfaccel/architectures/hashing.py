"""Locality-sensitive hashing of vectors, and moving them into the order of their buckets."""

import math
from typing import Any

import keras
from keras import ops

# Beyond this many buckets, hashing with one rotation costs about as much as the attention itself.
_MOST_BUCKETS_OF_ONE_ROTATION = 128


def bucket_factors(time: int, bucket_size: int) -> tuple[int, ...]:
    """Returns how many buckets to hash `time` positions into, as factors of their number.

    A chunk has twice the positions of an average bucket (Kitaev et al. 2020, section 2), hence
    2 * time / bucket_size buckets. More than 128 are made by two hashes of about the square root
    of their number each, whose pair is the bucket.

    >>> bucket_factors(64, 64), bucket_factors(1000, 64), bucket_factors(16384, 64)
    ((1,), (32,), (22, 24))
    """
    if time <= bucket_size:
        return (1,)
    count = 2 * math.ceil(time / bucket_size)
    if count <= _MOST_BUCKETS_OF_ONE_ROTATION:
        return (count,)
    first = 2 * math.floor(math.sqrt(count) / 2)
    return (first, 2 * math.ceil(count / first / 2))


def hash_columns(factors: tuple[int, ...]) -> int:
    """Returns how many directions one hash projects on: half as many as buckets, by factor."""
    return sum(factor // 2 for factor in factors)


def hash_vectors(vectors: Any, rotations: Any, factors: tuple[int, ...]) -> Any:
    """Hashes by random rotations, h(x) = argmax([xR; -xR]) (Kitaev et al. 2020, section 2).

    Vectors of a small angle fall into the same bucket with a high probability. Their length does
    not matter.

    Args:
        vectors: [rows, time, size].
        rotations: [size, hashes, columns], normally distributed; `columns` as `hash_columns` says.
        factors: of the number of buckets; each is 1 or even.

    Returns:
        [rows, hashes, time] int32, in [0, product of the factors).
    """
    size, hashes, columns = rotations.shape
    rotations = ops.reshape(rotations, (size, hashes * columns))
    rotated = ops.matmul(ops.stop_gradient(vectors), rotations)
    rows, time, _ = ops.shape(vectors)
    rotated = ops.reshape(rotated, (rows, time, hashes, columns))
    buckets: Any = 0
    begin = 0
    for factor in factors:
        half = factor // 2
        if half:
            part = rotated[..., begin : begin + half]
            # The largest of [xR; -xR] without making the second half.
            positive = ops.max(part, axis=-1) >= -ops.min(part, axis=-1)
            place = ops.where(positive, _argmax(part), _argmax(-part) + half)
            buckets = buckets * factor + place
            begin += half
    return ops.transpose(buckets, (0, 2, 1))


def sort_by_bucket(buckets: Any, time: int | Any) -> tuple[Any, Any, Any]:
    """Sorts positions by bucket, those of one bucket by position.

    Args:
        buckets: [rows, hashes, time] int32; the largest times `time` must fit into int32.
        time: number of positions.

    Returns:
        Three of [rows, hashes, time] int32: the positions in their new order; the place of each
        position in it; the buckets in the new order.
    """
    # One sort of distinct numbers says everything, whether or not the backend's sort is stable.
    keys = ops.sort(buckets * time + ops.arange(time, dtype="int32"), axis=-1)
    order = keys % time
    return order, ops.cast(ops.argsort(order, axis=-1), "int32"), keys // time


def sort_rows(x: Any, order: Any, places: Any) -> Any:
    """Brings vectors into the order of each hash.

    Args:
        x: [rows, time, size].
        order: [rows, hashes, time] int32, from `sort_by_bucket`.
        places: likewise.

    Returns:
        [rows, hashes, time, size].
    """
    hashes = order.shape[1]

    # The gradient of a permutation is the inverse permutation: a gather, where the gradient that
    # backends know for a gather is a slow scatter.
    @ops.custom_gradient
    def run(x: Any) -> Any:
        def gradient(*args: Any, upstream: Any = None) -> Any:
            return ops.sum(_take(args[0] if upstream is None else upstream, places), axis=1)

        repeated = ops.broadcast_to(x[:, None], _repeated_shape(x, hashes))
        return _take(repeated, order), gradient

    return run(x)


def restore_rows(x: Any, order: Any, places: Any) -> Any:
    """Undoes `sort_rows` for each hash.

    Args:
        x: [rows, hashes, time, size].
        order: [rows, hashes, time] int32, from `sort_by_bucket`.
        places: likewise.

    Returns:
        The same shape as `x`.
    """

    @ops.custom_gradient
    def run(x: Any) -> Any:
        def gradient(*args: Any, upstream: Any = None) -> Any:
            return _take(args[0] if upstream is None else upstream, order)

        return _take(x, places), gradient

    return run(x)


def take_rows(x: Any, order: Any) -> Any:
    """Brings whole numbers, which have no gradient, into the order of each hash.

    Args:
        x: [rows, time, size].
        order: [rows, hashes, time] int32.

    Returns:
        [rows, hashes, time, size].
    """
    return _take(ops.broadcast_to(x[:, None], _repeated_shape(x, order.shape[1])), order)


def _repeated_shape(x: Any, hashes: int) -> tuple[Any, ...]:
    rows, time, size = ops.shape(x)
    return (rows, hashes, time, size)


def _argmax(x: Any) -> Any:
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Keras's own tells -0 from 0 by their bits, which LiteRT cannot.
        return tf.argmax(x, axis=-1, output_type=tf.int32)
    return ops.cast(ops.argmax(x, axis=-1), "int32")


def _take(x: Any, index: Any) -> Any:
    """Gathers along time: [rows, hashes, time, size] by [rows, hashes, time]."""
    rows, hashes, time, size = ops.shape(x)
    # One flat gather: all backends and LiteRT have it.
    offsets = ops.reshape(ops.arange(rows * hashes, dtype="int32") * time, (rows, hashes, 1))
    flat = ops.take(ops.reshape(x, (-1, size)), ops.reshape(index + offsets, (-1,)), axis=0)
    return ops.reshape(flat, (rows, hashes, time, size))
