"""Ranges moved from layer to layer, so that all channels of a value fill one grid alike.

A channel divided by s where it is made and multiplied by s where it is read leaves a network as it
is: what lies between (ReLU, sums, pooling, padding) hands factors on. So each channel may be given
the factor that suits rounding.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from tfaccel.core.checks import check_model
from tfaccel.core.cloning import clone_built
from tfaccel.core.graph import Graph, Node, map_models
from tfaccel.core.selection import Selector, select_layers
from tfaccel.quantization.moments import UNKNOWN, Moments, follow_moments, spread
from tfaccel.quantization.operators import activation_name, activation_of, is_relu, is_sum
from tfaccel.quantization.patches import to_matrices
from tfaccel.rewriting import fold_batch_norm
from tfaccel.rewriting.sampling import Batch, gather_batches, visit

Array = npt.NDArray[Any]

_ROUNDS = 20
_CONVERGED = 1e-3  # largest change of a logarithm
# A factor is no larger: rounding in float would tell otherwise.
_MOST = 2.0**10
_HOMOGENEOUS = ("linear", "relu", "leaky_relu")
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_KERNELS = (layers.Dense, layers.Conv1D, layers.Conv2D, *_DEPTHWISE)
# What hands each channel on, times a factor if it is given one.
_CHANNELWISE = (
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Dropout,
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D,
    layers.Identity,
    layers.MaxPooling1D,
    layers.MaxPooling2D,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.UpSampling1D,
    layers.UpSampling2D,
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
)


@dataclasses.dataclass(eq=False)
class ChannelGroup:
    """Values whose channels have one factor, as they are joined by sums and the like.

    Attributes:
        channels: how many there are.
        makers: layers whose outputs they are.
        readers: layers that they are inputs of.
        tensors: ids of the values.
        fixed: whether something else reads or makes them, so that they have to stay.
    """

    channels: int | None
    makers: list[Any] = dataclasses.field(default_factory=list)
    readers: list[Any] = dataclasses.field(default_factory=list)
    tensors: list[int] = dataclasses.field(default_factory=list)
    fixed: bool = False

    @property
    def free(self) -> bool:
        """Whether the group can be given factors."""
        return not self.fixed and bool(self.makers and self.readers)

    def absorb(self, other: "ChannelGroup") -> None:
        """Makes this the group of the other's values too."""
        self.fixed |= other.fixed or self.channels != other.channels
        self.makers += other.makers
        self.readers += other.readers
        self.tensors += other.tensors


def channel_groups(graph: Graph, touched: Callable[[Any], bool]) -> list[ChannelGroup]:
    """Returns the groups of channels of a graph that can be given factors.

    Args:
        graph: of a model without batch norm.
        touched: whether a layer's kernel may be changed.
    """
    group_of: dict[int, ChannelGroup] = {}
    for node in graph.nodes:
        for tensor in node.outputs:
            width = tensor.shape[-1] if tensor.shape else None
            group_of[id(tensor)] = ChannelGroup(width, tensors=[id(tensor)])

    def unite(first: Any, second: Any) -> None:
        one, two = group_of[id(first)], group_of[id(second)]
        if one is not two:
            one.absorb(two)
            group_of.update(dict.fromkeys(two.tensors, one))

    for node in graph.nodes:
        if _is_kernel(graph, node) and touched(node.layer):
            group_of[id(node.inputs[0])].readers.append(node.layer)
            group_of[id(node.outputs[0])].makers.append(node.layer)
            if activation_name(node.layer) not in _HOMOGENEOUS:
                group_of[id(node.outputs[0])].fixed = True
        elif _hands_factors_on(node):
            for tensor in node.inputs:
                unite(node.outputs[0], tensor)
        else:
            for tensor in (*node.inputs, *node.outputs):
                group_of[id(tensor)].fixed = True
    for tensor in (*graph.inputs, *graph.outputs):
        group_of[id(tensor)].fixed = True
    unique = {id(group): group for group in group_of.values()}
    return [group for group in unique.values() if group.free]


