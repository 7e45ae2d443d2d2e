"""Python objects and variables that every rank gets from one, or from all."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfaccel.distributed.process_sets import native_process_set
from tfaccel.distributed.runtime import check_rank, horovod, require_agreement

_BROADCAST_BYTES = 64 * 2**20  # bounds the copies held while variables are sent


def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    session: None = None,  # noqa: ARG001
    name: str | None = None,
    process_set: Any = None,
) -> Any:
    """Gives every rank the object of one; what the others pass does not matter.

    Args:
        obj: anything that can be pickled.
        root_rank: the rank whose object it is.
        session: None; of TensorFlow 1, which is not supported.
        name: of the operation, the same on all ranks.
        process_set: the ranks that take part; None for all.

    Returns:
        The object of rank `root_rank`.
    """
    check_rank(root_rank)
    hvd = horovod()
    if hvd is None:
        return obj
    # Horovod's own default is the name of the object's class, which need not be the same
    # everywhere.
    native = native_process_set(process_set)
    return hvd.broadcast_object(obj, root_rank, name=name or "tfaccel_object", process_set=native)


def allgather_object(
    obj: Any,
    session: None = None,  # noqa: ARG001
    name: str | None = None,
    process_set: Any = None,
) -> list[Any]:
    """Gives every rank the objects of all.

    Args:
        obj: anything that can be pickled.
        session: None; of TensorFlow 1, which is not supported.
        name: of the operation, the same on all ranks.
        process_set: the ranks that take part; None for all.

    Returns:
        One object of every rank, in the order of ranks.
    """
    hvd = horovod()
    if hvd is None:
        return [obj]
    native = native_process_set(process_set)
    return list(hvd.allgather_object(obj, name=name or "tfaccel_objects", process_set=native))


def broadcast_variables(
    variables: Any,
    root_rank: int = 0,
    process_set: Any = None,
    inplace: bool = False,  # noqa: ARG001
) -> None:
    """Sets variables on every rank to their values on one.

    Args:
        variables: Keras or TensorFlow variables, such as `model.weights` or `optimizer.variables`;
            as many, of the same shapes and data types, on all ranks.
        root_rank: the rank whose values they get.
        process_set: the ranks that take part; None for all.
        inplace: accepted for Horovod's sake; variables are always set in place.

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
    native = native_process_set(process_set)
    variables = list(variables)
    # A Keras variable holds a TensorFlow variable as `value`.
    natives = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    require_agreement(
        "the variables to broadcast",
        [f"{value.dtype.name} {tuple(value.shape)}" for value in natives],
        [str(getattr(v, "path", getattr(v, "name", "variable"))) for v in variables],
        native,
    )
    pending: list[tuple[Any, np.ndarray[Any, Any]]] = []
    for variable, value in zip(variables, natives, strict=True):
        pending.append((variable, value.numpy()))
        if sum(array.nbytes for _, array in pending) >= _BROADCAST_BYTES:
            _broadcast_arrays(hvd, pending, root_rank, native)
            pending = []
    if pending:
        _broadcast_arrays(hvd, pending, root_rank, native)


def _broadcast_arrays(
    hvd: Any, pairs: Sequence[tuple[Any, np.ndarray[Any, Any]]], root_rank: int, native: Any
) -> None:
    # One message of plain bytes serves every data type, those that Horovod does not know included.
    sent = b"".join(np.ascontiguousarray(array).tobytes() for _, array in pairs)
    own = np.frombuffer(sent, np.uint8)
    received = hvd.broadcast(own, root_rank, process_set=native).numpy().tobytes()
    start = 0
    for variable, array in pairs:
        part = received[start : start + array.nbytes]
        start += array.nbytes
        if part != array.tobytes():
            variable.assign(np.frombuffer(part, array.dtype).reshape(array.shape))
