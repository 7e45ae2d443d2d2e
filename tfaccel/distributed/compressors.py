"""What a gradient compressor is: compress, communicate, decompress, and a state between steps.

A compressor is plain data, its functions are pure: the state goes in and comes out, as in optax. So
compressors compose (`ErrorFeedback(TopK(0.01))`), one object serves any number of optimizers, and
several ranks can be simulated in one process.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import keras

from tfaccel.core.configurable import Configurable
from tfaccel.core.registry import Registry

# Tensors by name; a compressor around another keeps the inner one's in a dict of its own.
State = Mapping[str, Any]
Shape = tuple[int, ...]


class Channel(Protocol):
    """How tensors reach the other ranks. All ranks make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """The number of this rank, from 0."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    def mean(self, tensor: Any, key: str) -> Any:
        """Averages a float32 tensor over the ranks, by ring-allreduce.

        Each rank sends 2(N - 1)/N times its bytes.

        Args:
            tensor: any shape, the same on all ranks.
            key: tells the calls of one exchange apart.
        """

    def mean_half(self, tensor: Any, key: str) -> Any:
        """Averages a float16 or bfloat16 vector, summed in float32, sent in 16 bits.

        Args:
            tensor: [n].
            key: tells the calls of one exchange apart.

        Returns:
            [n], of the data type given.
        """

    def gather(self, message: Any, key: str) -> Any:
        """Joins the messages of all ranks; each rank sends N - 1 times its bytes.

        Args:
            message: [bytes] uint8, of any length.
            key: tells the calls of one exchange apart.

        Returns:
            [bytes of all ranks] uint8, in the order of ranks.
        """


@dataclass(frozen=True)
class Layout:
    """Tensors as one vector, one after another.

    Attributes:
        shapes: of the tensors.
    """

    shapes: tuple[Shape, ...]

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def total(self) -> int:
        """Number of elements of all."""
        return sum(self.sizes)

    def flatten(self, tensors: Sequence[Any]) -> Any:
        """Returns the elements of all tensors; [total] float32."""
        import tensorflow as tf

        if not tensors:
            return tf.zeros([0])
        return tf.concat([tf.reshape(tf.cast(t, tf.float32), [-1]) for t in tensors], 0)

    def split(self, flat: Any) -> list[Any]:
        """Returns the tensors whose elements are in `flat`, [total]."""
        import tensorflow as tf

        parts = tf.split(flat, self.sizes) if self.shapes else []
        return [tf.reshape(p, s) for p, s in zip(parts, self.shapes, strict=True)]


@dataclass(frozen=True)
class Payload:
    """What travels, or what has arrived.

    Attributes:
        layout: of the gradients that were compressed.
        parts: tensors by name, as the compressor likes.
    """

    layout: Layout
    parts: Mapping[str, Any]


@dataclass(frozen=True)
class Exchanged:
    """What came of a communication.

    Attributes:
        received: the payload of all ranks together; decompressed, it is their mean.
        own: this rank's part in it; decompressed, it is what this rank has contributed. Error
            feedback keeps what is missing in it.
        state: the state that follows.
    """

    received: Payload
    own: Payload
    state: State


@runtime_checkable
class Compressor(Protocol):
    """A way to average gradients over the ranks in fewer bytes than they take.

    All functions are made of TensorFlow operations, and are called in a graph or eagerly.
    """

    def init(self, shapes: Sequence[Shape]) -> State:
        """Returns the state before the first step, for float32 gradients of these shapes."""

    def compress(
        self, gradients: Sequence[Any], state: State, channel: Channel
    ) -> tuple[Payload, State]:
        """Makes of this rank's gradients what is to be sent.

        Args:
            gradients: float32 tensors of the shapes that `init` was given.
            state: of the step before.
            channel: for the number of ranks; nothing is sent yet.
        """

    def communicate(self, payload: Payload, state: State, channel: Channel) -> Exchanged:
        """Sends a payload and receives those of the others."""

    def decompress(self, payload: Payload) -> list[Any]:
        """Returns the gradients that a payload stands for, float32."""


compressors = Registry[Any]("compressor", Compressor)


@compressors.register("none")
@keras.saving.register_keras_serializable("tfaccel")
@dataclass(frozen=True)
class NoCompression(Configurable):
    """Gradients as they are, by ring-allreduce.

    >>> NoCompression().get_config()
    {}
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
        """Puts the gradients into one vector."""
        layout = layout_of(gradients)
        return Payload(layout, {"flat": layout.flatten(gradients)}), state

    def communicate(self, payload: Payload, state: State, channel: Channel) -> Exchanged:
        """Averages the vector."""
        mean = channel.mean(payload.parts["flat"], "flat")
        return Exchanged(Payload(payload.layout, {"flat": mean}), payload, state)

    def decompress(self, payload: Payload) -> list[Any]:
        """Takes the vector apart."""
        return payload.layout.split(payload.parts["flat"])


@dataclass(frozen=True)
class _Half(Configurable):
    """Gradients rounded to 16 bits, summed in float32 on the way."""

    def init(self, shapes: Sequence[Shape]) -> State:  # noqa: ARG002
        """Nothing is kept."""
        return {}

    def compress(
        self,
        gradients: Sequence[Any],
        state: State,
        channel: Channel,  # noqa: ARG002
    ) -> tuple[Payload, State]:
        """Rounds the gradients."""
        import tensorflow as tf

        layout = layout_of(gradients)
        half = tf.cast(layout.flatten(gradients), self._dtype())
        return Payload(layout, {"half": half}), state

    def communicate(self, payload: Payload, state: State, channel: Channel) -> Exchanged:
        """Averages what was rounded."""
        mean = channel.mean_half(payload.parts["half"], "half")
        return Exchanged(Payload(payload.layout, {"half": mean}), payload, state)

    def decompress(self, payload: Payload) -> list[Any]:
        """Widens the values to 32 bits."""
        import tensorflow as tf

        return payload.layout.split(tf.cast(payload.parts["half"], tf.float32))

    def _dtype(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define _dtype().")


@compressors.register("fp16")
@keras.saving.register_keras_serializable("tfaccel")
@dataclass(frozen=True)
class FP16(_Half):
    """Gradients as float16: 11 bits of mantissa, and nothing above 65,504.

    Half the bytes of `NoCompression`. Gloo's own float16 sum is slow, so slices are exchanged all
    to all, summed in float32 and gathered.
    """

    def _dtype(self) -> Any:
        import tensorflow as tf

        return tf.float16


@compressors.register("bf16")
@keras.saving.register_keras_serializable("tfaccel")
@dataclass(frozen=True)
class BFloat16(_Half):
    """Gradients as bfloat16: 8 bits of mantissa, the range of float32.

    Half the bytes of `NoCompression`. Horovod does not know the type: the bit patterns are sent.
    """

    def _dtype(self) -> Any:
        import tensorflow as tf

        return tf.bfloat16


def resolve_compression(compression: Any) -> Any:
    """Returns the compressor that a name or a config stands for; anything else as it is.

    Raises:
        ValueError: there is no compressor of that name or config.
    """
    if isinstance(compression, (str, dict, Compressor)):
        compression = compressors.get(compression)
    return None if isinstance(compression, NoCompression) else compression


def layout_of(gradients: Sequence[Any]) -> Layout:
    """Returns the layout of tensors, whose shapes are known."""
    return Layout(tuple(tuple(int(d) for d in gradient.shape) for gradient in gradients))
