"""What a compressor leaves out is kept and added to the next gradient (compensation)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from tfaccel.core.configurable import Configurable
from tfaccel.distributed.compressors import (
    Channel,
    Exchanged,
    Payload,
    Shape,
    State,
    compressors,
)


@keras.saving.register_keras_serializable("tfaccel")
@dataclass(frozen=True)
class ErrorFeedback(Configurable):
    """Adds to each gradient what the compressor has left out of the ones before.

    With p = g + e, what is sent is C(p), and e = p - C(p) is kept (Seide et al. 2014; Karimireddy
    et al. 2019, algorithm 2, with the learning rate applied after the exchange). So all that was
    sent plus what is kept is the sum of all gradients, and a biased compressor converges.

    Args:
        compressor: a `Compressor`, its name or its config; not one that keeps its errors itself.

    Raises:
        ValueError: the compressor is none, or keeps its errors itself, as `DGC` does.

    >>> ErrorFeedback("topk").compressor.ratio
    0.01
    """

    compressor: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "compressor", compressors.get(self.compressor))
        if getattr(self.compressor, "keeps_errors", False):
            raise ValueError(
                f"{type(self.compressor).__name__} keeps its errors itself. Give it without "
                "ErrorFeedback."
            )

    @property
    def keeps_errors(self) -> bool:
        """Whether errors are kept: yes."""
        return True

    def init(self, shapes: Sequence[Shape]) -> State:
        """Begins with no errors."""
        import tensorflow as tf

        residual = {str(i): tf.zeros(shape) for i, shape in enumerate(shapes)}
        return _together(residual, self.compressor.init(shapes))

    def compress(
        self, gradients: Sequence[Any], state: State, channel: Channel
    ) -> tuple[Payload, State]:
        """Compresses gradients and errors together."""
        kept = state["residual"]
        whole = [gradient + kept[str(i)] for i, gradient in enumerate(gradients)]
        payload, inner = self.compressor.compress(whole, state.get("inner", {}), channel)
        return payload, _together({str(i): p for i, p in enumerate(whole)}, inner)

    def communicate(self, payload: Payload, state: State, channel: Channel) -> Exchanged:
        """Sends, and keeps what this rank's payload does not say."""
        done = self.compressor.communicate(payload, state.get("inner", {}), channel)
        sent = self.compressor.decompress(done.own)
        residual = {str(i): state["residual"][str(i)] - part for i, part in enumerate(sent)}
        return Exchanged(done.received, done.own, _together(residual, done.state))

    def decompress(self, payload: Payload) -> list[Any]:
        """As the compressor does."""
        return list(self.compressor.decompress(payload))


def _together(residual: State, inner: State) -> State:
    """The errors, and the compressor's own state if it has one."""
    return {"residual": residual, "inner": inner} if inner else {"residual": residual}
