"""How the stages of a pipeline reach one another."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tfaccel.distributed import runtime
from tfaccel.distributed.messages import Message

_numbers = itertools.count()


class Transport(Protocol):
    """What a pipeline asks of the job. Every call is made by all ranks, in the same order.

    Attributes:
        local: the stages that this process works on.
        replica: which of the pipelines side by side it belongs to, from 0.
        replicas: how many there are.
    """

    local: Sequence[int]
    replica: int
    replicas: int

    def exchange(self, outgoing: Mapping[int, Message], label: str) -> dict[int, Message]:
        """Sends messages to stages and returns what came, by local stage."""

    def sum_over_replicas(self, arrays: Sequence[Any]) -> list[Any]:
        """Sums arrays of the same stage over all pipelines."""

    def sum_over_stages(self, value: float) -> float:
        """Sums a number over the stages of this pipeline."""

    def everyone(self, value: Any) -> list[Any]:
        """Returns the objects of all ranks."""


class LocalTransport:
    """All stages in one process, one after the other."""

    replica, replicas = 0, 1

    def __init__(self, stages: int) -> None:
        self.local: Sequence[int] = range(stages)

    def exchange(self, outgoing: Mapping[int, Message], label: str) -> dict[int, Message]:  # noqa: ARG002
        """Hands the messages over."""
        return dict(outgoing)

    def sum_over_replicas(self, arrays: Sequence[Any]) -> list[Any]:
        """Returns them: there is one."""
        return list(arrays)

    def sum_over_stages(self, value: float) -> float:
        """Returns it: all stages are here."""
        return value

    def everyone(self, value: Any) -> list[Any]:
        """Returns the one there is."""
        return [value]


class HorovodTransport:
    """One stage on each rank: rank = replica · stages + stage.

    Everything goes by alltoall, in which each rank says how many bytes it has for each other. That
    is one operation that all ranks call in the same order, so that none can wait for a rank which
    waits for it, and it needs no process sets.

    Args:
        stages: of a pipeline; divides the number of ranks.
    """

    def __init__(self, stages: int) -> None:
        self._hvd = runtime.horovod()
        self._size, self._stages = runtime.size(), stages
        self.replica, self._stage = divmod(runtime.rank(), stages)
        self.replicas = self._size // stages
        self.local: Sequence[int] = [self._stage]
        # Made in the same order on every rank, so that the names of the operations agree.
        self._name = f"tfaccel_pipeline{next(_numbers)}"

    def exchange(self, outgoing: Mapping[int, Message], label: str) -> dict[int, Message]:
        """Sends at most one message to each stage; returns what came, empty if nothing did."""
        parts, splits = [np.zeros(0, np.uint8)], [0] * self._size
        for stage in sorted(outgoing):
            parts.append(outgoing[stage])
            splits[self.replica * self._stages + stage] = len(outgoing[stage])
        return {self._stage: self._all_to_all(np.concatenate(parts), splits, label)}

    def sum_over_replicas(self, arrays: Sequence[Any]) -> list[Any]:
        """Each replica sums its part of all arrays and sends it to the others.

        2(R - 1)/R of the bytes go out of each rank, as in a ring (Patarasuk & Yuan 2009), and all
        replicas get the same bits.
        """
        import tensorflow as tf

        if self.replicas == 1:
            return list(arrays)
        given = [array.numpy() for array in arrays]
        # A type that holds all: the sum has to be the same on every replica of the stage.
        wide = any(array.dtype == np.float64 for array in given)
        dtype = np.dtype(np.float64 if wide else np.float32)
        flat = [array.astype(dtype).reshape(-1) for array in given]
        vector = np.concatenate([np.zeros(0, dtype), *flat])
        part = -(-len(vector) // self.replicas)
        padded = np.pad(vector, (0, part * self.replicas - len(vector)))
        gathered = self._among_replicas(padded, part, "parts")
        own = gathered.reshape(self.replicas, part).sum(0)
        whole = self._among_replicas(np.tile(own, self.replicas), part, "sums")
        sums, start = [], 0
        for array in given:
            piece = whole[start : start + array.size].reshape(array.shape)
            sums.append(tf.convert_to_tensor(piece.astype(array.dtype)))
            start += array.size
        return sums

    def sum_over_stages(self, value: float) -> float:
        """Sums a number over the stages of this pipeline."""
        return sum(self.everyone(value)[self.replica * self._stages :][: self._stages])

    def everyone(self, value: Any) -> list[Any]:
        """Returns the objects of all ranks, in the order of ranks."""
        return self._hvd.allgather_object(value, name=f"{self._name}.objects")

    def _among_replicas(
        self, vector: np.ndarray[Any, Any], part: int, label: str
    ) -> np.ndarray[Any, Any]:
        """Sends each replica of this stage its part, in order; returns what they sent."""
        splits = [0] * self._size
        for replica in range(self.replicas):
            splits[replica * self._stages + self._stage] = part * vector.dtype.itemsize
        return self._all_to_all(vector.view(np.uint8), splits, label).view(vector.dtype)

    def _all_to_all(self, data: Message, splits: Sequence[int], label: str) -> Message:
        received, _ = self._hvd.alltoall(
            data, splits=np.asarray(splits, np.int32), name=f"{self._name}.{label}"
        )
        # A copy, because views of other types want it contiguous and aligned.
        return np.array(received)


def make_transport(stages: int) -> Transport:
    """Returns the transport of this job.

    Raises:
        ValueError: the ranks cannot be shared out evenly to the stages.
    """
    size = runtime.workers()
    if size == 1:
        return LocalTransport(stages)
    if size % stages:
        raise ValueError(
            f"A pipeline of {stages} stages runs on a multiple of {stages} ranks (or in one "
            f"process), but this job has {size}. Start it with horovodrun -np "
            f"{-(-size // stages) * stages}, or take another number of stages."
        )
    return HorovodTransport(stages)