def _is_kernel(graph: Graph, node: Node) -> bool:
    layer: Any = node.layer
    return (
        type(layer) in _KERNELS
        and len(node.inputs) == 1
        and len(graph.calls(layer)) == 1
        and getattr(layer, "data_format", "channels_last") == "channels_last"
        and getattr(layer, "groups", 1) == 1
        and getattr(layer, "depth_multiplier", 1) == 1
    )


def _hands_factors_on(node: Node) -> bool:
    if activation_of(node) in _HOMOGENEOUS:
        return True
    if is_sum(node):
        shapes = {tensor.shape[1:] for tensor in node.inputs}
        adds = type(node.operation).__name__ in ("Add", "Subtract")
        leaves = keras.tree.flatten((node.args, node.kwargs))
        return adds and len(shapes) == 1 and len(leaves) == len(node.inputs)
    formats = getattr(node.layer, "data_format", "channels_last")
    return isinstance(node.layer, _CHANNELWISE) and formats == "channels_last"


def equalize(
    model: keras.Model,
    data: Any = None,
    *,
    replace_relu6: bool = False,
    absorb_bias: bool = True,
    include: Selector | None = None,
    exclude: Selector | None = None,
    samples: int = 64,
    seed: int = 0,
) -> keras.Model:
    """Returns a float model of the same function whose channels have ranges alike.

    Without data, the range of a channel is that of the weights that make it, and its factor is
    s = sqrt(r1 / r2) for r1, r2 the largest weights that make and that read it: both are then
    sqrt(r1 r2) (Nagel et al. 2019, eq. 11). This is repeated until no factor changes, over chains
    that go through depthwise convolutions, and over all layers that a sum joins. With data, s is
    the largest value of the channel, so that all channels of a value fill its grid.

    Made of ReLUs, the network computes what it did. ReLU6 clips at a value of its own in each
    channel, so no factor passes it; `replace_relu6` makes it a ReLU, which changes what was clipped
    and is worth a look at the accuracy. Behind a ReLU with mean - 3 standard deviations above zero,
    by what batch norm says, that much of the bias goes on to the layer behind (high-bias
    absorption, section 4.1.3), where no padding stands between.

    Rounding per output channel, as all schemes here do, needs this less than rounding per tensor.

    Args:
        model: a built Functional or Sequential model; not changed.
        data: samples as for `quantize`; None works on the weights alone.
        replace_relu6: whether ReLU6 is made a ReLU, so that ranges move across it too.
        absorb_bias: whether high biases go on to the layer behind.
        include: layers whose kernels may change (names, patterns, predicate); by default all.
        exclude: layers to leave alone.
        samples: of the data, at most so many.
        seed: of their choice.

    Returns:
        A plain model, its batch norm folded.

    Raises:
        TypeError: the model is subclassed, or the data are of another kind.
        ValueError: the model is not built, the data do not fit it, or a selector matches nothing.

    References:
        Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction.
    """
    check_model(model, "equalize")
    folded = fold_batch_norm(model)
    if replace_relu6:
        folded = map_models(folded, _without_clipping)
    batches = [] if data is None else gather_batches(folded, data, samples, seed, "equalize")
    equalized, factors = equalize_folded(folded, batches, include, exclude)
    if not absorb_bias:
        return equalized
    gets = follow_moments(model)[0]
    names = {c.layer.name for c in select_layers(folded, include, exclude) if c.chosen}

    def edit(graph: Graph) -> None:
        for node in list(graph.nodes):
            moments = gets.get(node.name, UNKNOWN)
            if moments.known and activation_of(node) == "relu":
                _absorb(graph, node, moments, factors, names)

    return map_models(equalized, edit)


