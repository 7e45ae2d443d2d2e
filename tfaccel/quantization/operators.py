"""What the integer runtime computes a call as: the kinds of layers that placement knows."""

from typing import Any

import keras
import numpy as np
from keras import layers

from tfaccel.core.graph import Graph, Node, Tensor
from tfaccel.core.transforms import TransformedLayer
from tfaccel.rewriting.folding import NORMS

# Layers with a kernel, and the axes of the kernel that are output channels.
KERNEL_AXES: dict[type, tuple[int, ...]] = {
    layers.Conv1D: (-1,),
    layers.Conv2D: (-1,),
    layers.DepthwiseConv1D: (-2, -1),
    layers.DepthwiseConv2D: (-2, -1),
    layers.Conv1DTranspose: (-2,),
    layers.Conv2DTranspose: (-2,),
    layers.Dense: (-1,),
}
RELUS = ("relu", "relu6")
# The converter computes ReLU apart from these where no bias stands between, and leaves both in
# float if the value between has no range; batch norm may fold to no bias as well.
TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose)
# The runtime prescribes the output range of these.
FIXED_RANGES = {
    "sigmoid": (0.0, 255 / 256),
    "softmax": (0.0, 255 / 256),
    "tanh": (-1.0, 127 / 128),
}
# The runtime has an operator for these that writes to any range.
_OWN_RANGES = ("gelu", "hard_silu", "leaky_relu", *RELUS)

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
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
)
_PASSING_OPERATIONS = ("ExpandDims", "GetItem", "Reshape", "Split", "Squeeze", "Transpose")
_SUMS = (layers.Add, layers.Multiply, layers.Subtract)
_SUM_OPERATIONS = ("Add", "Multiply", "Subtract")
_MEANS = (layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D)

_ACTIVATIONS = {
    keras.activations.get(name): name for name in ("linear", "silu", *FIXED_RANGES, *_OWN_RANGES)
}
_ACTIVATION_LAYERS: dict[type, str] = {layers.LeakyReLU: "leaky_relu", layers.Softmax: "softmax"}
_ACTIVATION_OPERATIONS = {
    "Gelu": "gelu",
    "HardSilu": "hard_silu",
    "LeakyRelu": "leaky_relu",
    "Relu": "relu",
    "Relu6": "relu6",
    "Sigmoid": "sigmoid",
    "Silu": "silu",
    "Softmax": "softmax",
    "Tanh": "tanh",
}


def inner_layer(node: Node) -> keras.layers.Layer | None:
    """Returns the layer that a node calls, the inner one if it is transformed already."""
    return node.layer.layer if isinstance(node.layer, TransformedLayer) else node.layer


def kind_of(node: Node) -> str:
    """Says what an operator with a range of its own is; empty for others."""
    layer = inner_layer(node)
    if type(layer) in KERNEL_AXES:
        return "kernel"
    if is_sum(node):
        return "sum" if _has_two_terms(node) else ""
    if isinstance(layer, _MEANS) or _is_operation(node, ("Mean",)):
        return "mean"
    if _is_operation(node, ("Matmul",)):
        return "matrix product" if _of_batches(node) else ""
    if is_inverse_root(node):
        return "inverse square root"
    name = activation_of(node)
    return "activation" if name in FIXED_RANGES or name in _OWN_RANGES else ""


def converts_in_sixteen_bits(node: Node) -> bool:
    """Whether the converter has a form with values of 16 bits for what it has one with 8 bits."""
    if passes(node):
        return not isinstance(node.layer, layers.UpSampling2D)
    kind = kind_of(node)
    if kind == "sum":
        return len(node.inputs) == 2  # none with a number
    return kind in ("kernel", "mean") or activation_of(node) in ("leaky_relu", *RELUS)


def is_inverse_root(node: Node) -> bool:
    """Whether a node computes 1 / sqrt(x), which has no value for what is rounded to zero."""
    return _is_operation(node, ("Rsqrt",))


