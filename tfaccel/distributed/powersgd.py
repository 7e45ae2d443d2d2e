"""Gradients as products of two thin matrices, which add up over the ranks (PowerSGD)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tfaccel.core.checks import check_positive, check_type
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
from tfaccel.distributed.error_feedback import ErrorFeedback

_TINY = 1e-20


@keras.saving.register_keras_serializable("tfaccel")
@dataclass(frozen=True)
class LowRank(Configurable):
    """One step of power iteration for each matrix (Vogels et al. 2019, algorithm 1).

    P = M Q is averaged over the ranks and made orthonormal, then Q = M^T P is averaged, and P Q^T
    stands for the mean of M. Q is where the next step begins (warm start). A kernel of more than
    two dimensions is a matrix whose columns are its last one. Tensors that would not become
    smaller, such as biases, travel whole with P. It needs `ErrorFeedback`: `PowerSGD()` is both.

    Args:
        rank: columns of P and Q.
        seed: of the first Q, the same on all ranks.

    Raises:
        ValueError: an argument is out of range.
    """

    rank: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_type("rank", self.rank, int)
        check_positive("rank", self.rank)
        check_type("seed", self.seed, int)

    def init(self, shapes: Sequence[Shape]) -> State:
        """Draws the first Q."""
        import tensorflow as tf

        random = np.random.default_rng(self.seed)
        starts = {
            str(i): tf.constant(random.normal(size=(columns, self.rank)), tf.float32)
            for i, (_, columns) in self._matrices(shapes).items()
        }
        return {"q": starts}

    def compress(
        self,
        gradients: Sequence[Any],
        state: State,
        channel: Channel,  # noqa: ARG002
    ) -> tuple[Payload, State]:
        """Multiplies every matrix with its Q."""
        import tensorflow as tf

        layout = layout_of(gradients)
        parts: dict[str, Any] = {}
        for i, gradient in enumerate(gradients):
            shape = self._matrices(layout.shapes).get(i)
            if shape is None:
                parts[f"whole{i}"] = gradient
            else:
                parts[f"matrix{i}"] = matrix = tf.reshape(gradient, shape)
                parts[f"p{i}"] = tf.linalg.matmul(matrix, state["q"][str(i)])
        return Payload(layout, parts), state

    def communicate(
        self,
        payload: Payload,
        state: State,  # noqa: ARG002
        channel: Channel,
    ) -> Exchanged:
        """Averages P and what is whole in one ring, then Q in another."""
        import tensorflow as tf

        parts = payload.parts
        first = {k: v for k, v in parts.items() if not k.startswith("matrix")}
        first = _mean(first, channel, "p")
        places = [k[1:] for k in first if k.startswith("p")]
        bases = {i: orthonormal(first[f"p{i}"]) for i in places}
        own_q = {
            i: tf.linalg.matmul(parts[f"matrix{i}"], basis, transpose_a=True)
            for i, basis in bases.items()
        }
        mean_q = _mean(own_q, channel, "q")
        shared = {f"p{i}": basis for i, basis in bases.items()}
        whole = {k: v for k, v in parts.items() if k.startswith("whole")}
        own = {**shared, **whole, **{f"q{i}": q for i, q in own_q.items()}}
        received = {**shared, **{k: first[k] for k in whole}}
        received |= {f"q{i}": q for i, q in mean_q.items()}
        return Exchanged(
            Payload(payload.layout, received), Payload(payload.layout, own), {"q": mean_q}
        )

    def decompress(self, payload: Payload) -> list[Any]:
        """Multiplies P with Q^T."""
        import tensorflow as tf

        parts = payload.parts
        return [
            parts[f"whole{i}"]
            if f"whole{i}" in parts
            else tf.reshape(
                tf.linalg.matmul(parts[f"p{i}"], parts[f"q{i}"], transpose_b=True), shape
            )
            for i, shape in enumerate(payload.layout.shapes)
        ]

    def _matrices(self, shapes: Sequence[Shape]) -> dict[int, tuple[int, int]]:
        """Rows and columns of those that become smaller, by their number."""
        found = {}
        for i, shape in enumerate(shapes):
            if len(shape) >= 2:
                rows, columns = math.prod(shape[:-1]), shape[-1]
                if (rows + columns) * self.rank < rows * columns:
                    found[i] = (rows, columns)
        return found


def PowerSGD(rank: int = 2, seed: int = 0) -> ErrorFeedback:  # noqa: N802 - the paper's name
    """Returns PowerSGD: low-rank gradients with error feedback (Vogels et al. 2019).

    Args:
        rank: of the approximation; 2 or 4 mostly do.
        seed: of the first step, the same on all ranks.

    Raises:
        ValueError: an argument is out of range.

    >>> PowerSGD(4).compressor
    LowRank(rank=4, seed=0)
    """
    return ErrorFeedback(LowRank(rank, seed))


compressors.register("powersgd")(PowerSGD)


def orthonormal(matrix: Any) -> Any:
    """Makes columns orthonormal by Gram-Schmidt, a column of zeros staying one; [rows, columns]."""
    import tensorflow as tf

    done: list[Any] = []
    for column in tf.unstack(matrix, axis=1):
        for earlier in done:
            column -= tf.reduce_sum(column * earlier) * earlier  # noqa: PLW2901
        done.append(column * tf.math.rsqrt(tf.maximum(tf.reduce_sum(column * column), _TINY)))
    return tf.stack(done, axis=1)


def _mean(tensors: dict[str, Any], channel: Channel, key: str) -> dict[str, Any]:
    """Averages tensors in one ring."""
    if not tensors:
        return {}
    layout = Layout(tuple(tuple(t.shape) for t in tensors.values()))
    mean = channel.mean(layout.flatten(list(tensors.values())), key)
    return dict(zip(tensors, layout.split(mean), strict=True))