def equalize_folded(
    model: keras.Model,
    batches: Sequence[Batch] = (),
    include: Selector | None = None,
    exclude: Selector | None = None,
) -> tuple[keras.Model, dict[str, Array]]:
    """Returns the equalized model, and by what the channels of each layer's input were divided.

    Args:
        model: without batch norm.
        batches: by whose ranges; none for those of the weights.
        include: layers whose kernels may change.
        exclude: layers to leave alone.
    """
    chosen = {c.layer.name for c in select_layers(model, include, exclude) if c.chosen}
    ranges = _channel_ranges(model, batches)
    divided: dict[str, Array] = {}

    def edit(graph: Graph) -> None:
        groups = channel_groups(graph, lambda layer: layer.name in chosen)
        if batches:
            factors = [_by_ranges(graph, group, ranges) for group in groups]
        else:
            factors = _by_weights(groups)
        for group, values in zip(groups, factors, strict=True):
            divided.update({layer.name: values for layer in group.readers})
        _apply(graph, groups, factors)

    return map_models(model, edit), divided


def _absorb(
    graph: Graph,
    relu: Node,
    moments: Moments,
    factors: Mapping[str, Array],
    names: Collection[str],
) -> None:
    """Lets the layers behind a ReLU carry what of the bias before it is hardly ever cut off."""
    maker = graph.producer(relu.inputs[0])
    readers = graph.consumers(relu.outputs[0])
    inside = len(graph.consumers(relu.inputs[0])) == 1 and not graph.is_output(relu.inputs[0])
    ends = graph.is_output(relu.outputs[0])
    if not inside or ends or not all(_carries(graph, node, names) for node in (maker, *readers)):
        return
    if activation_name(maker.layer) != "linear" or not all(map(_meets_values_only, readers)):
        return
    moments = moments.divided_by(factors.get(readers[0].name))
    excess = np.maximum(moments.mean - 3 * np.sqrt(moments.variance), 0.0)
    if not excess.any():
        return
    for node, sign in ((maker, -1), *((reader, 1) for reader in readers)):
        layer: Any = node.layer
        copy: Any = clone_built(layer)
        gain = excess
        if sign > 0:
            weight = to_matrices(layer, _kernel(layer))
            gain = np.matmul(spread(excess, weight), weight).ravel()
        copy.bias.assign(keras.ops.convert_to_numpy(copy.bias) + sign * gain)
        graph.replace_layer(layer, copy)


def _carries(graph: Graph, node: Node, names: Collection[str]) -> bool:
    layer: Any = node.layer
    return _is_kernel(graph, node) and layer.use_bias and layer.name in names


def _meets_values_only(node: Node) -> bool:
    """Whether no zeros of a padding come in: they did not lose what the values lost."""
    layer: Any = node.layer
    if isinstance(layer, layers.Dense) or layer.padding == "valid":
        return True
    return set(layer.kernel_size) == {1}


def _without_clipping(graph: Graph) -> None:
    """Makes each ReLU6 a ReLU: layers, activations built in, and functions."""
    for layer in graph.layers():
        if isinstance(layer, layers.ReLU) and layer.max_value is not None:
            config = {**layer.get_config(), "max_value": None}
            graph.replace_layer(layer, layers.ReLU.from_config(config))
        elif activation_name(layer) == "relu6":
            copy: Any = clone_built(layer)
            copy.activation = keras.activations.relu
            graph.replace_layer(layer, copy)
    for node in list(graph.nodes):
        if node.layer is None and activation_of(node) == "relu6":
            graph.replace_layer(node.operation, layers.ReLU(name=node.name))


def _channel_ranges(model: keras.Model, batches: Sequence[Batch]) -> dict[int, Array]:
    """Returns the largest absolute value of each channel of each output, by its operation's id."""
    ranges: dict[int, Array] = {}
    for batch in batches:
        for seen in visit(model, batch):
            key = id(seen.node.operation)
            values = keras.ops.convert_to_numpy(seen.outputs[0])
            found = np.abs(values.reshape(-1, values.shape[-1])).max(axis=0)
            ranges[key] = np.maximum(ranges[key], found) if key in ranges else found
    return ranges


