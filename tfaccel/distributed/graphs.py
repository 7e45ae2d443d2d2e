"""What code of ours needs that a user's `tf.function` calls."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def untranslated(function: Function) -> Function:
    """Keeps AutoGraph from translating a function, and all that it calls, into graph code.

    Ours is graph code already; translating it took 8 s of a first step.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        import tensorflow as tf

        return tf.autograph.experimental.do_not_convert(function)(*args, **kwargs)

    return call  # type: ignore[return-value]
