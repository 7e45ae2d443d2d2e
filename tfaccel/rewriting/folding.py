"""Batch normalization folded into the linear layers around it."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from tfaccel.core.checks import check_model
from tfaccel.core.cloning import clone_operation
from tfaccel.core.graph import Graph, Node, map_models
from tfaccel.core.matching import match
from tfaccel.rewriting.freezable_norm import FreezableBatchNormalization

Array = npt.NDArray[Any]

NORMS = (layers.BatchNormalization, FreezableBatchNormalization)


def fold_batch_norm(model: keras.Model, *, before: bool = True) -> keras.Model:
    """Folds batch normalization into the convolutions and dense layers right around it.

    In inference batch normalization is y = s x + t for each channel, with s = gamma /
    sqrt(variance + epsilon) and t = beta - s mean (Jacob et al. 2018, eq. 14). A linear layer W x +
    b in front of it takes it over as (s W) x + (s b + t), its kernel scaled per output channel. A
    linear layer behind it takes it over as W (s x + t) + b = (W s) x + (W t + b): the kernel is
    scaled per input channel, and the bias gains the sum of W t over the taps of the kernel.

    The layer in front comes first: there folding is always exact. Folding into what is behind is
    exact where every tap meets normalized values. Zeros that padding puts around the values enter
    after t was added, and at the border of a transposed convolution some taps are missing; so these
    take it over only if t is zero in all channels, if the kernel has one tap (and a transposed
    convolution no stride), or if padding="same" adds nothing at these input sizes. Several layers
    that read the batch normalization each take it over if all of them can; these may have an
    activation of their own.

    Folded are Conv1D/2D/3D, DepthwiseConv1D/2D, SeparableConv1D/2D, Conv1D/2D/3DTranspose and
    Dense, also in nested models. Left alone, with its batch normalization, is a layer that is
    called more than once, that is in front and has other readers or a built-in activation, or that
    is wrapped by a technique (`tfaccel.core.bake_weights` first); and batch normalization over
    another axis than the channels, or called with training=True.

    Args:
        model: a built Functional or Sequential model; not changed.
        before: whether batch normalization that is *before* a linear layer is folded too. It gives
            the input channels of a kernel different scales, so weights that were rounded to a grid
            per output channel leave it: export passes False for a quantization-aware model.

    Returns:
        A new model with the same outputs in inference, within float error, and the same names of
        layers. `tfaccel.diff(model, folded)` tells what was folded.

    Raises:
        TypeError: the model is subclassed, or is no model.
        ValueError: the model is not built.
    """
    check_model(model, "fold_batch_norm")

    def fold_all(graph: Graph) -> None:
        # What one fold leaves may be next to another batch normalization.
        while _fold_backward(graph) or (before and _fold_forward(graph)):
            pass

    return map_models(model, fold_all)


# Into the layer in front


def _fold_backward(graph: Graph) -> bool:
    """Folds batch normalization into the layer that gives its input; says whether it did any."""
    folded = False
    for node, norm_node in match(graph, [_is_linear, _is_batch_norm]):
        if node is None or norm_node is None or node.layer is None or norm_node.layer is None:
            continue
        layer, norm = node.layer, norm_node.layer
        once = len(graph.calls(layer)) == 1 and len(graph.calls(norm)) == 1
        if once and _over_channels(layer, norm, len(node.outputs[0].shape)):
            graph.replace_layer(layer, _scaled_outputs(layer, *_scale_and_shift(norm)))
            graph.remove(norm_node)
            folded = True
    return folded


def _is_linear(node: Node) -> bool:
    layer: Any = node.layer
    return _takes_over(node) and layer.activation is keras.activations.linear


def _takes_over(node: Node) -> bool:
    layer: Any = node.layer
    # Subclasses may do more in their call than the layer that they derive from.
    return (
        type(layer) in _KERNELS
        and getattr(layer, "quantization_mode", None) is None
        and not getattr(layer, "lora_enabled", False)
    )


def _is_batch_norm(node: Node) -> bool:
    plain_call = not any(value is not None and value is not False for value in node.kwargs.values())
    return type(node.layer) in NORMS and len(node.args) == 1 and plain_call


def _over_channels(layer: Any, norm: Any, rank: int) -> bool:
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return bool(norm.axis % rank == (1 if first else rank - 1))


def _scaled_outputs(layer: Any, scale: Array, shift: Array) -> Any:
    kernels, bias = _weights(layer)
    kernels[-1] = _KERNELS[type(layer)](kernels[-1], scale)
    return _with_weights(layer, kernels, scale * bias + shift)


# Into the layers behind


def _fold_forward(graph: Graph) -> bool:
    """Folds one batch normalization into the layers that read it; says whether there was one."""
    for node in graph.nodes:
        if not _is_batch_norm(node) or len(graph.calls(node.operation)) > 1:
            continue
        normalized = node.outputs[0]
        readers = graph.consumers(normalized)
        if not readers or graph.is_output(normalized):
            continue
        scale, shift = _scale_and_shift(node.layer)
        spatial = normalized.shape
        if all(_takes_input(graph, reader, node.layer, spatial, shift) for reader in readers):
            for reader in readers:
                layer: Any = reader.layer
                graph.replace_layer(layer, _scaled_inputs(layer, scale, shift))
            graph.remove(node)
            return True
    return False


def _takes_input(
    graph: Graph, node: Node, norm: Any, shape: tuple[int | None, ...], shift: Array
) -> bool:
    layer: Any = node.layer
    return (
        _takes_over(node)
        and len(graph.calls(layer)) == 1
        and _over_channels(layer, norm, len(shape))
        and (not shift.any() or _meets_only_inputs(layer, shape))
    )


def _meets_only_inputs(layer: Any, shape: tuple[int | None, ...]) -> bool:
    """Whether every tap of a kernel meets a value of the input wherever the kernel lies."""
    if isinstance(layer, layers.Dense):
        return True
    if isinstance(layer, _TRANSPOSED):
        return {*layer.kernel_size, *layer.strides} == {1}
    if layer.padding == "valid":
        return True
    first = layer.data_format == "channels_first"
    sizes = shape[2:] if first else shape[1:-1]
    steps = zip(sizes, layer.kernel_size, layer.strides, layer.dilation_rate, strict=True)
    return not any(_is_padded(layer.padding, *step) for step in steps)


def _is_padded(padding: str, size: int | None, taps: int, stride: int, dilation: int) -> bool:
    width = (taps - 1) * dilation + 1
    if padding != "same" or size is None:
        return width > 1
    return (-(-size // stride) - 1) * stride + width > size


def _scaled_inputs(layer: Any, scale: Array, shift: Array) -> Any:
    kernels, bias = _weights(layer)
    kernel = kernels[0]
    if isinstance(layer, _TRANSPOSED):  # [..., output channels, input channels]
        gain = (kernel * shift).sum(axis=(*range(kernel.ndim - 2), -1))
        scaled = kernel * scale
    elif isinstance(layer, _DEPTHWISE):  # [..., input channels, multiplier]
        gain = (kernel * shift[:, np.newaxis]).sum(axis=tuple(range(kernel.ndim - 2))).ravel()
        scaled = kernel * scale[:, np.newaxis]
    else:  # [..., input channels of a group, output channels]
        groups = getattr(layer, "groups", 1)
        gain = (kernel * _by_group(shift, kernel, groups)).sum(axis=tuple(range(kernel.ndim - 1)))
        scaled = kernel * _by_group(scale, kernel, groups)
    if len(kernels) == 2:  # what the depthwise half of a separable convolution gains goes on
        gain = gain @ kernels[1].reshape(kernels[1].shape[-2:])
    # A transposed convolution of other shape comes here with no shift, and gains nothing.
    return _with_weights(layer, [scaled, *kernels[1:]], bias + gain)


def _by_group(values: Array, kernel: Array, groups: int) -> Array:
    """Returns one value per input channel as [input channels of a group, output channels]."""
    return np.repeat(values.reshape(groups, -1).T, kernel.shape[-1] // groups, axis=1)


# Weights


def _scale_and_shift(norm: Any) -> tuple[Array, Array]:
    scale = 1.0 / np.sqrt(_value(norm.moving_variance) + norm.epsilon)
    if norm.scale:
        scale *= _value(norm.gamma)
    shift = -scale * _value(norm.moving_mean)
    if norm.center:
        shift += _value(norm.beta)
    return scale, shift


def _weights(layer: Any) -> tuple[list[Array], Array]:
    """Returns the kernels, from input to output, and the bias, zeros if there is none."""
    kernels = [_value(weight) for weight in layer.weights if weight is not layer.bias]
    return kernels, _value(layer.bias) if layer.use_bias else np.zeros(())


def _with_weights(layer: Any, kernels: list[Array], bias: Array) -> Any:
    new: Any = clone_operation(layer)
    new.use_bias = True
    new.build_from_config(layer.get_build_config())
    new.set_weights([*kernels, bias])
    return new


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

_DEPTHWISE = (
    layers.DepthwiseConv1D,
    layers.DepthwiseConv2D,
    layers.SeparableConv1D,
    layers.SeparableConv2D,
)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
