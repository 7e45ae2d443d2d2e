"""Where quantization hurts: signal and noise of every layer, and the ranges of every value."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.checks import check_model, check_positive
from tfaccel.core.graph import flat_layers
from tfaccel.core.stripping import bake_weights
from tfaccel.core.transforms import TransformedLayer
from tfaccel.core.walking import walk
from tfaccel.quantization.equivalents import rewritten
from tfaccel.quantization.fake_quantization import FakeQuantize, FakeQuantizeWeights
from tfaccel.quantization.training import is_quantization_aware
from tfaccel.rewriting import fold_batch_norm
from tfaccel.rewriting.sampling import Batch, gather_batches

Array = npt.NDArray[Any]

KERNEL, VALUE = "kernel", "value"
_SUFFIX = "_quantize"


@dataclasses.dataclass(frozen=True)
class LayerNoise:
    """What rounding does to one kernel, or to one value between layers.

    Attributes:
        name: of the layer with the kernel, or of the last layer of the operator that gives the
            value.
        kind: "kernel" or "value".
        bits: that it is rounded to.
        own_snr_db: signal to noise in decibels, 10 log10(sum x^2 / sum (x - q)^2), where all that
            comes before is float: what this operator adds. For a kernel at the layer's output,
            before activation and rounding.
        snr_db: likewise with all that comes before rounded too: what has come together so far.
        low: the smallest that was seen in float; of the kernel, its smallest weight.
        high: the largest.
        grid_low: the smallest that the grid has; of a kernel with many grids, of the widest.
        grid_high: the largest.
        clipped: share of what was seen in float that lies beyond the grid.
    """

    name: str
    kind: str
    bits: int
    own_snr_db: float
    snr_db: float
    low: float
    high: float
    grid_low: float
    grid_high: float
    clipped: float


@dataclasses.dataclass(frozen=True)
class DebugReport:
    """Signal and noise of a quantized model, layer by layer.

    Attributes:
        model: its name.
        layers: kernels and values in the order in which they are computed.
        output_snr_db: signal to noise at the model's outputs.
        samples: how many were looked at.
    """

    model: str
    layers: tuple[LayerNoise, ...]
    output_snr_db: float
    samples: int

    def worst(self, count: int = 5) -> list[LayerNoise]:
        """Returns the layers that hurt: those that add most noise to their signal, worst first."""
        return sorted(self.layers, key=lambda layer: layer.own_snr_db)[:count]

    def to_text(self, before: "DebugReport | None" = None) -> str:
        """Returns a table of all layers, those that hurt most marked by stars.

        Args:
            before: the report of another quantization of the same model, shown beside.
        """
        rows = {(layer.name, layer.kind): layer for layer in before.layers} if before else {}
        width = max([len("layer"), *(len(layer.name) for layer in self.layers)])
        was = f"{'own before':>12}{'before':>9}" if before else ""
        lines = [
            f"{'':5} {'layer':{width}} {'':6} {'bits':>4}{'own [dB]':>10}{'all [dB]':>10}{was}"
            f"{'seen':>24}{'grid':>24}{'clipped':>9}"
        ]
        worst = self.worst()
        for layer in self.layers:
            stars = "*" * (len(worst) - worst.index(layer)) if layer in worst else ""
            old = rows.get((layer.name, layer.kind))
            then = f"{old.own_snr_db:12.1f}{old.snr_db:9.1f}" if old else " " * len(was)
            seen, grid = (
                f"{low:.4g} to {high:.4g}"
                for low, high in ((layer.low, layer.high), (layer.grid_low, layer.grid_high))
            )
            lines.append(
                f"{stars:5} {layer.name:{width}} {layer.kind:6} {layer.bits:4}"
                f"{layer.own_snr_db:10.1f}{layer.snr_db:10.1f}{then}{seen:>24}{grid:>24}"
                f"{layer.clipped:9.2%}"
            )
        end = f"outputs of {self.model}: {self.output_snr_db:.1f} dB"
        lines.append(end + (f", before {before.output_snr_db:.1f} dB" if before else ""))
        return "\n".join(lines)

    def __str__(self) -> str:
        """Returns the table."""
        return self.to_text()


def debug(
    quantized: keras.Model,
    data: Any,
    reference: keras.Model | None = None,
    *,
    samples: int = 64,
    seed: int = 0,
) -> DebugReport:
    """Says of each kernel and value of a quantized model what its rounding costs.

    Model and reference run side by side. Two numbers tell what an operator adds by itself, and what
    has come together up to it, so that a layer that hurts is told from one that is handed noise.

    Args:
        quantized: what `quantize` or `quantize_aware` made, with known ranges; not changed.
        data: samples as for `quantize`.
        reference: the float model that `quantize` was given (the equalized one, if it was
            equalized). None takes the model itself without its rounding, which is right behind
            `quantize_aware`, where the unrounded weights are still there.
        samples: of the data, at most so many.
        seed: of their choice.

    Raises:
        TypeError: a model is subclassed.
        ValueError: the model is not quantized, a range is not known, or the reference is none of
            this model.
    """
    check_model(quantized, "debug")
    check_positive("samples", samples)
    if not is_quantization_aware(quantized):
        raise ValueError(
            f"debug() needs a quantized model, but {quantized.name!r} is not. Give what "
            "tfaccel.quantization.quantize or quantize_aware made, and the float model as "
            "reference=."
        )
    for layer in flat_layers(quantized):
        if isinstance(layer, FakeQuantize):
            layer.frozen()  # raises if its range is not known
    floats = {} if reference is None else _float_layers(quantized, reference)
    batches = gather_batches(quantized, data, samples, seed, "debug")
    return _SideBySide(quantized, floats).run(batches)


def _float_layers(quantized: keras.Model, reference: keras.Model) -> dict[str, Any]:
    """Returns the float layer of each that is rounded, with batch norm as the model has it."""
    check_model(reference, "debug")
    plain = bake_weights(reference)
    names = {layer.name for layer in flat_layers(quantized)}
    norms = [x for x in flat_layers(plain) if isinstance(x, keras.layers.BatchNormalization)]
    if any(norm.name not in names for norm in norms):
        plain = fold_batch_norm(plain)
    # A layer may stand in the quantized model as the parts that it is written as, or as it is.
    candidates = [{x.name: x for x in flat_layers(m)} for m in (plain, rewritten(plain))]
    twins: dict[str, Any] = {}
    for layer in flat_layers(quantized):
        if not isinstance(layer, TransformedLayer):
            continue
        found = [known[layer.name] for known in candidates if layer.name in known]
        alike = [x for x in found if _shapes(x) == _shapes(layer.layer)]
        if not alike:
            raise ValueError(
                f"The reference {reference.name!r} has no layer like {layer.name!r} of the "
                "quantized model. Give the float model that quantize() was given."
            )
        twins[layer.name] = alike[-1]
    return twins


def _shapes(layer: keras.layers.Layer) -> list[tuple[int | None, ...]]:
    return [tuple(weight.shape) for weight in layer.weights]


@dataclasses.dataclass(frozen=True, eq=False)
class _Three:
    """One value: in float, rounded all the way, and with the rounding of this operator alone."""

    floats: Any
    rounded: Any
    own: Any


@dataclasses.dataclass
class _Sums:
    name: str
    kind: str
    bits: int
    grid: tuple[float, float]
    signal: float = 0.0
    own_noise: float = 0.0
    noise: float = 0.0
    low: float = np.inf
    high: float = -np.inf
    beyond: float = 0.0
    count: int = 0

    def add(self, values: _Three) -> None:
        """Counts a batch."""
        floats, rounded, own = (
            np.asarray(keras.ops.convert_to_numpy(x), np.float64)
            for x in (values.floats, values.rounded, values.own)
        )
        self.signal += float((floats**2).sum())
        self.noise += float(((rounded - floats) ** 2).sum())
        self.own_noise += float(((own - floats) ** 2).sum())
        if self.kind == VALUE:
            self.see(floats)

    def see(self, values: Array) -> None:
        """Looks at the range of values."""
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))
        low, high = self.grid
        slack = 1e-6 * (high - low)  # the ends themselves are on the grid
        self.beyond += float(((values < low - slack) | (values > high + slack)).sum())
        self.count += values.size

    def to_record(self) -> LayerNoise:
        return LayerNoise(
            self.name,
            self.kind,
            self.bits,
            own_snr_db=decibels(self.signal, self.own_noise),
            snr_db=decibels(self.signal, self.noise),
            low=self.low,
            high=self.high,
            grid_low=self.grid[0],
            grid_high=self.grid[1],
            clipped=self.beyond / max(self.count, 1),
        )


def decibels(signal: float, noise: float) -> float:
    """Returns 10 log10(signal / noise); infinity without noise.

    >>> decibels(100.0, 1.0)
    20.0
    """
    if noise <= 0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal > 0 else -float("inf")


class _SideBySide:
    def __init__(self, model: keras.Model, floats: Mapping[str, Any]) -> None:
        self._model = model
        self._floats = floats
        self._sums: dict[int, _Sums] = {}

    def run(self, batches: Sequence[Batch]) -> DebugReport:
        signal = noise = 0.0
        for batch in batches:
            inputs = [
                keras.ops.convert_to_tensor(array, spec.dtype)
                for array, spec in zip(batch, self._model.inputs, strict=True)
            ]
            for end in self._outputs([_Three(x, x, x) for x in inputs]):
                floats, rounded = (
                    np.asarray(keras.ops.convert_to_numpy(x), np.float64)
                    for x in (end.floats, end.rounded)
                )
                signal += float((floats**2).sum())
                noise += float(((rounded - floats) ** 2).sum())
        return DebugReport(
            self._model.name,
            tuple(sums.to_record() for sums in self._sums.values()),
            decibels(signal, noise),
            sum(len(batch[0]) for batch in batches),
        )

    def _outputs(self, inputs: list[_Three]) -> list[_Three]:
        ends: list[_Three] = []

        def steps() -> Any:
            ends.extend((yield from walk(self._model, inputs, self._call)))

        for _ in steps():
            pass
        return ends

    def _call(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(operation, FakeQuantize):
            (value,) = args
            rounded = _Three(value.floats, operation(value.rounded), operation(value.own))
            self._sums_of(operation).add(rounded)
            # What reads it starts from float again.
            return _Three(value.floats, rounded.rounded, value.floats)
        float_layer = operation
        if isinstance(operation, TransformedLayer):
            float_layer = self._floats.get(operation.name, operation.layer)
        outputs = [
            keras.tree.flatten(self._with(layer, args, kwargs, which))
            for layer, which in (
                (float_layer, "floats"),
                (operation, "rounded"),
                (operation, "own"),
            )
        ]
        values = [_Three(*parts) for parts in zip(*outputs, strict=True)]
        if isinstance(operation, TransformedLayer) and _rounding_of(operation) is not None:
            self._sums_of(operation).add(values[0])
        return values

    @staticmethod
    def _with(operation: Any, args: Any, kwargs: Any, which: str) -> Any:
        def pick(leaf: Any) -> Any:
            return getattr(leaf, which) if isinstance(leaf, _Three) else leaf

        given, named = keras.tree.map_structure(pick, (args, kwargs))
        return operation(*given, **named)

    def _sums_of(self, layer: Any) -> _Sums:
        if id(layer) not in self._sums:
            self._sums[id(layer)] = (
                self._of_value(layer) if isinstance(layer, FakeQuantize) else self._of_kernel(layer)
            )
        return self._sums[id(layer)]

    @staticmethod
    def _of_value(layer: FakeQuantize) -> _Sums:
        fixed = layer.frozen().fixed_range
        low, high = fixed if fixed is not None else (0.0, 0.0)
        return _Sums(layer.name.removesuffix(_SUFFIX), VALUE, layer.bits, (low, high))

    def _of_kernel(self, layer: TransformedLayer) -> _Sums:
        transform: Any = _rounding_of(layer)
        float_layer: Any = self._floats.get(layer.name, layer.layer)
        kernel = keras.ops.convert_to_numpy(float_layer.kernel)
        rounded = keras.ops.convert_to_numpy(layer.transformed(training=False)[0][1])
        sums = _Sums(layer.name, KERNEL, transform.bits, (rounded.min(), rounded.max()))
        sums.see(kernel)
        return sums


def _rounding_of(layer: TransformedLayer) -> FakeQuantizeWeights | None:
    found = [t for key, t in layer.transforms if isinstance(t, FakeQuantizeWeights)]
    return found[0] if found else None
