"""A look at the weights of all ranks after the first updates: they have to be the same."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfaccel.distributed import restarts
from tfaccel.distributed.process_sets import native_process_set
from tfaccel.distributed.runtime import horovod

# Weights are compared before these updates (counted from 0). The first finds ranks that began with
# different weights; by the tenth a learning rate that warms up from zero has moved them as well.
CHECKED_UPDATES = (1, 10)
# Machines of different kinds may round differently, by a few units in the last place.
_ROUNDING_UNITS = 8
_EPSILONS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "float64": 2.0**-52}


class WeightsCheck:
    """Compares the weights of all ranks inside the training step, at the first updates only.

    Args:
        name: of the operations, the same on all ranks and no other operation's.
        process_set: the ranks that take part; None for all.
    """

    def __init__(self, name: str, process_set: Any = None) -> None:
        import tensorflow as tf

        self._name = name
        self._process_set = process_set
        restarts.watch(self)
        self._updates: Any = None
        self._counted = -1
        # A `tf.function` that is being traced may make variables on its first call only.
        if tf.executing_eagerly():
            self._updates = tf.Variable(0, dtype=tf.int64, trainable=False, name="updates")

    def restart(self) -> None:
        """Begins to count anew, as the new workers of an elastic job do."""
        self._counted = -1
        if self._updates is not None:
            self._updates.assign(0)

    def run(self, variables: Sequence[Any]) -> None:
        """Counts an update that is about to happen and compares the weights if it is time.

        Args:
            variables: Keras or TensorFlow variables that ought to be the same on all ranks.

        Raises:
            tf.errors.OpError: on all ranks, if the weights differ; it names the variable. In a
                graph it is raised when the step runs.
        """
        import tensorflow as tf

        if self._updates is not None:
            update = self._updates.assign_add(1) - 1
        else:
            update = tf.ensure_shape(tf.numpy_function(self._count, [], tf.int64), [])
        due = tf.reduce_any(update == tf.constant(CHECKED_UPDATES, tf.int64))
        tf.cond(due, lambda: self._compare(variables, update), lambda: tf.constant(False))

    def find(self, variables: Sequence[Any]) -> list[str]:
        """Returns the paths of the variables whose weights differ between ranks, right now.

        Args:
            variables: as for `run`; called outside of a graph, by all ranks.
        """
        flags = np.asarray(self._differences(variables))
        return [path_of(v) for v, flag in zip(variables, flags, strict=True) if flag]

    def _count(self) -> Any:
        self._counted += 1
        return np.int64(self._counted)

    def _compare(self, variables: Sequence[Any], update: Any) -> Any:
        import tensorflow as tf

        anywhere = self._differences(variables)
        paths = [path_of(v) for v in variables]

        def report(flags: Any, update: Any) -> Any:
            _raise_if_any(flags, int(update), paths)
            return np.bool_(False)

        return tf.numpy_function(report, [anywhere, update], tf.bool)

    def _differences(self, variables: Sequence[Any]) -> Any:
        """Which variables differ from the first rank's on any rank; [variables] int32."""
        import tensorflow as tf

        hvd, group = horovod(), native_process_set(self._process_set)
        first = 0 if self._process_set is None else self._process_set.ranks[0]
        differs = tf.stack(
            [
                self._differs(variable, f"{self._name}{index}", first, group)
                for index, variable in enumerate(variables)
            ]
        )
        # Every rank learns of it, so that all of them end.
        return hvd.allreduce(
            tf.cast(differs, tf.int32),
            op=hvd.Max,
            name=self._name,
            ignore_name_scope=True,
            process_set=group,
        )

    def _differs(self, variable: Any, name: str, root: int, group: Any) -> Any:
        """Whether a variable differs from the first rank's by more than rounding; [] bool."""
        import tensorflow as tf

        value = tf.convert_to_tensor(variable)
        if not value.dtype.is_floating:
            return tf.constant(False)
        units = _ROUNDING_UNITS * _EPSILONS[value.dtype.name]
        if value.dtype in (tf.float16, tf.bfloat16):
            value = tf.cast(value, tf.float32)
        first = horovod().broadcast(
            value, root, name=name, ignore_name_scope=True, process_set=group
        )
        same = (value == first) | (tf.math.is_nan(value) & tf.math.is_nan(first))
        distance = tf.where(same, tf.zeros_like(value), tf.abs(value - first))
        # Written so that an infinite or undefined distance counts as a difference.
        return ~tf.reduce_all(distance <= units * tf.reduce_max(tf.abs(first)))


def path_of(variable: Any) -> str:
    """Returns the name that an error gives to a Keras or TensorFlow variable, or to a tensor."""
    return str(getattr(variable, "path", None) or getattr(variable, "name", "tensor"))


def _raise_if_any(flags: Any, update: int, paths: Sequence[str]) -> None:
    different = [path for path, flag in zip(paths, flags, strict=True) if flag]
    if not different:
        return
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    count = f"{update} update" + ("s" if update > 1 else "")
    raise RuntimeError(
        f"After {count} the weights of the ranks differ: {different[0]}{more} (of {len(paths)}). "
        "All ranks have to begin with the same weights: give fit() "
        "tfaccel.distributed.callbacks.BroadcastGlobalVariablesCallback(0), or in a loop of your "
        "own call broadcast_variables(model.weights) and broadcast_variables(optimizer.variables) "
        "before the second step. If they did, something changes weights on some ranks only."
    )
