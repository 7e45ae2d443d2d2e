"""Things that one rank does for all."""

from collections.abc import Callable
from typing import Any, TypeVar

import keras

from tfaccel.distributed import runtime
from tfaccel.distributed.objects import broadcast_object

Result = TypeVar("Result")


def on_rank_0(*callbacks: keras.callbacks.Callback) -> list[keras.callbacks.Callback]:
    """Returns the callbacks on rank 0, and none on any other.

    For what prints or writes: `TensorBoard`, `CSVLogger`. Not for what stops training, nor for
    callbacks of this package, which exchange something with the other ranks.

    Args:
        callbacks: Keras callbacks.

    Returns:
        A list to add to that of `fit`.

    >>> len(on_rank_0(keras.callbacks.CSVLogger("log.csv")))
    1
    """
    return list(callbacks) if runtime.workers() == 1 or runtime.rank() == 0 else []


def run_on_rank_0(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Calls a function on rank 0 and gives every rank what it returned; all ranks call it.

    For what must happen once, such as a download.

    Args:
        function: what is called; what it returns has to be something that can be pickled.
        args: its arguments.
        kwargs: its arguments by name.

    Returns:
        What it returned on rank 0.

    Raises:
        RuntimeError: on the other ranks, if the function raises on rank 0, which raises its error.

    >>> run_on_rank_0(max, 1, 2)
    2
    """
    if runtime.workers() == 1:
        return function(*args, **kwargs)
    result, error = None, None
    if runtime.rank() == 0:
        try:
            result = function(*args, **kwargs)
        except Exception as caught:  # noqa: BLE001 - the others have to learn of any
            error = caught
    result, words = broadcast_object((result, error and f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    if words:
        raise RuntimeError(f"Rank 0 failed in {getattr(function, '__name__', function)!s}: {words}")
    return result
