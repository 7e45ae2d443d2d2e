"""Every element is sent, in few bits: QSGD, int8, and signs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from tfaccel.core.checks import check_in, check_positive, check_type
from tfaccel.core.configurable import Configurable
from tfaccel.distributed.compressors import (
    Channel,
    Exchanged,
    Payload,
    Shape,
    State,
    compressors,
    layout_of,
)
from tfaccel.distributed.error_feedback import ErrorFeedback

_QUANTIZER_BITS = (2, 4, 8)


@dataclass(frozen=True)
class _Gathered(Configurable):
    """Codes and scales as bytes, one message of the same length from every rank."""

    def communicate(self, payload: Payload, state: State, channel: Channel) -> Exchanged:
        """Gathers codes and scales in one message."""
        import tensorflow as tf

        codes, scales = payload.parts["codes"][0], payload.parts["scales"][0]
        scale_bytes = tf.reshape(tf.bitcast(scales, tf.uint8), [-1])
        message = tf.concat([scale_bytes, codes], 0)
        gathered = tf.reshape(channel.gather(message, "codes"), [channel.size, message.shape[0]])
        head = int(scale_bytes.shape[0])
        all_scales = tf.reshape(gathered[:, :head], [channel.size, head // 4, 4])
        received = {"codes": gathered[:, head:], "scales": tf.bitcast(all_scales, tf.float32)}
        return Exchanged(Payload(payload.layout, received), payload, state)


@dataclass(frozen=True)
class _Bucketed(_Gathered):
    """Buckets of elements with one scale each; a code is a sign and a level from 0."""

    bits: int = 8
    bucket: int = 512

    def __post_init__(self) -> None:
        check_in("bits", self.bits, _QUANTIZER_BITS)
        check_type("bucket", self.bucket, int)
        check_positive("bucket", self.bucket)
        if self.bucket % 8:
            raise ValueError(f"bucket must be a multiple of 8, but got {self.bucket}.")

    @property
    def levels(self) -> int:
        """The highest level, s in the paper."""
        return int(2 ** (self.bits - 1) - 1)

    def _buckets(self, gradients: Sequence[Any]) -> Any:
        """All elements as [buckets, bucket], the last filled up with zeros."""
        import tensorflow as tf

        layout = layout_of(gradients)
        flat = layout.flatten(gradients)
        padded = tf.pad(flat, [[0, -layout.total % self.bucket]])
        return tf.reshape(padded, [-1, self.bucket])

    def _payload(self, gradients: Sequence[Any], signs: Any, levels: Any, scales: Any) -> Payload:
        import tensorflow as tf

        negative = tf.cast(signs < 0, tf.uint8) * (self.levels + 1)
        codes = tf.reshape(tf.cast(levels, tf.uint8) + negative, [-1])
        parts = {"codes": _pack(codes, self.bits)[tf.newaxis], "scales": scales[tf.newaxis]}
        return Payload(layout_of(gradients), parts)

    def decompress(self, payload: Payload) -> list[Any]:
        """Averages what the ranks' codes stand for."""
        import tensorflow as tf

        codes, scales = payload.parts["codes"], payload.parts["scales"]
        ranks, buckets = (int(d) for d in scales.shape)
        total = tf.zeros([buckets, self.bucket])
        for rank in range(ranks):
            numbers = tf.reshape(_unpack(codes[rank], self.bits), [buckets, self.bucket])
            levels = tf.cast(tf.bitwise.bitwise_and(numbers, self.levels), tf.float32)
            signed = tf.where(numbers > self.levels, -levels, levels)
            total += signed * (scales[rank] / self.levels)[:, tf.newaxis]
        flat = tf.reshape(total / ranks, [-1])
        return payload.layout.split(flat[: payload.layout.total])


