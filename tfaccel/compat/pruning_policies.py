"""Which layers of a model TFMOT's policies let be pruned."""

import abc
from collections.abc import Callable, Iterable
from typing import Any

import keras
from keras import layers

from tfaccel.core.checks import check_model
from tfaccel.core.graph import Graph, Node
from tfaccel.core.transforms import TransformedLayer


class PruningPolicy(abc.ABC):
    """Base class: says which layers are pruned, and whether a model fits at all."""

    @abc.abstractmethod
    def allow_pruning(self, layer: keras.layers.Layer) -> bool:
        """Returns whether the layer is pruned."""

    @abc.abstractmethod
    def ensure_model_supports_pruning(self, model: keras.Model) -> None:
        """Raises ValueError if the model does not fit the policy."""


class PruneForLatencyOnXNNPack(PruningPolicy):
    """Prunes 1x1 convolutions only, in models that XNNPACK can run with its sparse kernels.

    These take float models on ARM, between a 3x3 convolution of stride 2 on three channels and
    global average pooling (Elsen et al. 2020, Fast Sparse ConvNets). On x86 with AVX, XNNPACK does
    not use them: there is nothing to gain there.
    """

    def allow_pruning(self, layer: keras.layers.Layer) -> bool:
        """Returns whether the layer is a convolution with a 1x1 kernel."""
        return isinstance(layer, layers.Conv2D) and tuple(layer.kernel_size) == (1, 1)

    def ensure_model_supports_pruning(self, model: keras.Model) -> None:
        """Raises ValueError unless all between first convolution and pooling is supported."""
        try:
            check_model(model, "PruneForLatencyOnXNNPack")
        except TypeError as error:
            raise ValueError(str(error)) from error
        graph = Graph.read(model)

        def after(node: Node) -> list[Node]:
            return _unique(c for tensor in node.outputs for c in graph.consumers(tensor))

        def before(node: Node) -> list[Node]:
            return _unique(graph.producer(tensor) for tensor in node.inputs)

        entries = _unique(graph.producer(tensor) for tensor in graph.inputs)
        starts = _first(entries, lambda node: _is_start(node, before(node)), after)
        if starts is None:
            raise ValueError(
                "PruneForLatencyOnXNNPack found an input of the model without a Conv2D of kernel "
                "3x3, stride 2, 3 input channels and padding 'valid' behind ZeroPadding2D(1), "
                "where sparse inference begins. Prune without the policy, or change the stem."
            )
        exits = _unique(graph.producer(tensor) for tensor in graph.outputs)
        ends = _first(exits, lambda node: isinstance(_layer(node), _POOLING), before)
        if ends is None:
            raise ValueError(
                "PruneForLatencyOnXNNPack found an output of the model without a "
                "GlobalAveragePooling2D before it, where sparse inference ends. Prune without the "
                "policy, or change the head."
            )
        waiting = [node for start in starts for node in after(start)]
        seen: set[int] = set()
        while waiting:
            node = waiting.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            is_end = any(node is end for end in ends)
            if not is_end and not _is_supported(node, before(node)):
                raise ValueError(
                    f"PruneForLatencyOnXNNPack: the layer {node.name!r} "
                    f"({type(_layer(node) or node.operation).__name__}) is not supported by "
                    "XNNPACK's sparse inference. Prune without the policy, or replace the layer."
                )
            waiting += [] if is_end else after(node)


_POOLING = layers.GlobalAveragePooling2D
_ACTIVATIONS = ("relu", "relu6", "leaky_relu", "elu", "sigmoid", "linear")
_ELEMENTWISE = (
    layers.Add,
    layers.Multiply,
    layers.ZeroPadding2D,
    layers.ReLU,
    layers.LeakyReLU,
    layers.ELU,
    layers.Dropout,
)
_FUNCTIONS = ("Add", "Subtract", "Multiply", "Identity")


def _first(
    entries: Iterable[Node], found: Callable[[Node], bool], onward: Callable[[Node], list[Node]]
) -> list[Node] | None:
    """Returns the nodes found first on every path, or None if a path ends without one."""
    waiting, seen, results = list(entries), set(), []
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if found(node):
            results.append(node)
            continue
        following = onward(node)
        if not following:
            return None
        waiting += following
    return results


def _is_start(node: Node, producers: list[Node]) -> bool:
    layer: Any = _layer(node)
    return (
        type(layer) is layers.Conv2D
        and tuple(layer.kernel.shape[:3]) == (3, 3, 3)
        and tuple(layer.strides) == (2, 2)
        and layer.padding == "valid"
        and _padding(producers) == 1
    )


def _is_supported(node: Node, producers: list[Node]) -> bool:
    layer = _layer(node)
    if layer is None:
        return type(node.operation).__name__ in _FUNCTIONS
    if isinstance(layer, layers.DepthwiseConv2D):
        return _is_supported_depthwise(layer, _padding(producers))
    if type(layer) is layers.Conv2D:
        ones = (layer.kernel_size, layer.strides, layer.dilation_rate)
        return layer.groups == 1 and all(tuple(pair) == (1, 1) for pair in ones)
    if isinstance(layer, _POOLING):
        return bool(layer.keepdims)
    if isinstance(layer, layers.BatchNormalization):
        return layer.axis in (-1, 3)
    if isinstance(layer, layers.UpSampling2D):
        return layer.interpolation == "bilinear"
    if isinstance(layer, layers.Activation):
        return getattr(layer.activation, "__name__", "") in _ACTIVATIONS
    return isinstance(layer, _ELEMENTWISE)


def _is_supported_depthwise(layer: keras.layers.Layer, padded: int | None) -> bool:
    size, strides = tuple(layer.kernel_size), tuple(layer.strides)
    if layer.depth_multiplier != 1 or tuple(layer.dilation_rate) != (1, 1):
        return False
    if size not in ((3, 3), (5, 5)):
        return False
    if layer.padding == "same":
        return strides == (1, 1)
    return strides in ((1, 1), (2, 2)) and padded == size[0] // 2


def _padding(producers: list[Node]) -> int | None:
    """Returns by how much a lone ZeroPadding2D pads all sides; None if there is none."""
    layer = _layer(producers[0]) if len(producers) == 1 else None
    if not isinstance(layer, layers.ZeroPadding2D):
        return None
    sides = {side for pair in layer.padding for side in pair}
    return sides.pop() if len(sides) == 1 else None


def _layer(node: Node) -> keras.layers.Layer | None:
    return node.layer.layer if isinstance(node.layer, TransformedLayer) else node.layer


def _unique(nodes: Iterable[Node]) -> list[Node]:
    return list({id(node): node for node in nodes}.values())
