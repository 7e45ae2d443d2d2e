"""Tensors that travel in 16 bits: Horovod's `Compression`, and its missing bfloat16.

Horovod has no bfloat16, and its float16 sum is slow. So the bits travel, as plain bytes: each rank
gets a part of every rank's tensor, sums it in float32, and sends its part of the result to all.
The bytes are those of a ring, and no sum is rounded more than once.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from tfaccel.distributed import process_sets, runtime
from tfaccel.distributed.runtime import Average, ReduceOp, Sum

_BYTES = 2


class NoneCompressor:
    """Tensors travel as they are."""

    dtype: ClassVar[str | None] = None

    @classmethod
    def compress(cls, tensor: Any) -> tuple[Any, Any]:
        """Returns the tensor as it is sent, and what `decompress` needs to know of it."""
        import tensorflow as tf

        tensor = tf.convert_to_tensor(tensor)
        if cls.dtype is None or not tensor.dtype.is_floating:
            return tensor, tensor.dtype
        return tf.cast(tensor, cls.dtype), tensor.dtype

    @classmethod
    def decompress(cls, tensor: Any, ctx: Any) -> Any:
        """Returns the tensor in the data type that it had."""
        import tensorflow as tf

        return tensor if ctx is None else tf.cast(tensor, ctx)


class FP16Compressor(NoneCompressor):
    """Floats travel as float16: 11 bits of precision, up to 65,504."""

    dtype = "float16"


class BF16Compressor(NoneCompressor):
    """Floats travel as bfloat16: 8 bits of precision, with the range of float32."""

    dtype = "bfloat16"


class Compression:
    """How tensors travel between ranks, for the argument `compression`."""

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor


def sent_in_16_bits(compression: Any) -> str | None:
    """Returns the name of the 16-bit type that a `compression` stands for, None for none.

    Raises:
        ValueError: it is none of `Compression`.
    """
    if compression is None:
        return None
    # Horovod's own classes are known by their names.
    names = {"NoneCompressor": None, "FP16Compressor": "float16", "BF16Compressor": "bfloat16"}
    name = getattr(compression, "__name__", type(compression).__name__)
    if name not in names:
        raise ValueError(
            "compression must be one of Compression.none, Compression.fp16 and Compression.bf16 "
            f"(or, for gradients, a compressor such as DGC()), but got {compression!r}."
        )
    return names[name]


def reduce_in_16_bits(
    tensors: Sequence[Any], dtype: str, op: ReduceOp, name: str, process_set: Any = None
) -> list[Any]:
    """Averages or sums tensors of every rank that travel in 16 bits each way.

    Args:
        tensors: float tensors, of the same shapes on all ranks.
        dtype: "float16" or "bfloat16".
        op: Average or Sum.
        name: that the operations' names begin with; no other operation's.
        process_set: the ranks that take part; None for all.

    Returns:
        The same tensors on all ranks, in the shapes and data types given.

    Raises:
        ValueError: another op.
    """
    import tensorflow as tf

    if op not in (Average, Sum):
        raise ValueError(f"In 16 bits tensors can be averaged or summed, but got op={op.name}.")
    if not tensors:
        return []
    hvd, count = runtime.horovod(), process_sets.members(process_set)
    options = {
        "ignore_name_scope": True,
        "process_set": process_sets.native_process_set(process_set),
    }
    flat = tf.concat([tf.reshape(tf.cast(t, tf.float32), [-1]) for t in tensors], axis=0)
    length = tf.size(flat)
    padding = -length % count
    sent = tf.cast(tf.pad(flat, [[0, padding]]), dtype)
    parts = hvd.alltoall(_to_bytes(sent), name=f"{name}.{dtype}.parts", **options)
    parts = tf.reshape(_from_bytes(parts, dtype), [count, -1])
    total = tf.reduce_sum(tf.cast(parts, tf.float32), axis=0)
    if op == Average:
        total = total / count
    whole = hvd.allgather(_to_bytes(tf.cast(total, dtype)), name=f"{name}.{dtype}.whole", **options)
    whole = tf.cast(_from_bytes(whole, dtype), tf.float32)
    results, start = [], 0
    for tensor in tensors:
        end = start + tf.size(tensor)
        result = tf.reshape(whole[start:end], tf.shape(tensor))
        result.set_shape(tensor.shape)
        results.append(tf.cast(result, tensor.dtype))
        start = end
    return results


def _to_bytes(values: Any) -> Any:
    """[n] 16-bit floats -> [2n] uint8, bit by bit."""
    import tensorflow as tf

    return tf.reshape(tf.bitcast(values, tf.uint8), [-1])


def _from_bytes(values: Any, dtype: str) -> Any:
    """[2n] uint8 -> [n] 16-bit floats, bit by bit."""
    import tensorflow as tf

    return tf.bitcast(tf.reshape(values, [-1, _BYTES]), getattr(tf, dtype))
