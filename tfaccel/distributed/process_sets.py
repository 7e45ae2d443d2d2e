"""Groups of ranks that do something among themselves."""

import os
from collections.abc import Sequence
from typing import Any

from tfaccel.distributed import runtime

_DYNAMIC = "HOROVOD_DYNAMIC_PROCESS_SETS"


class ProcessSet:
    """A group of ranks. Give it to `init(process_sets=[...])` or to `add_process_set`.

    Args:
        ranks: the members, in any order.

    Raises:
        ValueError: no ranks, a rank twice, or something that is no rank.

    >>> ProcessSet([2, 0]).ranks
    [0, 2]
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        members = sorted(ranks)
        if (
            not members
            or len(set(members)) < len(members)
            or not all(isinstance(r, int) and r >= 0 for r in members)
        ):
            raise ValueError(f"A process set needs ranks, each once, but got {list(ranks)!r}.")
        self.ranks: list[int] = members
        self.process_set_id: int | None = None
        self._native: Any = None  # Horovod's own, in a job of several workers

    def size(self) -> int:
        """The number of its ranks."""
        return len(self.ranks)

    def rank(self) -> int | None:
        """The number of this process in the set, from 0; None where it is no member."""
        own = runtime.rank()
        return self.ranks.index(own) if own in self.ranks else None

    def included(self) -> bool:
        """Whether this process is a member."""
        return runtime.rank() in self.ranks

    def __str__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"

    __repr__ = __str__


class _Everyone(ProcessSet):
    """All ranks of the job, however many there are."""

    def __init__(self) -> None:
        self.process_set_id = 0

    @property
    def ranks(self) -> list[int]:  # type: ignore[override]
        return list(range(runtime.size()))


global_process_set = _Everyone()
_alone: list[ProcessSet] = []  # those added in a process that is alone
_next_alone_id = 1


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Makes a group of ranks known to all of them; every rank of the job calls it, alike.

    Args:
        process_set: the group, or its ranks.

    Returns:
        The group, ready to be given to collective operations.

    Raises:
        ValueError: a rank is none of this job's, or there is such a group already.
        RuntimeError: the job was started without `init(process_sets="dynamic")`.
    """
    global _next_alone_id  # noqa: PLW0603
    if not isinstance(process_set, ProcessSet):
        process_set = ProcessSet(process_set)
    _check_ranks(process_set)
    hvd = runtime.horovod()
    if hvd is None:
        if any(other.ranks == process_set.ranks for other in [*_alone, global_process_set]):
            raise ValueError(f"There is a process set of ranks {process_set.ranks} already.")
        process_set.process_set_id = _next_alone_id
        _next_alone_id += 1
        _alone.append(process_set)
        return process_set
    if os.environ.get(_DYNAMIC) != "1":
        raise RuntimeError(
            "Process sets cannot be added to this job. Start it with "
            'init(process_sets="dynamic"), or give init() the process sets themselves.'
        )
    native = hvd.ProcessSet(process_set.ranks)
    hvd.add_process_set(native)
    _adopt(process_set, native)
    return process_set


def remove_process_set(process_set: ProcessSet) -> bool:
    """Forgets a group of ranks; every rank of the job calls it, alike.

    Args:
        process_set: what `add_process_set` returned.

    Returns:
        Whether there was such a group, and not that of all ranks.
    """
    if process_set.process_set_id in (None, 0):
        return False
    hvd = runtime.horovod()
    removed = True
    if hvd is None:
        _alone.remove(process_set)
    else:
        removed = bool(hvd.remove_process_set(process_set._native))  # noqa: SLF001
    _adopt(process_set, None)
    return removed


def start_with(process_sets: Sequence[ProcessSet] | str | None, hvd: Any) -> None:
    """Starts Horovod, or a process that is alone (`hvd` is None), with process sets."""
    if isinstance(process_sets, str):
        if process_sets.lower() != "dynamic":
            raise ValueError(
                f'process_sets must be a list of ProcessSet or "dynamic", but got {process_sets!r}.'
            )
        if hvd is not None:
            hvd.init(process_sets="dynamic")
        return
    sets = [s if isinstance(s, ProcessSet) else ProcessSet(s) for s in process_sets or ()]
    if hvd is None:
        for process_set in sets:
            add_process_set(process_set)
        return
    natives = [hvd.ProcessSet(process_set.ranks) for process_set in sets]
    hvd.init(process_sets=natives)
    for process_set, native in zip(sets, natives, strict=True):
        _adopt(process_set, native)


def forget() -> None:
    """Forgets the process sets of a process that is alone, as it leaves its job."""
    for process_set in _alone:
        _adopt(process_set, None)
    _alone.clear()


def native_process_set(process_set: Any) -> Any:
    """Returns Horovod's own object for a process set of ours, or for None (all ranks).

    Raises:
        ValueError: it is not known to Horovod, or this rank is no member.
    """
    hvd = runtime.horovod()
    if process_set is None or process_set is global_process_set:
        return hvd.global_process_set
    if not isinstance(process_set, ProcessSet):
        return process_set
    if process_set._native is None:  # noqa: SLF001
        raise ValueError(f"{process_set} is not known yet. Call add_process_set() on all ranks.")
    if not process_set.included():
        raise ValueError(f"Rank {runtime.rank()} is no member of {process_set}.")
    return process_set._native  # noqa: SLF001


def members(process_set: ProcessSet | None) -> int:
    """Returns how many ranks take part: those of the process set, or all."""
    return runtime.workers() if process_set is None else int(process_set.size() or 0)


def _check_ranks(process_set: ProcessSet) -> None:
    count = runtime.workers()
    if process_set.ranks[-1] >= count:
        raise ValueError(
            f"{process_set} has ranks that this job of {count} has not: 0 to {count - 1}."
        )


def _adopt(process_set: ProcessSet, native: Any) -> None:
    process_set._native = native  # noqa: SLF001
    process_set.process_set_id = None if native is None else native.process_set_id