@compressors.register("qsgd")
@keras.saving.register_keras_serializable("tfaccel")
@dataclass(frozen=True)
class QSGD(_Bucketed):
    """Levels of each bucket's norm, rounded at random without bias (Alistarh et al. 2017, eq. 1).

    An element v of a bucket of norm n becomes n sign(v) l/s, where l is |v|/n s rounded up or down,
    up with the probability of its fraction. Every rank gathers the codes of all: N - 1 times
    `bits`/8 bytes an element.

    Args:
        bits: of a code, 2, 4 or 8: s = 2^(bits - 1) - 1.
        bucket: elements that share a norm, a multiple of 8.
        seed: of the rounding; each rank rounds on its own.

    Raises:
        ValueError: an argument is out of range.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_type("seed", self.seed, int)

    def init(self, shapes: Sequence[Shape]) -> State:  # noqa: ARG002
        """Begins at step 0."""
        import tensorflow as tf

        return {"step": tf.zeros([], tf.int64)}

    def compress(
        self, gradients: Sequence[Any], state: State, channel: Channel
    ) -> tuple[Payload, State]:
        """Rounds at random."""
        import tensorflow as tf

        values = self._buckets(gradients)
        norms = tf.norm(values, axis=1)
        seed = tf.stack([tf.constant(self.seed * 65537 + channel.rank, tf.int64), state["step"]])
        random = tf.random.stateless_uniform(tf.shape(values), seed)
        share = tf.math.divide_no_nan(tf.abs(values), norms[:, tf.newaxis])
        levels = tf.floor(share * self.levels + random)
        # Rounding of the norm may lift a lone element above it.
        levels = tf.minimum(levels, float(self.levels))
        payload = self._payload(gradients, values, levels, norms)
        return payload, {"step": state["step"] + 1}


@compressors.register("int8")
@keras.saving.register_keras_serializable("tfaccel")
@dataclass(frozen=True)
class Int8(_Bucketed):
    """Levels of each bucket's largest magnitude, rounded to the nearest.

    Less noise than `QSGD`, but biased; with `ErrorFeedback` that is made good. Every rank gathers
    the codes of all: N - 1 times `bits`/8 bytes an element.

    Args:
        bits: of a code, 2, 4 or 8.
        bucket: elements that share a scale, a multiple of 8.

    Raises:
        ValueError: an argument is out of range.
    """

    def init(self, shapes: Sequence[Shape]) -> State:  # noqa: ARG002
        """Nothing is kept."""
        return {}

    def compress(
        self,
        gradients: Sequence[Any],
        state: State,
        channel: Channel,  # noqa: ARG002
    ) -> tuple[Payload, State]:
        """Rounds to the nearest level."""
        import tensorflow as tf

        values = self._buckets(gradients)
        scales = tf.reduce_max(tf.abs(values), axis=1)
        share = tf.math.divide_no_nan(tf.abs(values), scales[:, tf.newaxis])
        return self._payload(gradients, values, tf.round(share * self.levels), scales), state


@keras.saving.register_keras_serializable("tfaccel")
@dataclass(frozen=True)
class ScaledSign(_Gathered):
    """The sign of every element, and each tensor's mean magnitude: 1 bit an element.

    C(p) = ||p||_1 / d sign(p) for a tensor of d elements (Karimireddy et al. 2019, section 4). It
    needs `ErrorFeedback`: `EFSignSGD()` is both.
    """

    def init(self, shapes: Sequence[Shape]) -> State:  # noqa: ARG002
        """Nothing is kept."""
        return {}

    def compress(
        self,
        gradients: Sequence[Any],
        state: State,
        channel: Channel,  # noqa: ARG002
    ) -> tuple[Payload, State]:
        """Takes signs, and one scale of each tensor."""
        import tensorflow as tf

        layout = layout_of(gradients)
        signs = tf.cast(layout.flatten(gradients) < 0, tf.uint8)
        scales = tf.stack([tf.reduce_mean(tf.abs(gradient)) for gradient in gradients])
        codes = _pack(tf.pad(signs, [[0, -layout.total % 8]]), 1)
        return Payload(layout, {"codes": codes[tf.newaxis], "scales": scales[tf.newaxis]}), state

    def decompress(self, payload: Payload) -> list[Any]:
        """Averages the scaled signs of the ranks."""
        import tensorflow as tf

        codes, scales = payload.parts["codes"], payload.parts["scales"]
        ranks = int(scales.shape[0])
        totals = [tf.zeros(shape) for shape in payload.layout.shapes]
        for rank in range(ranks):
            negative = _unpack(codes[rank], 1)[: payload.layout.total]
            signs = payload.layout.split(1.0 - 2.0 * tf.cast(negative, tf.float32))
            totals = [
                total + sign * scales[rank, i]
                for i, (total, sign) in enumerate(zip(totals, signs, strict=True))
            ]
        return [total / ranks for total in totals]


def EFSignSGD() -> ErrorFeedback:  # noqa: N802 - the paper's name
    """Returns signs with error feedback (Karimireddy et al. 2019): 32 times fewer bits a message.

    It takes a learning rate of its own, mostly smaller than SGD's.
    """
    return ErrorFeedback(ScaledSign())


compressors.register("efsignsgd")(EFSignSGD)


def _pack(codes: Any, bits: int) -> Any:
    """Packs numbers of 1, 2, 4 or 8 bits, the first in the highest bits; as many as fill bytes."""
    import tensorflow as tf

    per_byte = 8 // bits
    table = tf.reshape(codes, [-1, per_byte])
    shifts = tf.constant([8 - bits * (place + 1) for place in range(per_byte)], tf.uint8)
    # The bits of the parts do not overlap: their sum is their union.
    shifted = tf.bitwise.left_shift(table, shifts[tf.newaxis])
    packed = shifted[:, 0]
    for place in range(1, per_byte):
        packed = tf.bitwise.bitwise_or(packed, shifted[:, place])
    return packed


def _unpack(packed: Any, bits: int) -> Any:
    """Reads all numbers that `_pack` wrote; uint8."""
    import tensorflow as tf

    per_byte = 8 // bits
    shifts = tf.constant([8 - bits * (place + 1) for place in range(per_byte)], tf.uint8)
    shifted = tf.bitwise.right_shift(packed[:, tf.newaxis], shifts[tf.newaxis])
    return tf.reshape(tf.bitwise.bitwise_and(shifted, tf.constant(2**bits - 1, tf.uint8)), [-1])