def _of_batches(node: Node) -> bool:
    """Whether both factors of a product of matrices are values, one matrix for each sample."""
    return len(node.inputs) == 2 and all(len(tensor.shape) > 2 for tensor in node.inputs)


def gives_no_negatives(node: Node) -> bool:
    """Whether a node ends in a ReLU, of its own or built in."""
    return is_relu(node) or activation_name(inner_layer(node)) in RELUS


def is_sum(node: Node) -> bool:
    """Whether a node adds, subtracts or multiplies values elementwise, however many."""
    return isinstance(node.layer, _SUMS) or _is_operation(node, _SUM_OPERATIONS)


def _has_two_terms(node: Node) -> bool:
    leaves = keras.tree.flatten((node.args, node.kwargs))
    # A number is exact on a grid of its own; an array would be rounded without being trained so.
    return len(leaves) == 2 and all(isinstance(x, Tensor) or np.ndim(x) == 0 for x in leaves)


def passes(node: Node) -> bool:
    """Whether a node hands the integers that it gets on, with their range."""
    layer = inner_layer(node)
    if isinstance(layer, layers.UpSampling2D):
        return bool(layer.interpolation == "nearest")
    if _is_operation(node, ("Pad",)):
        filling = node.kwargs.get("constant_values")
        return node.operation.mode == "constant" and filling in (None, 0)
    if activation_of(node) == "linear":
        return True
    return isinstance(layer, _PASSING) or _is_operation(node, _PASSING_OPERATIONS)


def is_concatenation(node: Node) -> bool:
    """Whether a node joins values, which the runtime does on one range."""
    return isinstance(node.layer, layers.Concatenate) or _is_operation(node, ("Concatenate",))


def is_relu(node: Node) -> bool:
    """Whether a node is a ReLU that the runtime computes in one with what is before it."""
    return activation_of(node) in RELUS


def is_batch_norm(node: Node) -> bool:
    """Whether a node normalizes channels, the last axis, as it can be folded."""
    layer: Any = node.layer
    if type(layer) not in NORMS:
        return False
    plain = all(value is None or value is False for value in node.kwargs.values())
    return plain and len(node.args) == 1 and layer.axis in (-1, len(node.outputs[0].shape) - 1)


def folds_into(graph: Graph, norm_node: Node, node: Node) -> bool:
    """Whether batch normalization can be folded into the layer that `node` calls, before it.

    Both are called once, nothing else reads what is between them, and the layer is linear.
    """
    between = norm_node.inputs[0]
    return (
        type(inner_layer(node)) in KERNEL_AXES
        and activation_name(inner_layer(node)) == "linear"
        and len(graph.calls(node.operation)) == len(graph.calls(norm_node.operation)) == 1
        and len(graph.consumers(between)) == 1
        and not graph.is_output(between)
    )


def activation_of(node: Node) -> str:
    """Returns the name of the activation that a node computes and nothing else; empty if none."""
    layer = node.layer
    if layer is None:
        name = _ACTIVATION_OPERATIONS.get(type(node.operation).__name__, "")
        return name if name != "softmax" or _is_last(node.operation.axis, node) else ""
    if isinstance(layer, layers.ReLU):
        plain = not layer.negative_slope and not layer.threshold
        return {None: "relu", 6: "relu6"}.get(layer.max_value, "") if plain else ""
    if isinstance(layer, layers.Softmax) and not _is_last(layer.axis, node):
        return ""
    if type(layer) in _ACTIVATION_LAYERS:
        return _ACTIVATION_LAYERS[type(layer)]
    return activation_name(layer) if isinstance(layer, layers.Activation) else ""


def activation_name(layer: keras.layers.Layer | None) -> str:
    """Returns the name of a layer's built-in activation, if it is one of Keras's that is known."""
    return _ACTIVATIONS.get(getattr(layer, "activation", None), "")


def _is_last(axis: int, node: Node) -> bool:
    return axis in (-1, len(node.outputs[0].shape) - 1)


def _is_operation(node: Node, names: tuple[str, ...]) -> bool:
    return node.layer is None and type(node.operation).__name__ in names
