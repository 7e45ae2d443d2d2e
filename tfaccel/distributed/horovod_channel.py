"""The channels of gradient compressors: Horovod's operations, or none for a process alone."""

from dataclasses import dataclass
from typing import Any

from tfaccel.distributed import process_sets, runtime
from tfaccel.distributed.half_precision import reduce_in_16_bits


@dataclass(frozen=True)
class HorovodChannel:
    """Sends tensors with Horovod, inside the training step.

    Args:
        name: that every operation's name begins with: the same on all ranks, and no other's.
        process_set: the ranks that take part; None for all.
    """

    name: str
    process_set: Any = None

    @property
    def rank(self) -> int:
        """The number of this rank among those that take part."""
        return runtime.rank() if self.process_set is None else int(self.process_set.rank())

    @property
    def size(self) -> int:
        """The number of ranks that take part."""
        return int(process_sets.members(self.process_set))

    def mean(self, tensor: Any, key: str) -> Any:
        """Averages a float32 tensor by ring-allreduce."""
        hvd = runtime.horovod()
        return hvd.allreduce(tensor, op=hvd.Average, **self._options(key))

    def mean_half(self, tensor: Any, key: str) -> Any:
        """Averages [n] of 16-bit floats: slices to their ranks, summed there, and back to all."""
        import tensorflow as tf

        (mean,) = reduce_in_16_bits(
            [tf.cast(tensor, tf.float32)],
            tensor.dtype.name,
            runtime.Average,
            f"{self.name}.{key}",
            self.process_set,
        )
        return tf.cast(mean, tensor.dtype)

    def gather(self, message: Any, key: str) -> Any:
        """Joins the messages of all ranks."""
        return runtime.horovod().allgather(message, **self._options(key))

    def _options(self, key: str) -> dict[str, Any]:
        return {
            "name": f"{self.name}.{key}",
            "ignore_name_scope": True,
            "process_set": process_sets.native_process_set(self.process_set),
        }


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
