"""Who takes part, as operations: answered when a graph runs, not when it is traced.

For graphs that outlive a change of workers in an elastic job.
"""

from typing import Any

from tfaccel.distributed import runtime


def rank_op(name: str | None = None) -> Any:
    """The number of this process among all; [] int32."""
    return _ask("rank_op", 0, name=name)


def size_op(process_set_id: int = 0, name: str | None = None) -> Any:
    """The number of processes in the job, or in a process set; [] int32."""
    return _ask("size_op", 1, process_set_id=process_set_id, name=name)


def local_rank_op(name: str | None = None) -> Any:
    """The number of this process among those of its machine; [] int32."""
    return _ask("local_rank_op", 0, name=name)


def local_size_op(name: str | None = None) -> Any:
    """The number of processes on this machine; [] int32."""
    return _ask("local_size_op", 1, name=name)


def process_set_included_op(process_set_id: int = 0, name: str | None = None) -> Any:
    """1 if this process is a member of the process set, else 0; [] int32."""
    return _ask("process_set_included_op", 1, process_set_id=process_set_id, name=name)


def _ask(question: str, alone: int, **arguments: Any) -> Any:
    import tensorflow as tf

    # An elastic job that is down to one worker still has Horovod to ask.
    hvd = runtime.running_horovod()
    return tf.constant(alone) if hvd is None else getattr(hvd, question)(**arguments)
