"""Bits for each layer under a budget, chosen by what the rounding of each costs at the outputs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.checks import check_in, check_model, check_number, check_positive
from tfaccel.core.graph import flat_layers
from tfaccel.core.selection import Selector
from tfaccel.core.stripping import bake_weights
from tfaccel.quantization.grids import round_to, weight_scales
from tfaccel.quantization.patches import AS_MATRICES, to_kernel, to_matrices
from tfaccel.quantization.placement import QUANTIZED
from tfaccel.quantization.schemes import INT8, LOW_BITS, Scheme
from tfaccel.quantization.training import plan
from tfaccel.rewriting import fold_batch_norm
from tfaccel.rewriting.sampling import Batch, gather_batches, outputs_of

Array = npt.NDArray[Any]
Cost = Callable[[keras.layers.Layer, int], float]

_STORED_IN_HALF_BYTES = 4  # a .tflite file knows 4 bits and 8
_MOST_CANDIDATES = 4096


@dataclasses.dataclass(frozen=True)
class LayerBits:
    """What was measured of one layer, and what it was given.

    Attributes:
        name: of the layer, as in the model with batch norm folded.
        weights: how many its kernel has.
        bits: what it was given.
        errors: for each number of bits, the squared error at the model's outputs with this kernel
            alone rounded to them, as a share of the outputs' variance.
        costs: for each number of bits, what they cost, in the unit of the budget.
    """

    name: str
    weights: int
    bits: int
    errors: Mapping[int, float]
    costs: Mapping[int, float]


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Bits for each layer; give it to `quantize` as a scheme.

    Attributes:
        layers: in the order in which they run.
        cost: of all kernels, in the unit of the budget.
        budget: what they might cost.
        predicted_error: the sum of the layers' errors, which takes them for independent.
        measured_error: with all kernels rounded at once, on the same samples.
    """

    layers: tuple[LayerBits, ...]
    cost: float
    budget: float
    predicted_error: float
    measured_error: float

    @property
    def bits(self) -> dict[str, int]:
        """The bits of each layer by name."""
        return {layer.name: layer.bits for layer in self.layers}

    @property
    def scheme(self) -> Scheme:
        """The scheme of all that has no bits of its own."""
        return INT8

    @property
    def per_layer(self) -> dict[str, Scheme]:
        """A scheme for each layer, as `quantize_aware(model, per_layer=...)` takes them."""
        return {
            name: Scheme(f"w{bits}a8", bits, 8, trainable=True) for name, bits in self.bits.items()
        }

    def __str__(self) -> str:
        """Returns a table: each layer's bits, and what each number of bits would have cost it."""
        if not self.layers:
            return "no layers"
        choices = sorted(self.layers[0].errors)
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        heads = "".join(f"{f'error, {bits} bits':>15}" for bits in choices)
        lines = [f"{'layer':{width}} {'weights':>9} {'bits':>5}{heads}"]
        for layer in self.layers:
            errors = "".join(f"{layer.errors[bits]:15.2e}" for bits in choices)
            lines.append(f"{layer.name:{width}} {layer.weights:9,} {layer.bits:5}{errors}")
        lines.append(
            f"cost {self.cost:,.6g} of {self.budget:,.6g}; error {self.measured_error:.2e} measured"
            f" with all, {self.predicted_error:.2e} by the sum"
        )
        return "\n".join(lines)


