"""Where a model is quantized: so that what is trained is what the runtime computes.

TFLite computes convolution, batch norm and ReLU in one integer operator, so a value is rounded
once, behind the last of them. A sum is rounded behind its ReLU. Pooling, reshaping and the like
hand the integers on as they are. The inputs of a concatenation take its range, so they get none of
their own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from tfaccel.core.cloning import clone_built
from tfaccel.core.graph import Graph, Node, Tensor
from tfaccel.core.transforms import TransformedLayer, wrap_layer
from tfaccel.quantization.fake_quantization import FakeQuantize, FakeQuantizeWeights
from tfaccel.quantization.schemes import Scheme

# Layers with a kernel, and the axes of the kernel that are output channels.
_KERNEL_AXES: dict[type, tuple[int, ...]] = {
    layers.Conv1D: (-1,),
    layers.Conv2D: (-1,),
    layers.DepthwiseConv1D: (-2, -1),
    layers.DepthwiseConv2D: (-2, -1),
    layers.Conv2DTranspose: (-2,),
    layers.Dense: (-1,),
}
_PASSING = (
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Dropout,
    layers.Flatten,
    layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D,
    layers.Identity,
    layers.MaxPooling1D,
    layers.MaxPooling2D,
    layers.Permute,
    layers.Reshape,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.UpSampling2D,
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
)
_PASSING_OPERATIONS = ("ExpandDims", "GetItem", "Reshape", "Split", "Squeeze", "Transpose")
_SUMS = (layers.Add, layers.Multiply)
_SUM_OPERATIONS = ("Add", "Multiply")
_MEANS = (layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D)
_RELUS = ("relu", "relu6")
# The runtime prescribes the output range of these.
_FIXED_RANGES = {
    "sigmoid": (0.0, 255 / 256),
    "softmax": (0.0, 255 / 256),
    "tanh": (-1.0, 127 / 128),
}

QUANTIZED, FOLLOWS, FLOAT = "quantized", "follows", "float"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of one call of a layer.

    Attributes:
        name: of the layer or operation.
        action: "quantized" (rounds its output, and its kernel if it has one), "follows" (is a part
            of another's operator, or hands integers on), or "float" (is computed in float).
        reason: why.
    """

    name: str
    action: str
    reason: str


