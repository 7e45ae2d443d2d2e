"""Ranges of activations found from data: what a value was seen to be, and the range to give it.

`observe` runs a model in float over the calibration data and keeps, for each value that will be
rounded, the extremes of each batch and a histogram. A calibrator makes a range of that.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.checks import check_fraction, check_number
from tfaccel.core.configurable import Configurable
from tfaccel.core.graph import flat_layers
from tfaccel.core.registry import Registry
from tfaccel.core.transforms import TransformedLayer
from tfaccel.quantization.fake_quantization import FakeQuantize
from tfaccel.rewriting.sampling import Batch, visit

Array = npt.NDArray[Any]
Range = tuple[float, float]

BINS = 2048
_SHARES = np.linspace(0.1, 1.0, 91)  # of the largest value: the thresholds that are tried
_ROUNDS = 2
_COUNTED = 2**18  # values of a batch that go into the histogram, evenly taken


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What was seen of one value between layers.

    Attributes:
        minima: [batches] the smallest of each batch.
        maxima: [batches] the largest of each batch.
        counts: [bins] how many, of an even sample, fell into each of equal bins from the smallest
            to the largest of all; empty where all were equal.
    """

    minima: Array
    maxima: Array
    counts: Array

    @property
    def low(self) -> float:
        """The smallest of all."""
        return float(self.minima.min())

    @property
    def high(self) -> float:
        """The largest of all."""
        return float(self.maxima.max())

    def edges(self) -> Array:
        """Returns the bounds of the bins, one more than there are bins."""
        return np.linspace(self.low, self.high, len(self.counts) + 1)

    def centers(self) -> Array:
        """Returns the middle of each bin."""
        edges = self.edges()
        return (edges[1:] + edges[:-1]) / 2


@runtime_checkable
class Calibrator(Protocol):
    """Makes a range of what was seen."""

    def range_of(self, statistics: Statistics, bits: int) -> Range:
        """Returns the (minimum, maximum) that the grid of 2^bits levels is to cover."""


CALIBRATORS: Registry[Calibrator] = Registry("calibrator", Calibrator)  # type: ignore[type-abstract]


@CALIBRATORS.register("minmax")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class MinMax(Configurable):
    """The extremes of all that was seen: nothing is clipped."""

    def range_of(self, statistics: Statistics, bits: int) -> Range:  # noqa: ARG002
        """Returns the smallest and the largest value."""
        return statistics.low, statistics.high


@CALIBRATORS.register("moving_average")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class MovingAverage(Configurable):
    """Exponential moving average of the extremes of each batch (Jacob et al. 2018, section 3.1).

    Attributes:
        momentum: share of the old range in the new one after each batch, in [0, 1).

    Raises:
        ValueError: `momentum` is out of range.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_fraction("momentum", self.momentum)

    def range_of(self, statistics: Statistics, bits: int) -> Range:  # noqa: ARG002
        """Returns the averages, begun with the first batch."""
        return self._average(statistics.minima), self._average(statistics.maxima)

    def _average(self, values: Array) -> float:
        mean = values[0]
        for value in values[1:]:
            mean = self.momentum * mean + (1 - self.momentum) * value
        return float(mean)


@CALIBRATORS.register("percentile")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class Percentile(Configurable):
    """Leaves out the outermost values on either side (Wu et al. 2020, section 3.3).

    Attributes:
        percentile: how many of 100 values lie below the maximum, and likewise above the minimum;
            in (50, 100].

    Raises:
        ValueError: `percentile` is out of range.
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        check_number("percentile", self.percentile)
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be in (50, 100], but got {self.percentile!r}.")

    def range_of(self, statistics: Statistics, bits: int) -> Range:  # noqa: ARG002
        """Returns the two quantiles, interpolated within their bins."""
        if not statistics.counts.size:
            return statistics.low, statistics.high
        shares = np.concatenate([[0.0], np.cumsum(statistics.counts) / statistics.counts.sum()])
        outside = 1 - self.percentile / 100
        low, high = np.interp([outside, 1 - outside], shares, statistics.edges())
        return float(low), float(high)


