"""Loss scaling on several ranks: a step is skipped by all of them or by none."""

from collections.abc import Sequence
from typing import Any

import keras

from tfaccel.distributed.reduction import reduce_tensors
from tfaccel.distributed.runtime import Min, horovod

_MARK = "_tfaccel_agrees"


def agree_on_overflow(
    optimizer: keras.optimizers.LossScaleOptimizer, name: str, process_set: Any = None
) -> None:
    """Makes all ranks skip a step when one of them has a gradient that is not finite.

    Otherwise that rank alone would skip the exchange, and the others would wait for it for ever.

    Args:
        optimizer: the one that scales losses; a second call changes nothing.
        name: that the operation's name begins with, the same on all ranks.
        process_set: the ranks that take part; None for all.
    """
    if hasattr(optimizer, _MARK):
        return
    own_check = optimizer.check_finite

    def check_finite(grads: Sequence[Any]) -> Any:
        import tensorflow as tf

        if horovod() is None:  # an elastic job that is down to one worker
            return own_check(grads)
        finite = tf.cast(own_check(grads), tf.float32)
        agreed = reduce_tensors([finite], Min, f"{name}.finite", process_set=process_set)
        return agreed[0] > 0.5

    optimizer.check_finite = check_finite
    setattr(optimizer, _MARK, True)