class Placer:
    """Puts fake quantization into one graph.

    Args:
        graph: edited by `place`.
        scheme: bits of weights and activations.
        skipped: for each layer that the user leaves in float, by identity, the reason.
        outermost: whether the graph's inputs come from outside, not from a surrounding model.
    """

    def __init__(
        self, graph: Graph, scheme: Scheme, skipped: dict[int, str], *, outermost: bool
    ) -> None:
        self._graph = graph
        self._scheme = scheme
        self._skipped = skipped
        self._outermost = outermost
        self._integer: set[int] = set()  # tensors that are on a grid
        self._absorbed: dict[int, str] = {}  # nodes that are parts of another's operator
        self._names = {node.name for node in graph.nodes}
        self.decisions: list[Decision] = []

    def place(self) -> list[Decision]:
        """Edits the graph; returns what was decided for each call."""
        self._split_separable()
        self._split_activations()
        kernels: dict[int, keras.layers.Layer] = {}
        for node in list(self._graph.nodes):
            action, reason = self._place_node(node)
            if not node.is_input and not node.is_model:
                self.decisions.append(Decision(node.name, action, reason))
            if action == QUANTIZED and type(inner_layer(node)) in _KERNEL_AXES:
                kernels[id(node.layer)] = node.layer
        for layer in kernels.values():
            self._quantize_kernel(layer)
        return self.decisions

    def _place_node(self, node: Node) -> tuple[str, str]:
        if id(node) in self._absorbed:
            return FOLLOWS, self._absorbed[id(node)]
        if node.is_input:
            if not self._outermost:
                self._mark(*node.outputs)
            return FOLLOWS, "input"
        refusal = self._refusal(node)
        if refusal:
            return FLOAT, refusal
        if node.is_model or _passes(node):
            for tensor in node.inputs:
                self._need(tensor)
            self._mark(*node.outputs)
            return FOLLOWS, "hands integers on"
        return self._quantize_output(node)

    def _refusal(self, node: Node) -> str:
        """Says why a call stays in float; empty if it does not."""
        layer = inner_layer(node)
        if id(layer) in self._skipped:
            return self._skipped[id(layer)]
        if node.is_model or _passes(node) or _is_concatenation(node) or _kind(node):
            return ""
        if isinstance(layer, layers.BatchNormalization):
            return "batch normalization that cannot be folded into a layer before it"
        return f"{type(node.operation if layer is None else layer).__name__} is not covered yet"

    def _quantize_output(self, node: Node) -> tuple[str, str]:
        if not _is_concatenation(node):  # the inputs of a concatenation take its range
            for tensor in node.inputs:
                self._need(tensor)
        last = self._operator_end(node)
        output = last.outputs[0]
        readers = self._graph.consumers(output)
        if readers and all(map(_is_concatenation, readers)) and not self._graph.is_output(output):
            return QUANTIZED, "takes the range of the concatenation that reads it"
        self._quantize(output, _FIXED_RANGES.get(_activation_of(node)))
        return QUANTIZED, _kind(node) or "concatenation"

    def _operator_end(self, node: Node) -> Node:
        """Returns the last call that the runtime computes in one operator with `node`."""
        last = node
        if type(inner_layer(node)) in _KERNEL_AXES:
            last = self._absorb(node, last, _is_batch_norm, "folded into")
        if _kind(node) in ("kernel", "sum") and not _has_relu(node):
            last = self._absorb(node, last, _is_relu, "computed in one with")
        return last

    def _absorb(self, node: Node, last: Node, fits: Callable[[Node], bool], how: str) -> Node:
        graph = self._graph
        readers = graph.consumers(last.outputs[0])
        if len(readers) != 1 or graph.is_output(last.outputs[0]) or not fits(readers[0]):
            return last
        if _is_batch_norm(readers[0]):
            shared = max(len(graph.calls(n.operation)) for n in (node, readers[0])) > 1
            if shared or _has_activation(node) or id(inner_layer(readers[0])) in self._skipped:
                return last
        self._absorbed[id(readers[0])] = f"{how} {node.name}"
        return readers[0]

    def _need(self, tensor: Tensor) -> None:
        """Makes sure that a value is on a grid before an integer operator reads it."""
        if id(tensor) in self._integer or not tensor.dtype.startswith(("float", "bfloat")):
            return
        producer = self._graph.producer(tensor)
        if _passes(producer) and id(inner_layer(producer)) not in self._skipped:
            for before in producer.inputs:
                self._need(before)
            self._mark(*producer.outputs)
        else:
            self._quantize(tensor)

    def _quantize(self, tensor: Tensor, fixed_range: tuple[float, float] | None = None) -> None:
        producer = self._graph.producer(tensor)
        layer = FakeQuantize(
            self._scheme.activation_bits,
            fixed_range=fixed_range,
            name=self._free_name(f"{producer.name}_quantize"),
        )
        self._mark(tensor, self._graph.insert_after(tensor, layer))

    def _mark(self, *tensors: Tensor) -> None:
        self._integer.update(map(id, tensors))

    def _free_name(self, wanted: str) -> str:
        name, number = wanted, 0
        while name in self._names:
            number += 1
            name = f"{wanted}_{number}"
        self._names.add(name)
        return name

    def _quantize_kernel(self, layer: keras.layers.Layer) -> None:
        inner = layer.layer if isinstance(layer, TransformedLayer) else layer
        transform = FakeQuantizeWeights(_KERNEL_AXES[type(inner)], self._scheme.weight_bits)
        self._graph.replace_layer(layer, wrap_layer(layer, {"kernel": transform}))

    def _split_activations(self) -> None:
        """Takes built-in activations that the runtime computes apart out of their layers."""
        for layer in self._graph.layers():
            inner: Any = layer.layer if isinstance(layer, TransformedLayer) else layer
            name = _activation_name(inner)
            apart = type(inner) in _KERNEL_AXES and name not in ("linear", *_RELUS)
            if not apart or id(inner) in self._skipped:
                continue
            plain = clone_built(inner)
            plain.activation = keras.activations.linear
            new = plain if layer is inner else wrap_layer(layer, {}, inner=plain)
            self._graph.replace_layer(layer, new)
            for number, node in enumerate(self._graph.calls(new)):
                suffix = f"_{number}" if number else ""
                activation = layers.Activation(
                    inner.activation,
                    dtype=inner.dtype_policy,
                    name=self._free_name(f"{inner.name}_activation{suffix}"),
                )
                self._graph.insert_after(node.outputs[0], activation)

    def _split_separable(self) -> None:
        """Makes two layers of a separable convolution: the runtime has two operators for it."""
        for layer in self._graph.layers():
            if type(layer) is not layers.SeparableConv2D or id(layer) in self._skipped:
                continue
            depthwise, pointwise = _halves_of(layer, self._free_name(f"{layer.name}_depthwise"))
            self._graph.replace_layer(layer, pointwise)
            for node in self._graph.calls(pointwise):
                self._graph.insert_before(node, node.inputs[0], depthwise)


