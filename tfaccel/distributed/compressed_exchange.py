"""A compressor at work for one optimizer: its state is kept in variables of this rank."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfaccel.distributed import runtime
from tfaccel.distributed.compressors import Channel, Compressor
from tfaccel.distributed.horovod_channel import HorovodChannel, LocalChannel
from tfaccel.distributed.runtime import ReduceOp, Sum

Array = np.ndarray[Any, Any]


class CompressedExchange:
    """Exchanges the gradients of one optimizer by way of a compressor.

    Gradients of other data types travel as the compressor's float32 and come back as they were.

    Args:
        compressor: how.
        process_set: the ranks that take part; None for all.
    """

    def __init__(self, compressor: Compressor, process_set: Any = None) -> None:
        self.compressor = compressor
        self._process_set = process_set
        self._name = "tfaccel_compression"
        self._variables: dict[str, Any] | None = None
        self._restored: dict[str, Array] | None = None

    @property
    def needs_dense(self) -> bool:
        """Whether sparse gradients take part too, because momentum and clipping apply to them."""
        return bool(getattr(self.compressor, "acts_alone", False))

    def build(self, variables: Sequence[keras.Variable], name: str) -> None:  # noqa: ARG002
        """Takes the name of the operations; the state waits for the first gradients."""
        self._name = name

    def exchange(
        self, gradients: Sequence[Any], variables: Sequence[keras.Variable], op: ReduceOp
    ) -> list[Any]:
        """Returns the mean (or the sum) over the ranks of what their messages stand for."""
        import tensorflow as tf

        # AutoGraph would translate all of this, for seconds, to the same.
        run = tf.autograph.experimental.do_not_convert(self._exchange)
        return list(run(list(gradients), list(variables), op))

    def get_state(self) -> dict[str, Array]:
        """Returns the state of this rank: arrays by name, nothing before the first step."""
        if self._variables is None:
            return dict(self._restored or {})
        return {name: variable.numpy() for name, variable in self._variables.items()}

    def set_state(self, arrays: dict[str, Array]) -> None:
        """Sets the state of this rank, now or when the first gradients come.

        Raises:
            ValueError: it is the state of another compressor, or of another model.
        """
        if self._variables is None:
            self._restored = dict(arrays)
            return
        found = {name: tuple(array.shape) for name, array in arrays.items()}
        wanted = {name: tuple(v.shape) for name, v in self._variables.items()}
        if found != wanted:
            name = min(found.items() ^ wanted.items())[0]
            raise ValueError(
                f"The stored state does not fit {self.compressor!r} on this model: {name!r} is "
                f"{found.get(name, 'missing')} there and {wanted.get(name, 'missing')} here. "
                "Restore it with the model and the compressor that it was saved with."
            )
        for name, variable in self._variables.items():
            variable.assign(arrays[name])

    def _exchange(
        self, gradients: Sequence[Any], variables: Sequence[Any], op: ReduceOp
    ) -> list[Any]:
        import tensorflow as tf

        if not gradients:
            return []
        for gradient, variable in zip(gradients, variables, strict=True):
            if not gradient.shape.is_fully_defined():
                raise ValueError(
                    f"The gradient of {getattr(variable, 'path', variable.name)} has no fixed "
                    f"shape ({gradient.shape}). Compression needs one: give the variable a shape."
                )
        if self._variables is None:
            with tf.init_scope():
                self._make_variables([tuple(g.shape) for g in gradients])
        held = self._variables or {}
        channel: Channel = LocalChannel()
        if runtime.workers() > 1:
            channel = HorovodChannel(self._name, self._process_set)
        state = _nest({name: variable.read_value() for name, variable in held.items()})
        sent = [tf.cast(g, tf.float32) for g in gradients]
        payload, following = self.compressor.compress(sent, state, channel)
        done = self.compressor.communicate(payload, following, channel)
        for name, value in _flatten(done.state).items():
            held[name].assign(value)
        factor = float(channel.size) if op == Sum else 1.0
        received = self.compressor.decompress(done.received)
        return [
            tf.cast(r * factor if op == Sum else r, g.dtype)
            for r, g in zip(received, gradients, strict=True)
        ]

    def _make_variables(self, shapes: Sequence[tuple[int, ...]]) -> None:
        import tensorflow as tf

        initial = _flatten(self.compressor.init(shapes))
        self._variables = {
            name: tf.Variable(value, trainable=False, name=name.replace("/", "_"))
            for name, value in initial.items()
        }
        if self._restored is not None:
            self.set_state(self._restored)
            self._restored = None


def _flatten(state: Any, prefix: str = "") -> dict[str, Any]:
    """A state of dicts in dicts, by names with slashes."""
    flat: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Undoes `_flatten`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        place = nested
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
    return nested
