"""Training that survives workers that die, and takes in those that come.

Run with `horovodrun -np 2 --min-np 1 --host-discovery-script ./hosts.sh python train.py`.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from tfaccel.distributed import restarts, runtime
from tfaccel.distributed.elastic_callbacks import (
    CommitStateCallback,
    UpdateBatchStateCallback,
    UpdateEpochStateCallback,
)
from tfaccel.distributed.elastic_states import (
    KerasState,
    ObjectState,
    State,
    TensorFlowKerasState,
    TensorFlowState,
)

__all__ = [
    "CommitStateCallback",
    "KerasState",
    "ObjectState",
    "State",
    "TensorFlowKerasState",
    "TensorFlowState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]

Result = TypeVar("Result")

# What a collective operation says, in whatever words, when a rank is lost in the middle of it.
_LOST = ("Horovod", "horovod", "gloo", "Gloo")


def run(func: Callable[..., Result]) -> Callable[..., Result]:
    """Makes a training function begin again, from the last commit, when the workers change.

    The function has to take up its work where `state` says it is. It must make its `tf.function`s
    itself (as `fit` does), because they hold the number of workers. No collective operation may run
    before it: a worker that comes later would wait for ranks that have long passed it. Errors that
    have nothing to do with the job are raised as they are.

    Outside of an elastic job the function is called once.

    Args:
        func: takes a `State` first, and whatever else.

    Returns:
        A function of the same arguments.

    >>> @run
    ... def train(state, epochs):
    ...     while state.epoch < epochs:
    ...         state.epoch += 1
    ...         state.commit()
    >>> state = ObjectState(epoch=0)
    >>> train(state, 3)
    >>> state.epoch
    3
    """

    @functools.wraps(func)
    def call(state: State, *args: Any, **kwargs: Any) -> Result:
        runtime.init()
        if not runtime.is_elastic():
            state.sync()
            return func(state, *args, **kwargs)
        from horovod.common.elastic import run_fn

        marked = restarts.mark()

        def begin_again() -> None:
            import horovod.tensorflow

            horovod.tensorflow.shutdown()
            horovod.tensorflow.init()
            restarts.restart(marked)

        attempt = functools.wraps(func)(functools.partial(_attempt, func))
        return run_fn(attempt, begin_again)(state, *args, **kwargs)

    return call


def _attempt(func: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Calls the function; what comes of a lost rank becomes Horovod's own error for it."""
    import tensorflow as tf
    from horovod.common.exceptions import HorovodInternalError

    try:
        return func(*args, **kwargs)
    except tf.errors.OpError as error:
        if any(word in str(error.message) for word in _LOST):
            raise HorovodInternalError(error) from error
        raise
