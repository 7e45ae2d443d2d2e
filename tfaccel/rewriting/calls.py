"""The calls of the layers of a model: their shapes and what they cost."""

import dataclasses
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import keras
from keras import layers

from tfaccel.core.graph import Graph
from tfaccel.core.transforms import TransformedLayer
from tfaccel.core.walking import Visit, walk_shapes

Shape = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """The shapes of one call of a layer, batch dimension included.

    Attributes:
        layer: what is called; the inner layer where a technique has wrapped it.
        inputs: shape of its first input.
        outputs: shape of its first output.
        plain: whether it is called with exactly one tensor.
    """

    layer: keras.layers.Layer
    inputs: Shape
    outputs: Shape
    plain: bool


def layer_calls(model: keras.Model) -> tuple[list[LayerCall], int]:
    """Returns the calls of all layers of a model, with shapes, and the batch size in them."""
    tensors = Graph.read(model).inputs
    batch = tensors[0].shape[0] or 1
    specs = [keras.KerasTensor((batch, *t.shape[1:]), dtype=t.dtype) for t in tensors]
    return list(_shapes(walk_shapes(model, specs))), batch


def _shapes(visits: Iterator[Visit]) -> Iterator[LayerCall]:
    for visit in visits:
        layer = visit.node.layer
        if layer is not None and visit.inputs and visit.outputs:
            if isinstance(layer, TransformedLayer):
                layer = layer.layer
            first, out = tuple(visit.inputs[0].shape), tuple(visit.outputs[0].shape)
            yield LayerCall(layer, first, out, len(visit.inputs) == 1)


# Multiply-accumulates


def macs_of_calls(calls: Sequence[LayerCall]) -> int | None:
    """Returns the MACs of convolutions and dense layers; None where a size is not known.

    Separable, depthwise, grouped and transposed convolutions are among them. Attention, recurrent
    layers and matrix products are not.
    """
    total = 0
    for call in calls:
        macs = _macs(call)
        if macs is None:
            return None
        total += macs
    return total


def _macs(call: LayerCall) -> int | None:
    layer: Any = call.layer
    known = None not in (*call.inputs, *call.outputs)
    if isinstance(layer, layers.Dense):
        return prod(call.outputs) * call.inputs[-1] if known else None  # type: ignore[arg-type, operator]
    if not isinstance(layer, _CONVOLUTIONS):
        return 0
    if not known:
        return None
    taps = prod(layer.kernel_size)
    channels = channels_of(layer, call.inputs)
    entries = prod(call.outputs)  # type: ignore[arg-type]
    if isinstance(layer, _TRANSPOSED):
        return prod(call.inputs) * taps * layer.filters  # type: ignore[arg-type]
    if isinstance(layer, _SEPARABLE):
        between = channels * layer.depth_multiplier
        return entries // layer.filters * between * (taps + layer.filters)
    if isinstance(layer, _DEPTHWISE):
        return entries * taps
    return entries * taps * channels // layer.groups


def channels_of(layer: Any, shape: Shape) -> int:
    """Returns the number of channels of a convolution's input."""
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return int(shape[1 if first else -1] or 0)


def sides_of(layer: Any, shape: Shape) -> Shape:
    """Returns the sizes of a tensor along the axes that a convolution moves on."""
    return shape[2:] if layer.data_format == "channels_first" else shape[1:-1]


_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_CONVOLUTIONS = (
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    *_TRANSPOSED,
    *_SEPARABLE,
    *_DEPTHWISE,
)
