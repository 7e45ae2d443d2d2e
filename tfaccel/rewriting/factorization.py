"""Layers written as products of smaller ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfaccel.core.checks import check_in, check_model, check_positive
from tfaccel.core.graph import Graph, flat_layers, map_models
from tfaccel.core.selection import Selector, select_layers
from tfaccel.rewriting.calls import LayerCall, layer_calls, macs_of_calls
from tfaccel.rewriting.chains import why_not, wrapped_layers
from tfaccel.rewriting.factors import METHODS, Factorable, Geometry, Method, Moments
from tfaccel.rewriting.plans import LayerPlan, left_alone
from tfaccel.rewriting.ranks import (
    Frontier,
    Option,
    cheapest_keeping,
    frontier_of,
    options_of,
    share_budget,
)
from tfaccel.rewriting.sampling import Batch, PatchSampler, gather_batches, outputs_of, visit
from tfaccel.rewriting.targets import Cost, Target

KERNEL_METHODS = ("auto", "tucker", "spatial")
PATCHES = 8192  # of each layer's input, which moments are taken over

_SEARCH_STEPS = 10
_LEAST_LOST = 1e-4


def factorize(
    model: keras.Model,
    *,
    energy: float | None = None,
    macs: float | None = None,
    max_error: float | None = None,
    data: Any = None,
    metric: Cost | None = None,
    cost: Cost | None = None,
    method: str = "auto",
    multiple_of: int = 1,
    include: Selector | None = None,
    exclude: Selector | None = None,
    samples: int = 512,
    seed: int = 0,
) -> keras.Model:
    """Writes dense layers and convolutions as products of smaller ones, of low rank.

    A dense layer or a 1x1 convolution becomes two (truncated SVD: Eckart & Young 1936), a larger
    convolution either 1x1 -> smaller kernel -> 1x1 (Tucker-2: Kim et al. 2016) or k x 1 -> 1 x k
    (Jaderberg et al. 2014). The last of them has the name, bias and activation of the original; the
    result has plain Keras layers only. Fine-tune it with `fit`: most of what was lost comes back.

    Give exactly one of `energy`, `macs` and `max_error`, which say how far to go. A layer that no
    rank makes cheaper within it is left alone, as are grouped and depthwise convolutions and layers
    that a technique has wrapped; `plan_factorization` says which and why.

    Args:
        model: a built Functional or Sequential model; not changed.
        energy: share of each layer's squared norm to keep: each gets the cheapest ranks that do.
        macs: share of the model's MACs to come down to. Ranks go where they keep most, and the
            total is as close below as one more rank of any layer allows. Without `cost`, the MACs
            are those of all dense layers and convolutions; attention and recurrent layers, and
            layer classes of your own, do not count.
        max_error: how far the outputs may move; the cheapest model found by bisection over `energy`
            that stays within it. The error is |new - old| / |old| over all outputs on `data`, or
            by how much `metric` rises.
        data: samples [samples, ...], (x, y), for several inputs a list or dict of arrays, or a
            tf.data.Dataset of batches. With it each layer is decomposed such that its outputs on
            the data change least, and energy is that of its outputs (compare Zhang et al. 2015);
            without it, that of its weights.
        metric: with `max_error`: the error of a model, lower is better, such as 1 - its accuracy.
        cost: with `macs`: counts the MACs of a model, as
            `lambda model: tfaccel.measurement.count(model).macs` does.
        method: how k x k convolutions are written: "tucker", "spatial", or "auto", the cheaper.
        multiple_of: ranks are multiples of this, or full. 8 suits phones and CPUs.
        include: layers to factorize (names, patterns, predicate); by default all.
        exclude: layers to leave alone.
        samples: how many samples of `data` are used at most.
        seed: of the choice of samples.

    Returns:
        The rewritten model.

    Raises:
        TypeError: the model is subclassed, or the data are of another kind.
        ValueError: the model is not built, not exactly one target is given, an argument does not
            fit, a selector matches nothing, there is nothing to factorize, the sizes that MACs
            depend on are open, or `macs` is out of reach.

    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, name="top")])
    >>> small = factorize(model, macs=0.5)
    >>> [(layer.name, layer.units) for layer in small.layers]
    [('top_reduce', 10), ('top', 32)]
    """
    target = Target("factorize", energy, macs, max_error, metric, cost)
    target.check(data)
    given = _Given(method, multiple_of, include, exclude, data, samples, seed)
    return _Factorization(model, target, given).build()


def plan_factorization(
    model: keras.Model,
    *,
    energy: float | None = None,
    macs: float | None = None,
    max_error: float | None = None,
    data: Any = None,
    metric: Cost | None = None,
    cost: Cost | None = None,
    method: str = "auto",
    multiple_of: int = 1,
    include: Selector | None = None,
    exclude: Selector | None = None,
    samples: int = 512,
    seed: int = 0,
) -> list[LayerPlan]:
    """Returns what `factorize` would do with these arguments, layer by layer.

    Returns:
        A record for each layer with weights: method, ranks, parameters and MACs before and after,
        energy kept, and for a layer that is left alone why. Each prints as one line.

    Raises:
        TypeError: as `factorize`.
        ValueError: as `factorize`.
    """
    target = Target("plan_factorization", energy, macs, max_error, metric, cost)
    target.check(data)
    given = _Given(method, multiple_of, include, exclude, data, samples, seed)
    return _Factorization(model, target, given).rows()


@dataclasses.dataclass(frozen=True)
class _Given:
    """What the user gave beside the target."""

    method: str
    multiple_of: int
    include: Selector | None
    exclude: Selector | None
    data: Any
    samples: int
    seed: int


@dataclasses.dataclass(frozen=True)
class _Row:
    """A layer of the model: to be factorized, or with a reason why not."""

    layer: Any
    reason: str
    factorable: Factorable | None = None
    frontier: Frontier = dataclasses.field(default_factory=list)


class _Factorization:
    """A model, what its layers could become, and what they will."""

    def __init__(self, model: keras.Model, target: Target, given: _Given) -> None:
        check_model(model, target.verb)
        check_in("method", given.method, KERNEL_METHODS)
        check_positive("multiple_of", given.multiple_of)
        self._model, self._target, self._given = model, target, given
        self._batches: list[Batch] = []
        if given.data is not None:
            self._batches = gather_batches(
                model, given.data, given.samples, given.seed, target.verb
            )
        self._calls, self._batch = layer_calls(model)
        self._rows = self._find()
        self._choice = self._decide()

    # What there is

    def _find(self) -> list[_Row]:
        given, wrapped = self._given, wrapped_layers(self._model)
        reasons: dict[int, str] = {}
        methods: dict[int, list[Method]] = {}
        choices = select_layers(self._model, given.include, given.exclude)
        found = [choice for choice in choices if choice.layer.weights]
        for choice in found:
            layer = choice.layer
            reason = choice.reason if not choice.chosen else None
            reason = reason or why_not(layer, self._calls_of(layer), wrapped)
            fitting = [] if reason else _methods_for(layer, given.method)
            if not (reason or fitting):
                reason = f"no {given.method} form for a kernel of {tuple(layer.kernel.shape)}"
            reasons[id(layer)] = reason or ""
            methods[id(layer)] = fitting
        if not any(methods.values()):
            told = "; ".join(f"{c.layer.name}: {reasons[id(c.layer)]}" for c in found)
            raise ValueError(
                f"{self._target.verb}() found nothing to factorize in {self._model.name!r} "
                f"({told or 'no layer has weights'}). It takes Dense, Conv1D, Conv2D and Conv3D."
            )
        chosen = [c.layer for c in found if methods[id(c.layer)]]
        moments = self._moments(chosen, methods) if self._batches else {}
        rows = []
        for choice in found:
            layer = choice.layer
            ways = methods[id(layer)]
            if not ways:
                rows.append(_Row(layer, reasons[id(layer)]))
                continue
            geometry = Geometry.of(layer, self._calls_of(layer), self._batch)
            factorable = Factorable(layer, geometry, ways, moments.get(id(layer)))
            options = [
                option
                for way in ways
                for option in options_of(
                    way.name,
                    way.macs(geometry),
                    factorable.decompositions[way.name].energies(),
                    geometry.macs,
                    given.multiple_of,
                )
            ]
            rows.append(_Row(layer, "", factorable, frontier_of(options, geometry.macs)))
        return rows

    def _calls_of(self, layer: Any) -> list[LayerCall]:
        return [call for call in self._calls if call.layer is layer]

    def _moments(
        self, chosen: Sequence[Any], methods: dict[int, list[Method]]
    ) -> dict[int, Moments]:
        moments = {id(layer): Moments(layer, methods[id(layer)]) for layer in chosen}
        cutters = {id(layer): PatchSampler(layer, self._given.seed) for layer in chosen}
        share = {
            id(layer): max(1, PATCHES // (len(self._batches) * len(self._calls_of(layer))))
            for layer in chosen
        }
        for batch in self._batches:
            for call in visit(self._model, batch):
                key = id(call.node.operation)
                if key in moments:
                    moments[key].add(cutters[key].cut(call.inputs[0], share[key]))
        return moments

    # What to do

    def _decide(self) -> list[Option]:
        target = self._target
        if target.energy is not None:
            return self._keeping(target.energy)
        if target.macs is not None:
            return self._within(target.macs, target.cost)
        return self._search(float(target.max_error or 0.0), target.metric)

    @property
    def _frontiers(self) -> list[Frontier]:
        return [row.frontier for row in self._rows if row.factorable]

    def _keeping(self, energy: float) -> list[Option]:
        return [cheapest_keeping(frontier, energy) for frontier in self._frontiers]

    def _within(self, share: float, cost: Cost | None) -> list[Option]:
        geometries = [row.factorable.geometry for row in self._rows if row.factorable]
        total: float | None
        if cost is not None:
            total = cost(self._model)
        else:
            counted = macs_of_calls(self._calls)
            total = None if counted is None else counted // self._batch
        if total is None or not all(geometry.known for geometry in geometries):
            raise ValueError(
                f"{self._target.verb}(macs=...) needs to know how large the inputs of "
                f"{self._model.name!r} are. Make the model with fixed sizes, or use energy=."
            )
        others = total - sum(geometry.macs for geometry in geometries)
        least = others + sum(frontier[0].macs for frontier in self._frontiers)
        if least > share * total:
            raise ValueError(
                f"macs={share!r} is out of reach for {self._model.name!r}: at the lowest ranks "
                f"{least / total:.3f} of its MACs are left. Include more layers, or ask for less."
            )
        return share_budget(self._frontiers, share * total - others)

    def _search(self, bound: float, metric: Cost | None) -> list[Option]:
        error = (
            _metric_rise(self._model, metric)
            if metric
            else _output_change(self._model, self._batches)
        )
        best = [frontier[-1] for frontier in self._frontiers]
        tried: dict[tuple[Option, ...], bool] = {}
        low, high = np.log(_LEAST_LOST), 0.0  # logarithms of the energy that is lost
        trial = 0.0  # all that can be given up, first
        for _ in range(_SEARCH_STEPS):
            options = self._keeping(1.0 - float(np.exp(trial)))
            key = tuple(options)
            if key not in tried:
                tried[key] = error(self.build(options)) <= bound
            if tried[key]:
                low = trial
                best = min(best, options, key=_macs)
            else:
                high = trial
            if low == high:
                break
            trial = (low + high) / 2
        return best

    # What comes out

    def build(self, options: Sequence[Option] | None = None) -> keras.Model:
        """Makes the model, of other options than those decided on if some are given."""
        chosen = iter(self._choice if options is None else options)
        plan = {id(row.layer): (row, next(chosen)) for row in self._rows if row.factorable}
        taken = {layer.name for layer in flat_layers(self._model)}
        chains: dict[int, list[keras.layers.Layer]] = {}

        def edit(graph: Graph) -> None:
            for layer in graph.layers():
                row, option = plan.get(id(layer), (None, None))
                if row is None or option is None or option.method == "none":
                    continue
                if id(layer) not in chains:
                    shape = self._calls_of(layer)[0].inputs
                    chains[id(layer)] = row.factorable.chain(  # type: ignore[union-attr]
                        option.method, option.ranks, shape, taken
                    )
                graph.replace_by_chain(layer, chains[id(layer)])

        return map_models(self._model, edit)

    def rows(self) -> list[LayerPlan]:
        """Returns a record for each layer."""
        chosen = iter(self._choice)
        records = []
        for row in self._rows:
            if row.factorable is None:
                calls = self._calls_of(row.layer)
                records.append(left_alone(row.layer, calls, self._batch, row.reason))
                continue
            records.append(self._record(row.factorable, row.frontier, next(chosen)))
        return records

    def _record(self, factorable: Factorable, frontier: Frontier, option: Option) -> LayerPlan:
        layer, geometry = factorable.layer, factorable.geometry
        if option.method == "none":
            reason = self._target.why_not if len(frontier) > 1 else "no rank saves MACs"
            return left_alone(layer, self._calls_of(layer), self._batch, reason)
        weights = METHODS[option.method].macs(geometry.counting_weights())
        after = int(weights[tuple(rank - 1 for rank in option.ranks)])
        return LayerPlan(
            name=layer.name,
            class_name=type(layer).__name__,
            method=option.method,
            ranks=option.ranks,
            energy=option.energy,
            parameters_before=layer.count_params(),
            parameters_after=after + (geometry.filters if layer.use_bias else 0),
            macs_before=geometry.macs if geometry.known else None,
            macs_after=option.macs if geometry.known else None,
            reason="",
        )


def _methods_for(layer: Any, method: str) -> list[Method]:
    wanted = ("svd", "tucker", "spatial") if method == "auto" else ("svd", method)
    return [METHODS[name] for name in wanted if METHODS[name].takes(layer)]


def _macs(options: Sequence[Option]) -> int:
    return sum(option.macs for option in options)


def _metric_rise(model: keras.Model, metric: Cost) -> Cost:
    before = metric(model)
    return lambda rewritten: metric(rewritten) - before


def _output_change(model: keras.Model, batches: Sequence[Batch]) -> Cost:
    expected = [outputs_of(model, batch) for batch in batches]
    size = sum(float(np.sum(y**2)) for outputs in expected for y in outputs)

    def change(rewritten: keras.Model) -> float:
        moved = sum(
            float(np.sum((now - was) ** 2))
            for batch, outputs in zip(batches, expected, strict=True)
            for now, was in zip(outputs_of(rewritten, batch), outputs, strict=True)
        )
        return float(np.sqrt(moved / size)) if size else float(moved > 0)

    return change
