"""The channels of gradient compressors: Horovod's operations, or none for a process alone."""

from dataclasses import dataclass
from typing import Any

from tfaccel.distributed import runtime


@dataclass(frozen=True)
class HorovodChannel:
    """Sends tensors with Horovod, inside the training step.

    Args:
        name: that every operation's name begins with: the same on all ranks, and no other's.
    """

    name: str

    @property
    def rank(self) -> int:
        """The number of this rank."""
        return runtime.rank()

    @property
    def size(self) -> int:
        """The number of ranks."""
        return runtime.size()

    def mean(self, tensor: Any, key: str) -> Any:
        """Averages a float32 tensor by ring-allreduce."""
        hvd = runtime.horovod()
        return hvd.allreduce(tensor, op=hvd.Average, name=self._named(key), ignore_name_scope=True)

    def mean_half(self, tensor: Any, key: str) -> Any:
        """Averages [n] of 16-bit floats: slices to their ranks, summed there, and back to all."""
        import tensorflow as tf

        hvd, ranks, length = runtime.horovod(), self.size, int(tensor.shape[0])
        each = -(-length // ranks)
        padded = tf.pad(tensor, [[0, each * ranks - length]])
        slices = hvd.alltoall(
            tf.bitcast(padded, tf.uint8),
            splits=tf.fill([ranks], each),
            name=self._named(f"{key}.slices"),
            ignore_name_scope=True,
        )[0]
        values = tf.cast(tf.bitcast(slices, tensor.dtype), tf.float32)
        mean = tf.reduce_mean(tf.reshape(values, [ranks, each]), axis=0)
        gathered = hvd.allgather(
            tf.bitcast(tf.cast(mean, tensor.dtype), tf.uint8),
            name=self._named(f"{key}.means"),
            ignore_name_scope=True,
        )
        whole = tf.reshape(tf.bitcast(gathered, tensor.dtype), [each * ranks])
        return whole[:length]

    def gather(self, message: Any, key: str) -> Any:
        """Joins the messages of all ranks."""
        hvd = runtime.horovod()
        return hvd.allgather(message, name=self._named(key), ignore_name_scope=True)

    def _named(self, key: str) -> str:
        return f"{self.name}.{key}"


@dataclass(frozen=True)
class LocalChannel:
    """The channel of a process that is alone: what is sent comes back."""

    rank: int = 0
    size: int = 1

    def mean(self, tensor: Any, key: str) -> Any:  # noqa: ARG002
        """Returns the tensor."""
        return tensor

    def mean_half(self, tensor: Any, key: str) -> Any:  # noqa: ARG002
        """Returns the tensor."""
        return tensor

    def gather(self, message: Any, key: str) -> Any:  # noqa: ARG002
        """Returns the message."""
        return message
