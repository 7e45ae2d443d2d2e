"""The job as one worker sees it: who takes part, and whether they do the same.

With Horovod's names and arguments. A process that no launcher started is alone: rank 0 of 1, with
no Horovod loaded and every collective operation the identity.
"""

import enum
import hashlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

BUILD_COMMAND = "python tools/build_horovod.py --install"

# Set for every worker by horovodrun and Horovod's other launchers, and by mpirun and its kin.
_LAUNCHER_VARIABLES = ("HOROVOD_SIZE", "HOROVOD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

_alone = False


class ReduceOp(enum.IntEnum):
    """How the values of all ranks become one; numbered as Horovod numbers them."""

    Average = 0
    Sum = 1
    Adasum = 2
    Min = 3
    Max = 4
    Product = 5


Average = ReduceOp.Average
Sum = ReduceOp.Sum
Adasum = ReduceOp.Adasum
Min = ReduceOp.Min
Max = ReduceOp.Max
Product = ReduceOp.Product


def init(comm: None = None, process_sets: Any = None) -> None:
    """Joins the job that this process was started for; call it once, before anything else here.

    Args:
        comm: None. An MPI communicator, or ranks of one, has no meaning for a job of horovodrun.
        process_sets: groups of ranks (`ProcessSet`) to begin with, or "dynamic" to add some later.

    Raises:
        ValueError: `comm` is given.
        RuntimeError: a launcher started this process as one of several, but Horovod is not
            installed or does not load.
    """
    global _alone  # noqa: PLW0603
    if comm is not None:
        raise ValueError(
            f"comm must be None, but got {comm!r}. For a group of ranks give process_sets."
        )
    if is_initialized():
        return
    from tfaccel.distributed.process_sets import start_with

    if is_launched():
        start_with(process_sets, _import_horovod())
    else:
        _alone = True
        start_with(process_sets, None)


def shutdown() -> None:
    """Leaves the job. Workers that still wait for this one get an error."""
    global _alone  # noqa: PLW0603
    module = running_horovod()
    if module is not None:
        module.shutdown()
    _alone = False
    from tfaccel.distributed.process_sets import forget

    forget()


def is_initialized() -> bool:
    """Whether `init()` was called, here or in Horovod itself."""
    return _alone or running_horovod() is not None


def is_launched() -> bool:
    """Whether horovodrun, or another launcher that Horovod knows, started this process."""
    return any(name in os.environ for name in _LAUNCHER_VARIABLES)


def is_elastic() -> bool:
    """Whether workers may come and go: horovodrun was given `--min-np` or a discovery script."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def rank() -> int:
    """The number of this process among all, from 0."""
    return _ask("rank", 0)


def size() -> int:
    """The number of processes in the job."""
    return _ask("size", 1)


def local_rank() -> int:
    """The number of this process among those of its machine, from 0."""
    return _ask("local_rank", 0)


def local_size() -> int:
    """The number of processes on this machine."""
    return _ask("local_size", 1)


def cross_rank() -> int:
    """The number of this machine among those that have a process of this local rank, from 0."""
    return _ask("cross_rank", 0)


def cross_size() -> int:
    """The number of machines that have a process of this local rank."""
    return _ask("cross_size", 1)


def workers() -> int:
    """The number of processes, taking a process that no launcher started as alone without `init()`.

    Raises:
        ValueError: a launcher started this process, and `init()` has not been called.
    """
    return size() if is_initialized() or is_launched() else 1


def horovod() -> Any:
    """The `horovod.tensorflow` module of a job with several workers; None in one that is alone."""
    return running_horovod() if workers() > 1 else None


def require_agreement(
    what: str,
    lines: Sequence[str],
    labels: Sequence[str] | None = None,
    process_set: Any = None,
) -> None:
    """Raises on every rank unless all ranks gave the same lines.

    Without this a rank whose tensors differ in number or name leaves the others waiting for ever.

    Args:
        what: the lines describe, named in the error.
        lines: one description per thing, compared between ranks.
        labels: what the things are called here, for the error only.
        process_set: Horovod's own object for the ranks that take part; None for all.

    Raises:
        ValueError: the lines differ; it names the first thing that does.
    """
    hvd = horovod()
    if hvd is None:
        return
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    group = hvd.global_process_set if process_set is None else process_set
    own = np.frombuffer(digest, np.uint8)[np.newaxis]
    digests = hvd.allgather(own, name="tfaccel_digest", process_set=group).numpy()
    if (digests == digests[0]).all():
        return
    described = [
        f"{label} ({line})" if label else line
        for label, line in zip(labels or [""] * len(lines), lines, strict=True)
    ]
    everyone = hvd.allgather_object(
        (list(lines), described), name="tfaccel_agreement", process_set=group
    )
    first_lines, first = everyone[0]
    other = next(i for i, (found, _) in enumerate(everyone) if found != first_lines)
    other_lines, others = everyone[other]
    shared = min(len(first), len(others))
    place = next((i for i in range(shared) if first_lines[i] != other_lines[i]), shared)
    here = first[place] if place < len(first) else "nothing"
    there = others[place] if place < len(others) else "nothing"
    raise ValueError(
        f"The ranks differ in {what}: number {place} of {len(first)} on rank 0 is {here}, and of "
        f"{len(others)} on rank {other} {there}. Every rank must do the same on the same model."
    )


def check_op(op: Any) -> ReduceOp:
    """Returns the ReduceOp that `op` (a ReduceOp, or Horovod's own constant) stands for.

    Raises:
        ValueError: it is none, or one that is not supported.
    """
    try:
        return ReduceOp(op)
    except ValueError:
        names = ", ".join(member.name for member in ReduceOp)
        raise ValueError(f"op must be one of {names}, but got {op!r}.") from None


def check_rank(root_rank: int) -> None:
    """Raises ValueError unless there is a worker of that rank."""
    count = workers()
    if isinstance(root_rank, bool) or not isinstance(root_rank, int):
        raise TypeError(f"root_rank must be an int, but got {root_rank!r}.")
    if not 0 <= root_rank < count:
        raise ValueError(
            f"root_rank must be one of the {count} ranks of this job, 0 to {count - 1}, but got "
            f"{root_rank}."
        )


def running_horovod() -> Any:
    """Returns Horovod if it was started, by us or by the user; it is never imported for that."""
    module = sys.modules.get("horovod.tensorflow")
    return module if module is not None and module.is_initialized() else None


def _import_horovod() -> Any:
    count = os.environ.get("HOROVOD_SIZE", "several")
    try:
        import horovod.tensorflow
    except ImportError as error:
        missing = (error.name or "").startswith("horovod")
        state = "is not installed" if missing else f"does not load ({error})"
        raise RuntimeError(
            f"This process was started as one of {count} workers, but Horovod {state} for "
            f"{sys.executable}. Build it once with `{BUILD_COMMAND}`, or start the program with "
            "plain python to train in one process."
        ) from error
    return horovod.tensorflow


def _ask(question: str, alone: int) -> int:
    module = running_horovod()
    if module is not None:
        return int(getattr(module, question)())
    if _alone:
        return alone
    raise ValueError("The job is not known yet. Call tfaccel.distributed.init() first.")
