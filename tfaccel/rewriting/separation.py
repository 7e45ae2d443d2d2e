"""Convolutions written as depthwise and pointwise ones, fitted to real activations."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from tfaccel.core.checks import check_model, check_positive
from tfaccel.core.graph import Graph, flat_layers, map_models
from tfaccel.core.selection import Choice, Selector, select_layers
from tfaccel.rewriting.calls import LayerCall, layer_calls
from tfaccel.rewriting.chains import ChainBuilder, why_not, wrapped_layers
from tfaccel.rewriting.factors import Geometry
from tfaccel.rewriting.least_squares import SeparableFit, split_channels
from tfaccel.rewriting.plans import LayerPlan, left_alone
from tfaccel.rewriting.sampling import Batch, PatchSampler, gather_batches, visit

Chains = dict[int, list[keras.layers.Layer]]


def separable(
    model: keras.Model,
    data: Any,
    *,
    depth_multiplier: int = 1,
    include: Selector | None = None,
    exclude: Selector | None = None,
    rounds: int = 5,
    samples: int = 512,
    positions: int = 8192,
    seed: int = 0,
) -> keras.Model:
    """Writes k x k convolutions as depthwise ones followed by 1x1 ones (Howard et al. 2017).

    Each pair begins as the nearest one to the kernel (a truncated SVD for each input channel) and
    is fitted to the outputs that the convolution has in the given model: by least squares for the
    1x1 kernel and the bias, then in turns for the depthwise and the 1x1 kernel. Layers are fitted
    in the order in which they run, each on what the pairs before it give, so that it makes up for
    their errors (the asymmetric reconstruction of Zhang et al. 2015, Accelerating Very Deep
    Convolutional Networks, section 3.3). The result has plain Keras layers only and is to be
    fine-tuned with `fit`: a separable convolution has far fewer weights than the one it replaces.

    The 1x1 convolution has the name, bias and activation of the original. Left alone are the first
    convolution, unless it is included by name, and what `plan_separable` gives a reason for.

    Args:
        model: a built Functional or Sequential model; not changed.
        data: samples [samples, ...], (x, y), for several inputs a list or dict of arrays, or a
            tf.data.Dataset of batches.
        depth_multiplier: depthwise outputs for each input channel; more are nearer and dearer.
        include: layers to rewrite (names, patterns, predicate); by default all k x k Conv2D.
        exclude: layers to leave alone.
        rounds: how often the depthwise kernel is solved for at most.
        samples: how many samples of `data` are used at most.
        positions: output positions of each layer, of all samples, to fit on at most. More than
            height * width * input channels of the largest kernel is good. Memory is for the square
            of that number, whatever the data.
        seed: of the choice of samples and positions.

    Returns:
        The rewritten model.

    Raises:
        TypeError: the model is subclassed, or the data are of another kind.
        ValueError: the model is not built, an argument does not fit, a selector matches nothing, or
            there is nothing to rewrite.
    """
    work = _Separation(model, "separable", depth_multiplier, include, exclude)
    check_positive("positions", positions)
    if rounds < 0:
        raise ValueError(f"rounds must be 0 or more, but got {rounds!r}.")
    batches = gather_batches(model, data, samples, seed, "separable")
    chains: Chains = {}
    taken = {layer.name for layer in flat_layers(model)}
    for layer in work.chosen:
        fit = _gather(model, layer, batches, chains, work.calls_of(layer), positions, seed)
        chains[id(layer)] = _fitted(
            layer, fit, depth_multiplier, rounds, work.calls_of(layer)[0].inputs, taken
        )

    def edit(graph: Graph) -> None:
        for layer in graph.layers():
            if id(layer) in chains:
                graph.replace_by_chain(layer, chains[id(layer)])

    return map_models(model, edit)


def plan_separable(
    model: keras.Model,
    *,
    depth_multiplier: int = 1,
    include: Selector | None = None,
    exclude: Selector | None = None,
) -> list[LayerPlan]:
    """Returns what `separable` would do with these arguments, layer by layer.

    Returns:
        A record for each layer with weights. The energy is what the nearest separable kernel keeps
        of the weights, before anything is fitted.

    Raises:
        TypeError: the model is subclassed.
        ValueError: as `separable`.
    """
    return _Separation(model, "plan_separable", depth_multiplier, include, exclude).rows()


@dataclasses.dataclass(frozen=True)
class _Cost:
    before: int
    after: int

    @classmethod
    def of(cls, geometry: Geometry, multiplier: int) -> "_Cost":
        """Returns the MACs of a convolution, and of the pair that replaces it."""
        after = geometry.channels * multiplier * (geometry.taps + geometry.filters)
        return cls(geometry.macs, geometry.places_out * after)


class _Separation:
    """A model, and which of its layers are rewritten."""

    def __init__(
        self,
        model: keras.Model,
        verb: str,
        multiplier: int,
        include: Selector | None,
        exclude: Selector | None,
    ) -> None:
        check_model(model, verb)
        check_positive("depth_multiplier", multiplier)
        self._calls, self._batch = layer_calls(model)
        self._multiplier = multiplier
        wrapped = wrapped_layers(model)
        self._found: list[tuple[Any, str | None]] = []
        first = True
        for choice in select_layers(model, include, exclude):
            leading = first and isinstance(choice.layer, layers.Conv2D)
            first = first and not leading
            if choice.layer.weights:
                self._found.append((choice.layer, self._why_not(choice, wrapped, leading)))
        if not self.chosen:
            told = "; ".join(f"{layer.name}: {reason}" for layer, reason in self._found)
            raise ValueError(
                f"{verb}() found nothing to rewrite in {model.name!r} "
                f"({told or 'no layer has weights'}). It takes k x k Conv2D."
            )

    @property
    def chosen(self) -> list[Any]:
        """The layers to rewrite, in the order in which they first run."""
        wanted = {id(layer) for layer, reason in self._found if reason is None}
        ordered = {id(call.layer): call.layer for call in self._calls if id(call.layer) in wanted}
        return list(ordered.values())

    def calls_of(self, layer: Any) -> list[LayerCall]:
        """Returns the calls of a layer."""
        return [call for call in self._calls if call.layer is layer]

    def rows(self) -> list[LayerPlan]:
        """Returns a record for each layer."""
        return [
            self._record(layer)
            if reason is None
            else left_alone(layer, self.calls_of(layer), self._batch, reason)
            for layer, reason in self._found
        ]

    def _geometry(self, layer: Any) -> Geometry:
        return Geometry.of(layer, self.calls_of(layer), self._batch)

    def _why_not(self, choice: Choice, wrapped: set[int], leading: bool) -> str | None:
        layer: Any = choice.layer
        if not choice.chosen:
            return choice.reason
        reason = why_not(layer, self.calls_of(layer), wrapped)
        if reason is not None:
            return reason
        if type(layer) is not layers.Conv2D or max(layer.kernel_size) == 1:
            return "no k x k Conv2D"
        if layer.strides[0] != layer.strides[1]:
            return "strides differ, which a depthwise convolution does not take"
        if leading and choice.reason != "included":
            return "first convolution: few channels, all else rests on them"
        cost = _Cost.of(self._geometry(layer), self._multiplier)
        return None if cost.after < cost.before else "the separable form saves no MACs"

    def _record(self, layer: Any) -> LayerPlan:
        geometry = self._geometry(layer)
        cost = _Cost.of(geometry, self._multiplier)
        weights = _Cost.of(geometry.counting_weights(), self._multiplier).after
        kernel = _kernel(layer)
        _, pointwise = split_channels(kernel, self._multiplier)
        power = float(np.sum(kernel**2))
        return LayerPlan(
            name=layer.name,
            class_name=type(layer).__name__,
            method="separable",
            ranks=(self._multiplier,),
            energy=float(np.sum(pointwise**2)) / power if power else 1.0,
            parameters_before=layer.count_params(),
            parameters_after=weights + (geometry.filters if layer.use_bias else 0),
            macs_before=cost.before if geometry.known else None,
            macs_after=cost.after if geometry.known else None,
            reason="",
        )


def _kernel(layer: Any) -> Any:
    kernel = np.asarray(keras.ops.convert_to_numpy(layer.kernel), np.float64)
    return kernel.reshape(-1, *kernel.shape[-2:])


def _gather(
    model: keras.Model,
    layer: Any,
    batches: Sequence[Batch],
    chains: Mapping[int, Sequence[keras.layers.Layer]],
    calls: Sequence[LayerCall],
    positions: int,
    seed: int,
) -> SeparableFit:
    """Returns the least-squares problem of a layer.

    What it should give is read off the model as it is; what it reads, off the model in which the
    layers before it are replaced by `chains`.
    """

    def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
        chain = chains.get(id(operation))
        if chain is None:
            return operation(*args, **kwargs)
        value = keras.tree.flatten((args, kwargs))[0]
        for part in chain:
            value = part(value)
        return value

    kernel = _kernel(layer)
    fit = SeparableFit(kernel, layer.use_bias)
    share = max(1, positions // (len(batches) * len(calls)))
    samplers = PatchSampler(layer, seed), PatchSampler(layer, seed)
    for batch in batches:
        left = len(calls)
        for true, now in zip(visit(model, batch), visit(model, batch, call), strict=True):
            if true.node.operation is not layer:
                continue
            wanted = samplers[0].cut(true.inputs[0], share)
            given = samplers[1].cut(now.inputs[0], share)
            targets = np.tensordot(wanted, kernel, axes=((1, 2), (0, 1)))
            if layer.use_bias:
                targets += np.asarray(keras.ops.convert_to_numpy(layer.bias), np.float64)
            fit.add(given, targets)
            left -= 1
            if not left:
                break
    return fit


def _fitted(
    layer: Any,
    fit: SeparableFit,
    multiplier: int,
    rounds: int,
    input_shape: tuple[int | None, ...],
    taken: set[str],
) -> list[keras.layers.Layer]:
    start = split_channels(_kernel(layer), multiplier)
    depthwise, pointwise, bias, _ = fit.solve(*start, rounds)
    builder = ChainBuilder(layer, input_shape, taken)
    builder.add_depthwise(depthwise.reshape(*layer.kernel_size, *depthwise.shape[1:]))
    filters = pointwise.shape[-1]
    builder.end(
        pointwise.reshape(1, 1, -1, filters),
        bias if layer.use_bias else None,
        kernel_size=1,
        strides=1,
        dilation_rate=1,
        padding="valid",
    )
    return builder.chain