@CALIBRATORS.register("entropy")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class Entropy(Configurable):
    """The range whose grid keeps most of the distribution (Migacz 2017, TensorRT).

    Of the thresholds tried, the one that minimizes the Kullback-Leibler divergence KL(P || Q) of
    the values clipped to it, P, from the same with each level's mass spread evenly over what was
    seen in it, Q. Zeros are exact on every grid, and behind a ReLU there are so many that clipping
    the rest would seem to cost nothing: they count as much as what is next to them.
    """

    def range_of(self, statistics: Statistics, bits: int) -> Range:
        """Returns [-t, t] for the best threshold t, within what was seen."""
        if not statistics.counts.size:
            return statistics.low, statistics.high
        statistics = _without_peak_of_zeros(statistics)
        ranges = list(_thresholds(statistics))
        return min(ranges, key=lambda r: kl_divergence(statistics, r, bits))


@CALIBRATORS.register("mse")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class MeanSquaredError(Configurable):
    """The range whose rounding and clipping together cost the least squared error."""

    def range_of(self, statistics: Statistics, bits: int) -> Range:
        """Returns the best range found, one end searched for after the other."""
        if not statistics.counts.size:
            return statistics.low, statistics.high

        def error(candidate: Range) -> float:
            return squared_error(statistics, candidate, bits)

        best = min(_thresholds(statistics), key=error)
        for _ in range(_ROUNDS):
            best = min([(best[0], share * statistics.high) for share in _SHARES], key=error)
            best = min([(share * statistics.low, best[1]) for share in _SHARES], key=error)
        return best


def kl_divergence(statistics: Statistics, candidate: Range, bits: int) -> float:
    """Returns KL(P || Q) in nats of a histogram clipped to a range, and rounded to its grid."""
    low, high = _with_zero(candidate)
    counts, centers = statistics.counts.astype(np.float64), statistics.centers()
    inside = (centers >= low) & (centers <= high)
    if inside.sum() < 2:
        return np.inf
    clipped = counts[inside]
    clipped[0] += counts[centers < low].sum()
    clipped[-1] += counts[centers > high].sum()
    levels = 2**bits
    level = np.minimum(((centers[inside] - low) / (high - low) * levels).astype(int), levels - 1)
    # Q is made of what lies inside alone: the mass that is clipped is what a threshold costs.
    kept = counts[inside]
    mass = np.bincount(level, kept, minlength=levels)
    seen = np.bincount(level, kept > 0, minlength=levels)
    spread = np.where(kept > 0, (mass / np.maximum(seen, 1))[level], 0.0)
    p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1e-300)
    used = p > 0
    return float(np.sum(p[used] * np.log(p[used] / np.maximum(q[used], 1e-12))))


def squared_error(statistics: Statistics, candidate: Range, bits: int) -> float:
    """Returns the mean squared error that the grid of a range costs."""
    low, high = _with_zero(candidate)
    if high <= low:
        return np.inf
    centers = statistics.centers()
    scale = (high - low) / (2**bits - 1)
    zero_point = np.clip(np.round(-low / scale), 0, 2**bits - 1)
    rounded = np.clip(np.round(centers / scale) + zero_point, 0, 2**bits - 1) - zero_point
    counts = statistics.counts
    # Within a bin values are spread evenly, which rounding meets with step^2 / 12 at the least.
    return float(np.sum(counts * (rounded * scale - centers) ** 2) / counts.sum())


