"""TFMOT's quantizers, and what each comes to in quantization-aware training here."""

import abc
import dataclasses
from typing import Any

import keras

from tfaccel.compat.handover import tfmot_quantization
from tfaccel.core.configurable import Configurable
from tfaccel.quantization.fake_quantization import FakeQuantize, never_empty


class Quantizer(abc.ABC):
    """How a tensor is rounded, as TFMOT's code says it.

    A quantizer here is a description: what rounds is made of it by `quantize_apply`. One of the
    user's, with a `__call__` of its own, cannot be exported as integers, so it is refused there.
    In a model of tf_keras, which TFMOT quantizes, each does what TFMOT's of the same name does.
    """

    def build(self, tensor_shape: Any, name: str, layer: Any) -> Any:
        """Makes the variables that TFMOT's quantizer needs, in a layer of tf_keras."""
        return self._theirs().build(tensor_shape, name, layer)

    def __call__(self, inputs: Any, training: Any, weights: Any, **kwargs: Any) -> Any:
        """Rounds as TFMOT's quantizer does, in a layer of tf_keras."""
        return self._theirs()(inputs, training, weights, **kwargs)

    def _theirs(self) -> Any:
        kind = getattr(tfmot_quantization().quantizers, type(self).__name__)
        return kind(**self.get_config())

    @abc.abstractmethod
    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Quantizer":
        """Returns the quantizer that `get_config` described."""
        return cls(**config)


@dataclasses.dataclass
class RangeQuantizer(Configurable, Quantizer):
    """Rounds to 2^num_bits levels of a range that is found.

    Attributes:
        num_bits: of a rounded value.
        per_axis: whether slices along the last axis have ranges of their own.
        symmetric: whether zero is the middle of the range.
        narrow_range: whether the lowest level is left out, so that zero can be the middle.
    """

    num_bits: int
    per_axis: bool
    symmetric: bool
    narrow_range: bool


@keras.saving.register_keras_serializable("tfaccel")
class LastValueQuantizer(RangeQuantizer):
    """The range of the values as they are: for weights, or of the last batch."""


@keras.saving.register_keras_serializable("tfaccel")
class MovingAverageQuantizer(RangeQuantizer):
    """A moving average of the extremes of the batches."""


@keras.saving.register_keras_serializable("tfaccel")
class AllValuesQuantizer(RangeQuantizer):
    """The extremes of all batches."""


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass
class FixedQuantizer(Configurable, Quantizer):
    """A range that is given.

    Attributes:
        num_bits: of a rounded value.
        init_min: the smallest value.
        init_max: the largest.
        narrow_range: whether the lowest level is left out.
    """

    num_bits: int
    init_min: float
    init_max: float
    narrow_range: bool


@keras.saving.register_keras_serializable("tfaccel")
class AllValuesFakeQuantize(FakeQuantize):
    """Rounds an activation to the grid of all that it has seen in training."""

    def _observe(self, values: Any) -> tuple[Any, Any]:
        ops = keras.ops
        moved = []
        for variable, now, pick in (
            (self._low, ops.min(values), ops.minimum),
            (self._high, ops.max(values), ops.maximum),
        ):
            before = ops.convert_to_tensor(variable)
            wider = pick(before, now)  # it begins at zero, which has to be in it
            held = ops.logical_or(ops.convert_to_tensor(self.held) > 0, ~ops.isfinite(now))
            moved.append(ops.where(held, before, wider))
        self._low.assign(moved[0])
        self._high.assign(moved[1])
        self.batches.assign_add(1)
        return never_empty(*moved)


def with_range(layer: FakeQuantize, quantizer: Quantizer) -> FakeQuantize | None:
    """Returns a layer of the same name that finds its range as a quantizer does; None for its own.

    Raises:
        ValueError: a fixed range does not contain zero.
    """
    config = layer.get_config()
    if isinstance(quantizer, FixedQuantizer):
        return FakeQuantize.from_config(
            {**config, "fixed_range": (float(quantizer.init_min), float(quantizer.init_max))}
        )
    if isinstance(quantizer, AllValuesQuantizer):
        return AllValuesFakeQuantize.from_config(config)
    if isinstance(quantizer, LastValueQuantizer):
        return FakeQuantize.from_config({**config, "momentum": 0.0})
    return None
