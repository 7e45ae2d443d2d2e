"""How ranges are found in training, by name: "ema", "lsq" or "pact"."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import keras

from tfaccel.core.checks import check_fraction
from tfaccel.core.configurable import Configurable
from tfaccel.core.registry import Registry
from tfaccel.quantization.fake_quantization import FakeQuantize, FakeQuantizeWeights
from tfaccel.quantization.learned_ranges import (
    LearnedClipping,
    LearnedStep,
    LearnedStepWeights,
    check_decay,
)


@runtime_checkable
class Ranges(Protocol):
    """A way to find ranges in training: makes what rounds, for weights and for activations."""

    def round_weights(
        self, axes: tuple[int, ...], bits: int, *, symmetric: bool, block: int | None
    ) -> FakeQuantizeWeights:
        """Returns a transform for one kernel."""

    def round_values(self, bits: int, **options: Any) -> FakeQuantize:
        """Returns a layer; `options` are keyword arguments of `FakeQuantize`."""


RANGES: Registry[Ranges] = Registry("way to find ranges", Ranges)  # type: ignore[type-abstract]


@RANGES.register("ema")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class MovingExtremes(Configurable):
    """Weights by their largest, activations by a moving average (Jacob et al. 2018, section 3.1).

    Attributes:
        momentum: share of the old range in the new one after each batch, in [0, 1).

    Raises:
        ValueError: `momentum` is out of range.
    """

    momentum: float = 0.99

    def __post_init__(self) -> None:
        check_fraction("momentum", self.momentum)

    def round_weights(
        self, axes: tuple[int, ...], bits: int, *, symmetric: bool, block: int | None
    ) -> FakeQuantizeWeights:
        """Returns a transform that follows the weights."""
        return FakeQuantizeWeights(axes, bits, symmetric, block)

    def round_values(self, bits: int, **options: Any) -> FakeQuantize:
        """Returns a layer that follows the extremes of its batches."""
        return FakeQuantize(bits, self.momentum, **options)


@RANGES.register("lsq")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class LSQ(MovingExtremes):
    """Steps of all weights and activations trained (Esser et al. 2020)."""

    def round_weights(
        self, axes: tuple[int, ...], bits: int, *, symmetric: bool, block: int | None
    ) -> FakeQuantizeWeights:
        """Returns a transform whose steps are trained."""
        return LearnedStepWeights(axes, bits, symmetric, block)

    def round_values(self, bits: int, **options: Any) -> FakeQuantize:
        """Returns a layer whose step is trained."""
        if options.get("fixed_range") is not None:
            return super().round_values(bits, **options)
        return LearnedStep(bits, **options)


@RANGES.register("pact")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class PACT(MovingExtremes):
    """Clipping values of ReLUs trained (Choi et al. 2018); all other ranges are as with "ema".

    Attributes:
        momentum: of the other ranges, see `MovingExtremes`.
        decay: of the clipping values, not below 0.

    Raises:
        ValueError: a number is out of range.
    """

    decay: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay(self.decay)

    def round_values(self, bits: int, **options: Any) -> FakeQuantize:
        """Returns a layer whose clipping value is trained where it stands behind a ReLU."""
        learnt = options.get("nonnegative") and options.get("fixed_range") is None
        if not learnt or options.get("symmetric"):
            return super().round_values(bits, **options)
        return LearnedClipping(bits, self.decay, **options)