def inner_layer(node: Node) -> keras.layers.Layer | None:
    """Returns the layer that a node calls, the inner one if it is transformed already."""
    return node.layer.layer if isinstance(node.layer, TransformedLayer) else node.layer


def _kind(node: Node) -> str:
    """Says what an operator with a range of its own is; empty for others."""
    layer = inner_layer(node)
    if type(layer) in _KERNEL_AXES:
        return "kernel"
    if isinstance(layer, _SUMS) or _is_operation(node, _SUM_OPERATIONS):
        return "sum"
    if isinstance(layer, _MEANS):
        return "mean"
    return "activation" if _is_relu(node) or _activation_of(node) in _FIXED_RANGES else ""


def _is_operation(node: Node, names: tuple[str, ...]) -> bool:
    return node.layer is None and type(node.operation).__name__ in names


def _passes(node: Node) -> bool:
    layer = inner_layer(node)
    if isinstance(layer, layers.UpSampling2D):
        return bool(layer.interpolation == "nearest")
    if isinstance(layer, layers.Activation):
        return _activation_name(layer) == "linear"
    return isinstance(layer, _PASSING) or _is_operation(node, _PASSING_OPERATIONS)


def _is_concatenation(node: Node) -> bool:
    return isinstance(node.layer, layers.Concatenate) or _is_operation(node, ("Concatenate",))


def _is_batch_norm(node: Node) -> bool:
    layer: Any = node.layer
    if type(layer) is not layers.BatchNormalization:
        return False
    return bool(layer.axis in (-1, len(node.outputs[0].shape) - 1))


def _is_relu(node: Node) -> bool:
    layer: Any = node.layer
    if isinstance(layer, layers.ReLU):
        return not layer.negative_slope and not layer.threshold and layer.max_value in (None, 6)
    if isinstance(layer, layers.Activation):
        return _activation_name(layer) in _RELUS
    return _is_operation(node, ("Relu", "Relu6"))


def _activation_of(node: Node) -> str:
    layer: Any = node.layer
    if isinstance(layer, layers.Softmax):
        return "softmax" if layer.axis in (-1, len(node.outputs[0].shape) - 1) else ""
    return _activation_name(layer) if isinstance(layer, layers.Activation) else ""


def _activation_name(layer: Any) -> str:
    return str(getattr(getattr(layer, "activation", None), "__name__", ""))


def _has_activation(node: Node) -> bool:
    return _activation_name(inner_layer(node)) not in ("linear", "")


def _has_relu(node: Node) -> bool:
    return _kind(node) == "kernel" and _has_activation(node)


def _halves_of(layer: Any, depthwise_name: str) -> tuple[Any, Any]:
    """Returns a depthwise and a 1x1 convolution that together are the separable one, built."""
    config = layer.get_config()
    common = {"dtype": layer.dtype_policy, "data_format": layer.data_format}
    depthwise = layers.DepthwiseConv2D(
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        depth_multiplier=layer.depth_multiplier,
        dilation_rate=layer.dilation_rate,
        use_bias=False,
        name=depthwise_name,
        **common,
    )
    pointwise = layers.Conv2D(
        layer.filters,
        1,
        activation=layer.activation,
        use_bias=layer.use_bias,
        kernel_regularizer=config["pointwise_regularizer"],
        name=layer.name,
        **common,
    )
    kernels = layer.depthwise_kernel, layer.pointwise_kernel
    depthwise.build((None, None, None, kernels[0].shape[-2]))
    pointwise.build((None, None, None, kernels[1].shape[-2]))
    depthwise.set_weights([keras.ops.convert_to_numpy(kernels[0])])
    bias = [layer.bias] if layer.use_bias else []
    pointwise.set_weights([keras.ops.convert_to_numpy(v) for v in (kernels[1], *bias)])
    depthwise.trainable = pointwise.trainable = layer.trainable
    return depthwise, pointwise