def _without_peak_of_zeros(statistics: Statistics) -> Statistics:
    """Returns the statistics with no more in the bin of zero than in the fuller one beside it."""
    counts = statistics.counts.copy()
    bins = len(counts)
    if not statistics.low <= 0 <= statistics.high:
        return statistics
    share = -statistics.low / (statistics.high - statistics.low)
    zero = min(int(share * bins), bins - 1)
    beside = [counts[place] for place in (zero - 1, zero + 1) if 0 <= place < bins]
    counts[zero] = min(counts[zero], max(beside, default=0))
    return dataclasses.replace(statistics, counts=counts)


def _thresholds(statistics: Statistics) -> Iterator[Range]:
    largest = max(abs(statistics.low), abs(statistics.high))
    for share in _SHARES:
        yield max(statistics.low, -share * largest), min(statistics.high, share * largest)


def _with_zero(candidate: Range) -> Range:
    return min(candidate[0], 0.0), max(candidate[1], 0.0)


# Looking at a model


class _Observer:
    """Runs a model in float and looks at what its `FakeQuantize` layers get."""

    def __init__(self, model: keras.Model, batches: Sequence[Batch]) -> None:
        self._model = model
        self._batches = batches
        self.extremes: dict[int, list[tuple[float, float]]] = {}
        self.counts: dict[int, Array] = {}

    def run(self) -> None:
        self._look(self._see_extremes)
        self._look(self._see_counts)

    def _look(self, see: Any) -> None:
        def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(operation, FakeQuantize):
                if operation.fixed_range is None:
                    see(operation, keras.ops.convert_to_numpy(keras.ops.cast(args[0], "float32")))
                return args[0]
            inner = operation.layer if isinstance(operation, TransformedLayer) else operation
            return inner(*args, **kwargs)

        for batch in self._batches:
            for _ in visit(self._model, batch, call):
                pass

    def _see_extremes(self, layer: FakeQuantize, values: Array) -> None:
        seen = float(values.min()), float(values.max())
        if not np.isfinite(seen).all():
            raise ValueError(
                f"What {layer.name!r} rounds is not finite on the calibration data. Look for a NaN "
                "or an infinity in the data, or for a layer that overflows."
            )
        self.extremes.setdefault(id(layer), []).append(seen)

    def _see_counts(self, layer: FakeQuantize, values: Array) -> None:
        low = min(low for low, _ in self.extremes[id(layer)])
        high = max(high for _, high in self.extremes[id(layer)])
        if high > low:
            # Counted by hand: several times as fast as numpy.histogram.
            some = values.ravel()[:: -(-values.size // _COUNTED)]
            factor = BINS / (high - low)
            index = np.minimum(((some - low) * factor).astype(np.int32), BINS - 1)
            counts = np.bincount(np.maximum(index, 0), minlength=BINS)
            self.counts[id(layer)] = self.counts.get(id(layer), 0) + counts


def observe(model: keras.Model, batches: Sequence[Batch]) -> dict[FakeQuantize, Statistics]:
    """Returns what each value that is rounded was in float, by the layer that is to round it.

    Args:
        model: a model with fake quantization; its own rounding is left out.
        batches: of its inputs, see `tfaccel.rewriting.sampling.gather_batches`.

    Raises:
        ValueError: a value is not finite.
    """
    observer = _Observer(model, batches)
    observer.run()
    statistics = {}
    for layer in _ranges_of(model):
        if id(layer) in observer.extremes:
            extremes = np.array(observer.extremes[id(layer)])
            counts = observer.counts.get(id(layer), np.zeros(0, np.int64))
            statistics[layer] = Statistics(extremes[:, 0], extremes[:, 1], counts)
    return statistics


def set_ranges(statistics: Mapping[FakeQuantize, Statistics], calibrator: Calibrator) -> None:
    """Sets the ranges of the layers that were observed, in place; each is made to contain zero."""
    for layer, seen in statistics.items():
        layer.set_range(*calibrator.range_of(seen, layer.bits))


def _ranges_of(model: keras.Model) -> Iterator[FakeQuantize]:
    for layer in flat_layers(model):
        if isinstance(layer, FakeQuantize) and layer.fixed_range is None:
            yield layer
