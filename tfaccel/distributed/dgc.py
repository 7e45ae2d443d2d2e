"""Deep Gradient Compression: one gradient in a thousand is sent (Lin et al. 2018)."""

import math
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
from tfaccel.distributed.sparse_messages import (
    SparseFormat,
    gather_bytes,
    ring_bytes,
    split_counts,
)
from tfaccel.distributed.sparsifiers import read_mean
from tfaccel.distributed.threshold_selection import select_largest
from tfaccel.distributed.value_codes import VALUE_BITS

Array = np.ndarray[Any, Any]
# Section 3.3: the density falls by four from one stage of the warm-up to the next.
_WARM_UP = tuple(1 - 0.25**stage for stage in range(1, 5))
# Smaller ones are not worth their places.
_DENSE_BELOW = 1024


@compressors.register("dgc")
@keras.saving.register_keras_serializable("tfaccel")
@dataclass(frozen=True)
class DGC(Configurable):
    """Deep Gradient Compression (Lin et al. 2018): the largest accumulated gradients are sent.

    On every rank, for a local gradient g clipped to a norm of `clip_norm` N^(-1/2):

        u = momentum u + g          momentum correction: it is the velocity that is accumulated
        v = v + u
        send v where |v| is above a threshold that a sample of each tensor gives; there, u = 0
        (momentum factor masking) and v = what the message's rounding has left of it

    Momentum is applied here and not by the optimizer: give it `keras.optimizers.SGD` without
    momentum. Biases, scales of normalization and small tensors are sent whole, in the same message.

    In the warm-up sparsity is 75, 93.75, 98.4375 and 99.6 %, a quarter of it each. Whenever the
    messages of all ranks would be more bytes than a ring-allreduce of everything, the ring is used:
    u stays, v is sent whole, which is plain momentum SGD.

    Args:
        momentum: of the velocity; 0 for optimizers that are not SGD.
        sparsity: share of each large tensor that is not sent at a step, after the warm-up.
        warmup_steps: how many updates the warm-up lasts; the paper takes four epochs.
        clip_norm: global norm of the sum of all ranks' gradients, of which each may have its
            share; None for no clipping.
        nesterov: whether v grows by g + momentum u instead of u.
        value_bits: of each value that is sent: 2, 4, 8, or 32 for no rounding.
        dense_bits: of each element of the tensors that are sent whole.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    >>> DGC(momentum=0.5).get_config()["sparsity"]
    0.999
    """

    momentum: float = 0.9
    sparsity: float = 0.999
    warmup_steps: int = 0
    clip_norm: float | None = None
    nesterov: bool = False
    value_bits: int = 4
    dense_bits: int = 8

    def __post_init__(self) -> None:
        check_fraction("momentum", self.momentum)
        check_fraction("sparsity", self.sparsity)
        check_type("warmup_steps", self.warmup_steps, int)
        if isinstance(self.warmup_steps, bool) or self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be an int from 0, but got {self.warmup_steps!r}.")
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        check_type("nesterov", self.nesterov, bool)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=True needs a momentum above 0.")
        check_in("value_bits", self.value_bits, VALUE_BITS)
        check_in("dense_bits", self.dense_bits, VALUE_BITS)

    @property
    def keeps_errors(self) -> bool:
        """Whether errors are kept without `ErrorFeedback`: yes."""
        return True

    @property
    def acts_alone(self) -> bool:
        """Whether gradients are changed with one worker too: momentum and clipping are."""
        return bool(self.momentum) or self.clip_norm is not None

    def sparsity_at(self, step: int) -> float:
        """Returns the sparsity at an update, from 0."""
        if not self.warmup_steps:
            return self.sparsity
        return self._stages()[min(step * len(_WARM_UP) // self.warmup_steps, len(_WARM_UP))]

    def init(self, shapes: Sequence[Shape]) -> State:
        """Begins at rest."""
        import tensorflow as tf

        total = Layout(tuple(shapes)).total
        return {
            "step": tf.zeros([], tf.int64),
            "velocity": tf.zeros([total]),
            "accumulated": tf.zeros([total]),
        }

    def compress(
        self, gradients: Sequence[Any], state: State, channel: Channel
    ) -> tuple[Payload, State]:
        """Accumulates, chooses what is sent, and masks it."""
        import tensorflow as tf

        original = layout_of(gradients)
        order, layout, written = self._plan(original)
        flat = layout.flatten([gradients[i] for i in order])
        if self.clip_norm is not None:
            flat = tf.clip_by_norm(flat, self.clip_norm / math.sqrt(channel.size))
        velocity = self.momentum * state["velocity"] + flat
        grown = flat + self.momentum * velocity if self.nesterov else velocity
        accumulated = state["accumulated"] + grown
        step = state["step"]
        density, by_ring = self._decide(written, layout.total, step, channel.size)

        def send_all() -> tuple[Any, Any, Any, Any]:
            nothing = tf.zeros([0], tf.uint8)
            return nothing, accumulated, tf.zeros_like(accumulated), velocity

        def send_largest() -> tuple[Any, Any, Any, Any]:
            message, places, left, masked = tf.numpy_function(
                lambda *given: _write(written, *given),
                [accumulated, density, step],
                [tf.uint8, tf.int64, tf.float32, tf.int64],
            )
            message.set_shape([None])
            for tensor in (places, left, masked):
                tensor.set_shape([None])
            kept = tf.tensor_scatter_nd_update(accumulated, places[:, tf.newaxis], left)
            zeros = tf.zeros([tf.shape(masked)[0]])
            rest = tf.tensor_scatter_nd_update(velocity, masked[:, tf.newaxis], zeros)
            return message, tf.zeros([0]), kept, rest

        message, whole, kept, rest = _either(by_ring, send_all, send_largest)
        parts = {"message": message, "whole": whole, "by_ring": by_ring}
        return Payload(original, parts), {"step": step + 1, "velocity": rest, "accumulated": kept}

    def communicate(self, payload: Payload, state: State, channel: Channel) -> Exchanged:
        """Gathers the messages, or averages everything in a ring."""
        parts = payload.parts
        message, whole = _either(
            parts["by_ring"],
            lambda: (parts["message"], channel.mean(parts["whole"], "whole")),
            lambda: (channel.gather(parts["message"], "message"), parts["whole"]),
        )
        received = {**parts, "message": message, "whole": whole}
        return Exchanged(Payload(payload.layout, received), payload, state)

    def decompress(self, payload: Payload) -> list[Any]:
        """Averages the messages, with zeros where nothing was sent."""
        import tensorflow as tf

        order, layout, written = self._plan(payload.layout)
        parts = payload.parts
        (flat,) = _either(
            parts["by_ring"],
            lambda: (parts["whole"],),
            lambda: (read_mean(written, parts["message"]),),
        )
        ordered = layout.split(tf.ensure_shape(flat, [layout.total]))
        return [ordered[order.index(i)] for i in range(len(order))]

    def _stages(self) -> list[float]:
        """Sparsities of the warm-up's quarters, and the last."""
        return [*(min(stage, self.sparsity) for stage in _WARM_UP), self.sparsity]

    def _plan(self, layout: Layout) -> tuple[list[int], Layout, SparseFormat]:
        """The order of tensors in the vector, large ones first, and how it is written."""
        dense = [len(s) < 2 or math.prod(s) < _DENSE_BELOW for s in layout.shapes]
        order = sorted(range(len(dense)), key=lambda i: (dense[i], i))
        ordered = Layout(tuple(layout.shapes[i] for i in order))
        large = len(dense) - sum(dense)
        sizes = tuple(ordered.sizes)
        written = SparseFormat(sizes[:large], self.value_bits, sizes[large:], self.dense_bits)
        return order, ordered, written

    def _decide(self, written: SparseFormat, total: int, step: Any, ranks: int) -> tuple[Any, Any]:
        """The density of a step, and whether a ring carries it: a bool if that is known already."""
        import tensorflow as tf

        densities = [1 - sparsity for sparsity in self._stages()]
        rings = [
            gather_bytes(written.expected_bytes(density), ranks) >= ring_bytes(total, ranks)
            for density in densities
        ]
        if not self.warmup_steps:
            return tf.constant(densities[-1], tf.float64), rings[-1]
        stage = tf.minimum(step * len(_WARM_UP) // self.warmup_steps, len(_WARM_UP))
        density = tf.gather(tf.constant(densities, tf.float64), stage)
        if len(set(rings)) == 1:
            return density, rings[0]
        return density, tf.gather(tf.constant(rings), stage)


def _write(
    written: SparseFormat, flat: Array, density: Array, step: Array
) -> tuple[Array, Array, Array, Array]:
    """Chooses and writes.

    Returns:
        The message; places that were sent, chosen ones and those of dense tensors; what the
        rounding has left of the values there; and the chosen places alone.
    """
    begins = np.cumsum([0, *written.sizes])
    counts = split_counts(written.sizes, float(density))
    chosen = [
        select_largest(flat[begin : begin + size], count, int(step)) + begin
        for begin, size, count in zip(begins, written.sizes, counts, strict=False)
    ]
    masked = np.concatenate([*chosen, np.zeros(0, np.int64)])
    message, seen = written.encode(flat, masked)
    places = np.concatenate([masked, np.arange(begins[-1], len(flat))])
    return message, places, flat[places] - seen, masked


def _either(choice: Any, first: Any, second: Any) -> Any:
    """`first()` or `second()`, decided now if it is known now."""
    import tensorflow as tf

    if isinstance(choice, bool):
        return first() if choice else second()
    return tf.cond(choice, first, second)