def allocate_bits(
    model: keras.Model,
    calibration_data: Any,
    budget: Mapping[str, float],
    *,
    choices: Sequence[int] = (4, 8),
    cost: str | Cost = "size",
    include: Selector | None = None,
    exclude: Selector | None = None,
    samples: int = 64,
    seed: int = 0,
    verbose: bool = False,
) -> Allocation:
    """Chooses the bits of each kernel, so that the outputs change least within a budget.

    The kernels are rounded one at a time, all else in float, and the error at the outputs is
    measured. Of all combinations within the budget the one whose errors add up to the least is
    taken. That they add up is an assumption: it holds as long as errors are small and do not work
    together, so the error of all at once is measured too and reported beside the sum. Activations
    have 8 bits in any case.

    Give the result to `quantize(model, data, scheme=allocation)`, or train with
    `quantize_aware(model, per_layer=allocation.per_layer)`; the same `exclude` belongs there.

    Args:
        model: a built Functional or Sequential model in float; not changed.
        calibration_data: samples as for `quantize`, never those that accuracy is measured on.
        budget: {"cost": number} in the unit of `cost`, or {"share": number in (0, 1]} of what all
            kernels cost with the most bits.
        choices: numbers of bits to choose from, 2 to 8. A .tflite file stores up to 4 in 4.
        cost: "size" (bytes of the kernels in the file), or a function of a layer and its bits, such
            as `tfaccel.export.layer_latencies` measures it (milliseconds). Where LiteRT has slow
            kernels for 4 bits, a budget of time leads to 8.
        include: layers to choose for (names, patterns, predicate); by default all that `quantize`
            rounds as dense layers and convolutions.
        exclude: layers to leave out.
        samples: of the calibration data, at most so many.
        seed: of the choice of samples.
        verbose: prints each layer that is measured.

    Raises:
        TypeError: the model is subclassed, or a number is none.
        ValueError: the model is not built, an argument does not fit, there is nothing to choose
            for, or no choice is within the budget.

    References:
        Wang et al. 2019, HAQ (bits for each layer under a budget); here by measured errors, as an
        exact choice of one of several for each layer.
    """
    check_model(model, "allocate_bits")
    wanted = _check_choices(choices)
    kind, amount = _check_budget(budget)
    costs_of = _stored_bytes if cost == "size" else cost
    if not callable(costs_of):
        raise TypeError(f"cost must be 'size' or a function of layer and bits, but got {cost!r}.")
    batches = gather_batches(model, calibration_data, samples, seed, "allocate_bits")
    folded = fold_batch_norm(bake_weights(model))
    layers = _kernel_layers(folded, include, exclude)
    costs = [{bits: float(costs_of(layer, bits)) for bits in wanted} for layer in layers]
    most = sum(table[max(wanted)] for table in costs)
    limit = amount * most if kind == "share" else amount
    least = sum(min(table.values()) for table in costs)
    if least > limit:
        raise ValueError(
            f"The budget is {limit:,.6g}, but the cheapest bits cost {least:,.6g} and "
            f"{max(wanted)} bits {most:,.6g}. Raise the budget, or exclude layers."
        )
    probe = _Probe(folded, batches)
    errors = []
    for layer in layers:
        errors.append({bits: probe.error_with({layer: bits}) for bits in wanted})
        if verbose:
            shown = ", ".join(f"{bits} bits {error:.2e}" for bits, error in errors[-1].items())
            print(f"{layer.name}: {shown}", flush=True)  # noqa: T201
    chosen = choose_within(costs, errors, limit)
    return Allocation(
        layers=tuple(
            LayerBits(layer.name, int(np.prod(layer.kernel.shape)), bits, error, table)
            for layer, bits, error, table in zip(layers, chosen, errors, costs, strict=True)
        ),
        cost=sum(table[bits] for table, bits in zip(costs, chosen, strict=True)),
        budget=limit,
        predicted_error=sum(table[bits] for table, bits in zip(errors, chosen, strict=True)),
        measured_error=probe.error_with(dict(zip(layers, chosen, strict=True))),
    )


def _check_choices(choices: Sequence[int]) -> list[int]:
    wanted = sorted(set(choices))
    if not wanted:
        raise ValueError("choices must name numbers of bits, but got none.")
    for bits in wanted:
        check_in("choices", bits, LOW_BITS)
    return wanted


def _check_budget(budget: Mapping[str, float]) -> tuple[str, float]:
    if not isinstance(budget, Mapping) or len(budget) != 1 or not {*budget} <= {"cost", "share"}:
        raise ValueError(f"budget must be {{'cost': x}} or {{'share': x}}, but got {budget!r}.")
    ((kind, amount),) = budget.items()
    check_number(f"budget[{kind!r}]", amount)
    check_positive(f"budget[{kind!r}]", amount)
    if kind == "share" and amount > 1:
        raise ValueError(f"budget['share'] must be in (0, 1], but got {amount!r}.")
    return kind, float(amount)


def _stored_bytes(layer: Any, bits: int) -> float:
    in_halves = bits <= _STORED_IN_HALF_BYTES
    return float(np.prod(layer.kernel.shape)) * (0.5 if in_halves else 1.0)