def _by_ranges(graph: Graph, group: ChannelGroup, ranges: dict[int, Array]) -> Array:
    """Returns the largest value of each channel among those that are rounded."""
    members = set(group.tensors)
    found = []
    for node in graph.nodes:
        if id(node.outputs[0]) in members:
            readers = graph.consumers(node.outputs[0])
            within = len(readers) == 1 and is_relu(readers[0])  # computed in one with its ReLU
            if not within:
                found.append(ranges[id(node.operation)])
    return _bounded(np.max(found, axis=0))


def _by_weights(groups: list[ChannelGroup]) -> list[Array]:
    factors = [np.ones(group.channels or 0) for group in groups]
    kernels = {
        id(x): np.abs(_kernel(x)) for group in groups for x in (*group.makers, *group.readers)
    }
    for _ in range(_ROUNDS):
        change = 0.0
        for place, group in enumerate(groups):
            made = np.max([_by_output(x, kernels[id(x)]) for x in group.makers], axis=0)
            read = np.max([_by_input(x, kernels[id(x)]) for x in group.readers], axis=0)
            sound = (made > 0) & (read > 0)
            step = np.sqrt(np.where(sound, made, 1.0) / np.where(sound, read, 1.0))
            for layer in group.makers:
                kernels[id(layer)] = kernels[id(layer)] / _along_output(layer, step)
            for layer in group.readers:
                kernels[id(layer)] = kernels[id(layer)] * _along_input(layer, step)
            factors[place] = factors[place] * step
            change = max(change, float(np.abs(np.log(step)).max()))
        if change < _CONVERGED:
            break
    return [_bounded(values) for values in factors]


def _bounded(factors: Array) -> Array:
    """Keeps factors near their geometric mean; a channel that is always zero gets the mean."""
    alive = factors > 0
    middle = float(np.exp(np.mean(np.log(factors[alive])))) if alive.any() else 1.0
    return np.clip(np.where(alive, factors, middle), middle / _MOST, middle * _MOST)


def _apply(graph: Graph, groups: list[ChannelGroup], factors: list[Array]) -> None:
    new: dict[int, Any] = {}
    old: dict[int, Any] = {}
    for group, values in zip(groups, factors, strict=True):
        for layer in (*group.makers, *group.readers):
            if id(layer) not in new:
                old[id(layer)], new[id(layer)] = layer, clone_built(layer)
        for layer in group.makers:
            copy = new[id(layer)]
            copy.kernel.assign(_kernel(copy) / _along_output(layer, values))
            if layer.use_bias:
                copy.bias.assign(np.asarray(keras.ops.convert_to_numpy(copy.bias)) / values)
        for layer in group.readers:
            copy = new[id(layer)]
            copy.kernel.assign(_kernel(copy) * _along_input(layer, values))
    for key, layer in old.items():
        graph.replace_layer(layer, new[key])


def _kernel(layer: Any) -> Array:
    return np.asarray(keras.ops.convert_to_numpy(layer.kernel), np.float64)


def _along_output(layer: Any, values: Array) -> Array:
    return values[:, np.newaxis] if isinstance(layer, _DEPTHWISE) else values


def _along_input(layer: Any, values: Array) -> Array:  # noqa: ARG001
    return values[:, np.newaxis]


def _by_output(layer: Any, kernel: Array) -> Array:
    axis = -2 if isinstance(layer, _DEPTHWISE) else -1
    return np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1).max(axis=1)


def _by_input(layer: Any, kernel: Array) -> Array:  # noqa: ARG001
    return np.moveaxis(kernel, -2, 0).reshape(kernel.shape[-2], -1).max(axis=1)
