"""A few elements of each gradient are sent: the largest, random ones, those above a threshold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tfaccel.core.checks import check_fraction, check_in, check_positive, check_type
from tfaccel.core.configurable import Configurable
from tfaccel.distributed.compressors import (
    Channel,
    Exchanged,
    Layout,
    Payload,
    Shape,
    State,
    compressors,
    layout_of,
)
from tfaccel.distributed.sparse_messages import SparseFormat, split_counts
from tfaccel.distributed.threshold_selection import places_above, select_largest, select_top
from tfaccel.distributed.value_codes import VALUE_BITS

Array = np.ndarray[Any, Any]
SELECTIONS = ("exact", "sampled")


@dataclass(frozen=True)
class _Sparsifier(Configurable):
    """Chosen elements travel with their places, in one message for all tensors."""

    def init(self, shapes: Sequence[Shape]) -> State:  # noqa: ARG002
        """Begins at step 0."""
        import tensorflow as tf

        return {"step": tf.zeros([], tf.int64)}

    def compress(
        self,
        gradients: Sequence[Any],
        state: State,
        channel: Channel,  # noqa: ARG002
    ) -> tuple[Payload, State]:
        """Writes the message."""
        import tensorflow as tf

        layout = layout_of(gradients)
        written = self._format(layout)

        def write(flat: Array, step: Array) -> Array:
            parts = np.split(flat, np.cumsum(layout.sizes)[:-1])
            begins = np.cumsum([0, *layout.sizes])
            chosen = [
                self._choose(part, int(step)) + begin
                for part, begin in zip(parts, begins, strict=False)
            ]
            return written.encode(flat, np.concatenate(chosen))[0]

        message = tf.numpy_function(write, [layout.flatten(gradients), state["step"]], tf.uint8)
        message.set_shape([None])
        return Payload(layout, {"message": message}), {"step": state["step"] + 1}

    def communicate(self, payload: Payload, state: State, channel: Channel) -> Exchanged:
        """Gathers the messages."""
        gathered = channel.gather(payload.parts["message"], "message")
        return Exchanged(Payload(payload.layout, {"message": gathered}), payload, state)

    def decompress(self, payload: Payload) -> list[Any]:
        """Averages the messages, with zeros where nothing was sent."""
        return payload.layout.split(
            read_mean(self._format(payload.layout), payload.parts["message"])
        )

    def _format(self, layout: Layout) -> SparseFormat:
        raise NotImplementedError

    def _choose(self, values: Array, step: int) -> Array:
        """Returns the places of one tensor, [elements] float32, ascending."""
        raise NotImplementedError


@compressors.register("topk")
@keras.saving.register_keras_serializable("tfaccel")
@dataclass(frozen=True)
class TopK(_Sparsifier):
    """The largest elements of each tensor, at least one (Aji & Heafield 2017).

    Wants `ErrorFeedback` around it.

    Args:
        ratio: share of the elements that is sent.
        selection: "exact", or "sampled" by a threshold, much faster on large tensors.
        value_bits: 32 for values as they are; 8, 4 or 2 for a sign and a level.

    Raises:
        ValueError: an argument is out of range.
    """

    ratio: float = 0.01
    selection: str = "exact"
    value_bits: int = 32

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        check_in("selection", self.selection, SELECTIONS)
        check_in("value_bits", self.value_bits, VALUE_BITS)

    def _format(self, layout: Layout) -> SparseFormat:
        return SparseFormat(tuple(layout.sizes), self.value_bits)

    def _choose(self, values: Array, step: int) -> Array:
        (count,) = split_counts([len(values)], self.ratio)
        if not count:
            return np.zeros(0, np.int64)
        if self.selection == "exact":
            return select_top(values, count)
        return select_largest(values, count, step)


@compressors.register("threshold")
@keras.saving.register_keras_serializable("tfaccel")
@dataclass(frozen=True)
class Threshold(_Sparsifier):
    """The elements of at least a given magnitude (Strom 2015).

    Wants `ErrorFeedback` around it.

    Args:
        threshold: the magnitude.
        value_bits: 32 for values as they are; 8, 4 or 2 for a sign and a level.

    Raises:
        ValueError: an argument is out of range.
    """

    threshold: float = 0.001
    value_bits: int = 32

    def __post_init__(self) -> None:
        check_positive("threshold", self.threshold)
        check_in("value_bits", self.value_bits, VALUE_BITS)

    def _format(self, layout: Layout) -> SparseFormat:
        return SparseFormat(tuple(layout.sizes), self.value_bits)

    def _choose(self, values: Array, step: int) -> Array:  # noqa: ARG002
        return places_above(values, self.threshold)


@compressors.register("randomk")
@keras.saving.register_keras_serializable("tfaccel")
@dataclass(frozen=True)
class RandomK(Configurable):
    """Random elements, the same on all ranks (Stich et al. 2018).

    All ranks draw them from one seed, so that no places are sent, and values go by ring-allreduce:
    4 bytes each, however many ranks there are. Wants `ErrorFeedback` around it.

    Args:
        ratio: share of the elements that is sent at a step.
        seed: the same on all ranks.

    Raises:
        ValueError: an argument is out of range.
    """

    ratio: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        check_type("seed", self.seed, int)

    def init(self, shapes: Sequence[Shape]) -> State:  # noqa: ARG002
        """Begins at step 0."""
        import tensorflow as tf

        return {"step": tf.zeros([], tf.int64)}

    def compress(
        self,
        gradients: Sequence[Any],
        state: State,
        channel: Channel,  # noqa: ARG002
    ) -> tuple[Payload, State]:
        """Draws places and takes the values there."""
        import tensorflow as tf

        layout = layout_of(gradients)
        (count,) = split_counts([layout.total], self.ratio)

        def draw(step: Array) -> Array:
            random = np.random.default_rng([self.seed, int(step)])
            return np.sort(random.choice(layout.total, count, replace=False, shuffle=False))

        places = tf.numpy_function(draw, [state["step"]], tf.int64)
        places.set_shape([count])
        values = tf.gather(layout.flatten(gradients), places)
        parts = {"places": places, "values": values}
        return Payload(layout, parts), {"step": state["step"] + 1}

    def communicate(self, payload: Payload, state: State, channel: Channel) -> Exchanged:
        """Averages the values."""
        mean = channel.mean(payload.parts["values"], "values")
        received = {**payload.parts, "values": mean}
        return Exchanged(Payload(payload.layout, received), payload, state)

    def decompress(self, payload: Payload) -> list[Any]:
        """Puts the values into their places."""
        import tensorflow as tf

        places, values = payload.parts["places"], payload.parts["values"]
        flat = tf.scatter_nd(places[:, tf.newaxis], values, [payload.layout.total])
        return payload.layout.split(flat)


def read_mean(written: SparseFormat, messages: Any) -> Any:
    """Returns the mean of messages that stand one after another; [elements] float32."""
    import tensorflow as tf

    def read(messages: Array) -> Array:
        total, number = written.decode_sum(messages)
        return total if number == 1 else np.divide(total, np.float32(number), out=total)

    flat = tf.numpy_function(read, [messages], tf.float32)
    flat.set_shape([sum(written.sizes) + sum(written.dense_sizes)])
    return flat


def _check_ratio(ratio: float) -> None:
    check_fraction("ratio", ratio, closed_right=True)
    check_positive("ratio", ratio)
