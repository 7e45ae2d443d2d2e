"""The job as one worker sees it: who takes part, and the collective operations they share.

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
_BROADCAST_BYTES = 64 * 2**20  # bounds the copies held while variables are sent

_alone = False


class ReduceOp(enum.IntEnum):
    """How the values of all ranks become one; numbered as Horovod numbers them."""

    Average = 0
    Sum = 1
    Min = 3
    Max = 4


Average = ReduceOp.Average
Sum = ReduceOp.Sum
Min = ReduceOp.Min
Max = ReduceOp.Max


def init() -> None:
    """Joins the job that this process was started for; call it once, before anything else here.

    Raises:
        RuntimeError: a launcher started this process as one of several, but Horovod is not
            installed or does not load.
    """
    global _alone  # noqa: PLW0603
    if is_initialized():
        return
    if is_launched():
        _import_horovod().init()
    else:
        _alone = True


def shutdown() -> None:
    """Leaves the job. Workers that still wait for this one get an error."""
    global _alone  # noqa: PLW0603
    module = _running_horovod()
    if module is not None:
        module.shutdown()
    _alone = False


def is_initialized() -> bool:
    """Whether `init()` was called, here or in Horovod itself."""
    return _alone or _running_horovod() is not None


def is_launched() -> bool:
    """Whether horovodrun, or another launcher that Horovod knows, started this process."""
    return any(name in os.environ for name in _LAUNCHER_VARIABLES)


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


def workers() -> int:
    """The number of processes, taking a process that no launcher started as alone without `init()`.

    Raises:
        ValueError: a launcher started this process, and `init()` has not been called.
    """
    return size() if is_initialized() or is_launched() else 1


def horovod() -> Any:
    """The `horovod.tensorflow` module of a job with several workers; None in one that is alone."""
    return _running_horovod() if workers() > 1 else None


def allreduce(tensor: Any, op: ReduceOp = Average, name: str | None = None) -> Any:
    """Combines a tensor of every rank, element by element.

    16-bit floats are combined in float32: Horovod has no bfloat16, and its float16 sum is slow. A
    `tf.IndexedSlices` is gathered. Inside a `tf.function` TensorFlow may drop an unused result and
    merge operations of equal inputs, on all ranks or on none; give every call a `name` of its own.

    Args:
        tensor: any shape, the same on all ranks.
        op: Average, Sum, Min or Max.
        name: of the operation, the same on all ranks.

    Returns:
        The same tensor on every rank, of the shape and data type given.
    """
    op = check_op(op)
    hvd = horovod()
    if hvd is None:
        return _as_tensor(tensor)
    from tfaccel.distributed.reduction import reduce_tensors

    return reduce_tensors([_as_tensor(tensor)], op, name or "tfaccel_allreduce")[0]


def allgather(tensor: Any, name: str | None = None) -> Any:
    """Joins a tensor of every rank along its first dimension, whose length may differ.

    Args:
        tensor: [rows, ...], equal on all ranks but for the rows.
        name: of the operation, the same on all ranks.

    Returns:
        [rows of all ranks, ...], in the order of ranks.
    """
    hvd = horovod()
    tensor = _as_tensor(tensor)
    return tensor if hvd is None else hvd.allgather(tensor, name=name)


def broadcast(tensor: Any, root_rank: int = 0, name: str | None = None) -> Any:
    """Gives every rank the tensor of one.

    Args:
        tensor: any shape, the same on all ranks.
        root_rank: the rank whose tensor it is.
        name: of the operation, the same on all ranks.

    Returns:
        The tensor of rank `root_rank`.
    """
    check_rank(root_rank)
    hvd = horovod()
    tensor = _as_tensor(tensor)
    return tensor if hvd is None else hvd.broadcast(tensor, root_rank, name=name)


def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None) -> Any:
    """Gives every rank the object of one; what the others pass does not matter.

    Args:
        obj: anything that can be pickled.
        root_rank: the rank whose object it is.
        name: of the operation, the same on all ranks.

    Returns:
        The object of rank `root_rank`.
    """
    check_rank(root_rank)
    hvd = horovod()
    if hvd is None:
        return obj
    # Horovod's own default is the name of the object's class, which need not be the same
    # everywhere.
    return hvd.broadcast_object(obj, root_rank, name=name or "tfaccel_object")


def broadcast_variables(variables: Any, root_rank: int = 0) -> None:
    """Sets variables on every rank to their values on one.

    Args:
        variables: Keras or TensorFlow variables, such as `model.weights` or `optimizer.variables`;
            as many, of the same shapes and data types, on all ranks.
        root_rank: the rank whose values they get.

    Raises:
        ValueError: on all ranks, if their variables do not match; it names the first that differs.
        RuntimeError: called while a `tf.function` is traced.
    """
    check_rank(root_rank)
    hvd = horovod()
    if hvd is None:
        return
    import keras
    import tensorflow as tf

    if not tf.executing_eagerly():
        raise RuntimeError(
            "broadcast_variables() cannot run inside a tf.function. Call it from Python, between "
            "two steps."
        )
    variables = list(variables)
    # A Keras variable holds a TensorFlow variable as `value`.
    natives = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    require_agreement(
        "the variables to broadcast",
        [f"{value.dtype.name} {tuple(value.shape)}" for value in natives],
        [str(getattr(v, "path", getattr(v, "name", "variable"))) for v in variables],
    )
    pending: list[tuple[Any, np.ndarray[Any, Any]]] = []
    for variable, value in zip(variables, natives, strict=True):
        pending.append((variable, value.numpy()))
        if sum(array.nbytes for _, array in pending) >= _BROADCAST_BYTES:
            _broadcast_arrays(hvd, pending, root_rank)
            pending = []
    if pending:
        _broadcast_arrays(hvd, pending, root_rank)


def _broadcast_arrays(
    hvd: Any, pairs: Sequence[tuple[Any, np.ndarray[Any, Any]]], root_rank: int
) -> None:
    # One message of plain bytes serves every data type, those that Horovod does not know included.
    sent = b"".join(np.ascontiguousarray(array).tobytes() for _, array in pairs)
    received = hvd.broadcast(np.frombuffer(sent, np.uint8), root_rank).numpy().tobytes()
    start = 0
    for variable, array in pairs:
        part = received[start : start + array.nbytes]
        start += array.nbytes
        if part != array.tobytes():
            variable.assign(np.frombuffer(part, array.dtype).reshape(array.shape))


def barrier() -> None:
    """Waits until every rank has come here."""
    hvd = horovod()
    if hvd is not None:
        hvd.allreduce(np.zeros(1, np.float32), op=hvd.Sum, name="tfaccel_barrier")


def require_agreement(what: str, lines: Sequence[str], labels: Sequence[str] | None = None) -> None:
    """Raises on every rank unless all ranks gave the same lines.

    Without this a rank whose tensors differ in number or name leaves the others waiting for ever.

    Args:
        what: the lines describe, named in the error.
        lines: one description per thing, compared between ranks.
        labels: what the things are called here, for the error only.

    Raises:
        ValueError: the lines differ; it names the first thing that does.
    """
    hvd = horovod()
    if hvd is None:
        return
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    digests = hvd.allgather(np.frombuffer(digest, np.uint8)[np.newaxis]).numpy()
    if (digests == digests[0]).all():
        return
    described = [
        f"{label} ({line})" if label else line
        for label, line in zip(labels or [""] * len(lines), lines, strict=True)
    ]
    everyone = hvd.allgather_object((list(lines), described), name="tfaccel_agreement")
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


def _running_horovod() -> Any:
    """Horovod if it was started, by us or by the user; never imported for the question alone."""
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
    module = _running_horovod()
    if module is not None:
        return int(getattr(module, question)())
    if _alone:
        return alone
    raise ValueError("The job is not known yet. Call tfaccel.distributed.init() first.")


def _as_tensor(value: Any) -> Any:
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if isinstance(value, tf.IndexedSlices):
            return value
    return keras.ops.convert_to_tensor(value)
