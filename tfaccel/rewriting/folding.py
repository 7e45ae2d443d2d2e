"""Batch normalization folded into the layer before it."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from tfaccel.core.checks import check_model
from tfaccel.core.graph import Graph, Node, map_models
from tfaccel.core.matching import match

Array = npt.NDArray[Any]


def fold_batch_norm(model: keras.Model) -> keras.Model:
    """Folds batch normalization into the convolution or dense layer right before it.

    In inference batch normalization is y = s (x - mean) + beta with s = gamma / sqrt(variance +
    epsilon) for each channel (Jacob et al. 2018, eq. 14), so a linear layer before it can take it
    over: its kernel is multiplied by s, its bias becomes s (bias - mean) + beta.

    Folded are Conv1D/2D/3D, DepthwiseConv1D/2D, SeparableConv1D/2D, Conv1D/2D/3DTranspose and
    Dense, also in nested models. Left alone, with its batch normalization, is a layer that is
    called more than once, whose output is read by anything else, that has a built-in activation, or
    that is wrapped by a technique (`tfaccel.core.bake_weights` first); and batch normalization over
    another axis than the channels, or called with training=True.

    Args:
        model: a built Functional or Sequential model; not changed.

    Returns:
        A new model with the same outputs in inference, within float error, and the same names of
        layers.

    Raises:
        TypeError: the model is subclassed, or is no model.
        ValueError: the model is not built.
    """
    check_model(model, "fold_batch_norm")
    return map_models(model, _fold_all)


def _fold_all(graph: Graph) -> None:
    for node, norm_node in match(graph, [_foldable, _is_batch_norm]):
        if node is None or norm_node is None or node.layer is None or norm_node.layer is None:
            continue
        layer, norm = node.layer, norm_node.layer
        once = len(graph.calls(layer)) == 1 and len(graph.calls(norm)) == 1
        if once and _over_channels(layer, norm, len(node.outputs[0].shape)):
            graph.replace_layer(layer, _with_bias(layer), _folded_weights(layer, norm))
            graph.remove(norm_node)


def _foldable(node: Node) -> bool:
    layer: Any = node.layer
    # Subclasses may do more in their call than the layer that they derive from.
    return (
        type(layer) in _KERNELS
        and layer.activation is keras.activations.linear
        and getattr(layer, "quantization_mode", None) is None
        and not getattr(layer, "lora_enabled", False)
    )


def _is_batch_norm(node: Node) -> bool:
    plain_call = not any(value is not None and value is not False for value in node.kwargs.values())
    return type(node.layer) is layers.BatchNormalization and len(node.args) == 1 and plain_call


def _over_channels(layer: Any, norm: Any, rank: int) -> bool:
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return bool(norm.axis % rank == (1 if first else rank - 1))


def _with_bias(layer: Any) -> Any:
    return type(layer).from_config({**layer.get_config(), "use_bias": True})


def _folded_weights(layer: Any, norm: Any) -> list[Array]:
    mean, variance = _value(norm.moving_mean), _value(norm.moving_variance)
    scale = 1.0 / np.sqrt(variance + norm.epsilon)
    if norm.scale:
        scale *= _value(norm.gamma)
    bias = scale * ((_value(layer.bias) if layer.use_bias else 0.0) - mean)
    if norm.center:
        bias += _value(norm.beta)
    kernels = [_value(weight) for weight in layer.weights if weight is not layer.bias]
    kernels[-1] = _KERNELS[type(layer)](kernels[-1], scale)
    return [*kernels, bias]


def _value(variable: keras.Variable) -> Array:
    # float64, so that folding adds no rounding of its own but the last.
    return np.asarray(keras.ops.convert_to_numpy(variable), np.float64)


def _scale_last_axis(kernel: Array, scale: Array) -> Array:
    return kernel * scale


def _scale_depthwise(kernel: Array, scale: Array) -> Array:
    return kernel * scale.reshape(kernel.shape[-2:])  # output channel: channel * multiplier + i


def _scale_transposed(kernel: Array, scale: Array) -> Array:
    return kernel * scale[:, np.newaxis]  # [..., output channels, input channels]


# How the last kernel of each kind of layer, the one next to the output, takes a factor per channel.
_KERNELS: dict[type, Callable[[Array, Array], Array]] = {
    layers.Conv1D: _scale_last_axis,
    layers.Conv2D: _scale_last_axis,
    layers.Conv3D: _scale_last_axis,
    layers.Conv1DTranspose: _scale_transposed,
    layers.Conv2DTranspose: _scale_transposed,
    layers.Conv3DTranspose: _scale_transposed,
    layers.Dense: _scale_last_axis,
    layers.DepthwiseConv1D: _scale_depthwise,
    layers.DepthwiseConv2D: _scale_depthwise,
    layers.SeparableConv1D: _scale_last_axis,
    layers.SeparableConv2D: _scale_last_axis,
}