def _kernel_layers(
    folded: keras.Model, include: Selector | None, exclude: Selector | None
) -> list[Any]:
    rounded = {
        decision.name
        for decision in plan(folded, INT8, include=include, exclude=exclude)
        if decision.action == QUANTIZED
    }
    found = [x for x in flat_layers(folded) if type(x) in AS_MATRICES and x.name in rounded]
    if not found:
        raise ValueError(
            f"allocate_bits() found no kernel to choose bits for in {folded.name!r}: it looks at "
            "dense layers and convolutions that quantize() rounds "
            "(tfaccel.quantization.plan(model) says which)."
        )
    return found


class _Probe:
    """Measures what rounded kernels cost at the outputs of a model, which it owns."""

    def __init__(self, model: keras.Model, batches: Sequence[Batch]) -> None:
        self._model = model
        self._batches = batches
        self._expected = [outputs_of(model, batch) for batch in batches]
        columns = zip(*self._expected, strict=True)
        whole = [np.concatenate(parts) for parts in columns]
        self._variance = sum(float(((y - y.mean(axis=0)) ** 2).sum()) for y in whole)
        if not self._variance > 0:
            # A single sample, or outputs that are always the same.
            self._variance = sum(float((y**2).sum()) for y in whole) or 1.0

    def error_with(self, bits_of: Mapping[Any, int]) -> float:
        """Returns the squared error with some kernels rounded, as a share of the variance."""
        kept = {layer: keras.ops.convert_to_numpy(layer.kernel) for layer in bits_of}
        try:
            for layer, bits in bits_of.items():
                weight = to_matrices(layer, kept[layer])
                layer.kernel.assign(
                    to_kernel(layer, round_to(weight, weight_scales(weight, bits), bits))
                )
            error = sum(
                float(((ours - wanted) ** 2).sum())
                for batch, ends in zip(self._batches, self._expected, strict=True)
                for ours, wanted in zip(outputs_of(self._model, batch), ends, strict=True)
            )
        finally:
            for layer, kernel in kept.items():
                layer.kernel.assign(kernel)
        return error / self._variance


@dataclasses.dataclass(frozen=True)
class _Candidate:
    cost: float
    error: float
    bits: int = 0
    before: "_Candidate | None" = None


def choose_within(
    costs: Sequence[Mapping[int, float]], errors: Sequence[Mapping[int, float]], budget: float
) -> list[int]:
    """Returns one choice for each item: the least sum of errors within a budget of cost.

    From item to item only those sums are kept that no other beats in both cost and error, so that
    the result is exact up to 4,096 of these; beyond that, the best of each narrow band of costs
    goes on, and the result stays within the budget.

    Args:
        costs: of each choice, for each item.
        errors: likewise.
        budget: of all costs; the cheapest choices must be within it.
    """
    left = [min(table.values()) for table in costs]
    rest = np.append(np.cumsum(left[::-1])[::-1], 0.0)
    front = [_Candidate(0.0, 0.0)]
    for place, (prices, losses) in enumerate(zip(costs, errors, strict=True)):
        # Sums in another order may differ in the last digit.
        allowed = budget - rest[place + 1] + 1e-9 * abs(budget)
        grown = [
            _Candidate(before.cost + prices[bits], before.error + losses[bits], bits, before)
            for before in front
            for bits in prices
            if before.cost + prices[bits] <= allowed
        ]
        front = _thinned(_undominated(grown))
    best: _Candidate | None = min(front, key=lambda candidate: candidate.error)
    picks: list[int] = []
    while best is not None and best.before is not None:
        picks.append(best.bits)
        best = best.before
    return picks[::-1]


def _undominated(candidates: list[_Candidate]) -> list[_Candidate]:
    kept: list[_Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.cost, c.error)):
        if not kept or candidate.error < kept[-1].error:
            kept.append(candidate)
    return kept


def _thinned(front: list[_Candidate]) -> list[_Candidate]:
    if len(front) <= _MOST_CANDIDATES:
        return front
    first, width = front[0].cost, front[-1].cost - front[0].cost
    # The last of a band is its best, since errors fall as costs rise; the cheapest stays as well.
    bands = {int((c.cost - first) / width * (_MOST_CANDIDATES - 2)): c for c in front}
    return [front[0], *(c for c in bands.values() if c is not front[0])]
