"""Tensors of any types and shapes as one message of bytes, exact to the bit."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfaccel.core.graph import Tensor

Message = np.ndarray[Any, np.dtype[np.uint8]]


def pack(tensors: Sequence[Any]) -> Message:
    """Writes tensors one after another, each behind its shape.

    Args:
        tensors: TensorFlow tensors, or arrays, of any numeric type.

    Returns:
        [bytes] uint8.

    >>> pack([np.float32([1.0])]).tolist()
    [1, 0, 0, 0, 0, 0, 128, 63]
    """
    parts = [np.zeros(0, np.uint8)]
    for tensor in tensors:
        # A scalar has no dimension to be seen as bytes along.
        array = np.ascontiguousarray(tensor)
        shape = np.asarray(np.shape(tensor), np.int32)
        parts += [shape.view(np.uint8), array.reshape(-1).view(np.uint8)]
    return np.concatenate(parts)


def unpack(message: Any, like: Sequence[Tensor]) -> list[Any]:
    """Reads what `pack` wrote.

    Args:
        message: [bytes] uint8.
        like: what is in it: the number of dimensions and the type of each tensor.

    Returns:
        TensorFlow tensors.

    Raises:
        ValueError: the message is shorter or longer than that.
    """
    import tensorflow as tf

    content = np.ascontiguousarray(message)
    arrays, start = [], 0
    for expected in like:
        rank = len(expected.shape)
        shape = content[start : start + 4 * rank].view(np.int32)
        start += 4 * rank
        dtype = np.dtype(tf.as_dtype(expected.dtype).as_numpy_dtype)
        length = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        part = content[start : start + length]
        start += length
        if len(part) == length:
            arrays.append(part.view(dtype).reshape(shape))
    if start != len(content) or len(arrays) != len(like):
        raise ValueError(
            f"A stage got a message of {len(content)} bytes and expected {start}. All ranks must "
            "run the same program on the same data."
        )
    return [tf.convert_to_tensor(array) for array in arrays]
