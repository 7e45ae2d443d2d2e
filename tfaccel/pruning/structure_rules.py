"""Rules for what moves channels about: reshapes, permutations, pieces, pooling, concatenation."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from tfaccel.pruning.tracing import Rule, Trace, TracedCall
from tfaccel.pruning.units import Channels, Labels, constant, placed, reshaped

Kept = Callable[[Labels], int]


def _unknown(trace: Trace, call: TracedCall, why: str) -> Sequence[Labels]:
    trace.fix(call.inputs, f"{type(call.operation).__name__} {call.operation.name!r} {why}")
    return [constant(len(shape)) for shape in call.outputs]


def _settled(trace: Trace, value: Channels) -> Channels:
    return Channels(value.shape, value.dtype, trace.units.settle(value.labels))


# Space alone


def _spatial(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    """Pooling, padding and the like: along the spatial axes, channel by channel."""
    value = _settled(trace, call.inputs[0])
    last = len(value.shape) - 1
    data_format = getattr(call.operation, "data_format", None) or "channels_last"
    channel = 1 if data_format == "channels_first" else last
    if value.axis not in (None, channel):
        return _unknown(trace, call, "works along the axis of the channels")
    if len(call.outputs[0]) == len(value.shape):
        return [value.labels]
    return [placed(value.labels.ravel(), len(call.outputs[0]), -1)]


def _along_time(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    """Padding, cropping and repetition of [batch, time, channels], which have no data format."""
    value = _settled(trace, call.inputs[0])
    if value.axis not in (None, 2):
        return _unknown(trace, call, "works along the axis of the channels")
    return [value.labels]


def _repeat_vector(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    value = _settled(trace, call.inputs[0])
    return [placed(value.labels.ravel(), 3, -1)]


def _rescaling(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    layer = call.operation
    if np.ndim(layer.scale) or np.ndim(layer.offset):
        return _unknown(trace, call, "has a constant for each channel")
    return [call.inputs[0].labels]


# New shapes


def _reshape(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    value, shape = _settled(trace, call.inputs[0]), call.outputs[0]
    labels = reshaped(value, shape)
    if labels is None:
        return _unknown(trace, call, "moves channels in a tensor of unknown size")
    labels = trace.units.settle(labels)
    name = "target_shape" if isinstance(call.operation, layers.Layer) else "newshape"
    first = 1 if name == "target_shape" else 0

    def resize(config: dict[str, Any], kept: Kept) -> None:
        sizes = list(config[name])
        for axis, size in enumerate(labels.shape):
            if size > 1 and sizes[axis - first] != -1:
                sizes[axis - first] = kept(labels)
        config[name] = tuple(sizes)

    trace.resizes[id(call.operation)] = resize
    return [labels]


def _flatten(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    value = _settled(trace, call.inputs[0])
    if getattr(call.operation, "data_format", None) == "channels_first":
        return _unknown(trace, call, "moves the channels of a channels_first tensor")
    labels = reshaped(value, call.outputs[0])
    if labels is None:
        return _unknown(trace, call, "flattens a tensor of unknown size")
    return [labels]


def _permute(trace: Trace, call: TracedCall) -> Sequence[Labels]:  # noqa: ARG001
    return [np.transpose(call.inputs[0].labels, (0, *call.operation.dims))]


def _transpose(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    axes = call.operation.axes
    if axes is None or axes[0] != 0:
        return _unknown(trace, call, "moves the batch axis")
    return [np.transpose(call.inputs[0].labels, axes)]


def _expand_dims(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    axis = call.operation.axis
    if not isinstance(axis, int) or axis == 0:
        return _unknown(trace, call, "adds several axes, or one before the batch")
    return [np.expand_dims(call.inputs[0].labels, axis)]


def _squeeze(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    value = _settled(trace, call.inputs[0])
    if value.axis is None:
        return [np.full((1,) * len(call.outputs[0]), value.labels.ravel()[0])]
    if not isinstance(call.operation.axis, int):
        return _unknown(trace, call, "drops several axes at once")
    return [np.squeeze(value.labels, call.operation.axis)]


def _reduced(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    """Mean, sum, maximum along axes other than that of the channels."""
    operation, value = call.operation, _settled(trace, call.inputs[0])
    axes = range(len(value.shape)) if operation.axis is None else np.atleast_1d(operation.axis)
    dropped = {int(axis) % len(value.shape) for axis in axes}
    if value.axis in dropped or 0 in dropped:
        return _unknown(trace, call, "mixes channels")
    if operation.keepdims:
        return [value.labels]
    return [np.squeeze(value.labels, tuple(dropped))]


# Pieces


def _concatenated(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    values = [_settled(trace, value) for value in call.inputs]
    ndim = len(call.outputs[0])
    axis = call.operation.axis % ndim
    leaves = keras.tree.flatten((call.args, call.kwargs))
    axes = {value.axis for value in values if value.axis is not None}
    if len(leaves) != len(values) or len(axes) > 1:
        return _unknown(trace, call, "joins channels along several axes, or constants")
    if not axes or axis in axes:
        if any(value.shape[axis] is None for value in values):
            return _unknown(trace, call, "joins tensors of unknown size")
        why = f"{call.operation.name!r} joins channels along several axes"
        return [placed(np.concatenate([trace.along(v, axis, why) for v in values]), ndim, axis)]
    (other,) = axes
    rows = [trace.along(value, other, "joined along another axis") for value in values]
    for row in rows[1:]:
        trace.units.unite(rows[0], row)
    return [placed(rows[0], ndim, other)]


def _split(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    operation, value = call.operation, _settled(trace, call.inputs[0])
    axis = operation.axis % len(value.shape)
    if axis != value.axis:
        return [value.labels for _ in call.outputs]
    flat = value.labels.ravel()
    sections = operation.indices_or_sections
    if isinstance(sections, int):
        ends = [flat.size // sections * number for number in range(1, sections)]
    else:
        ends = [int(end) for end in sections]

    def resize(config: dict[str, Any], kept: Kept) -> None:
        config["indices_or_sections"] = tuple(kept(flat[:end]) for end in ends)

    trace.resizes[id(operation)] = resize
    pieces = np.split(flat, ends)
    if any(piece.size == 0 for piece in pieces):
        return _unknown(trace, call, "gives a piece of no channels")
    _keep_one_each(trace, pieces)
    return [placed(piece, len(value.shape), axis) for piece in pieces]


def _item(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    """`x[key]`: pieces along the axis of the channels, anything along the others."""
    value = _settled(trace, call.inputs[0])
    if len(call.args) < 2 or not isinstance(call.args[0], Channels):
        return _unknown(trace, call, "is called in an unknown way")
    key = call.args[1]
    keys = list(key) if isinstance(key, (tuple, list)) else [key]
    if not all(k is Ellipsis or k is None or isinstance(k, (int, slice)) for k in keys):
        return _unknown(trace, call, "takes single positions")
    if value.axis is None:
        return [np.full((1,) * len(call.outputs[0]), value.labels.ravel()[0])]
    keys = _spelled_out(keys, len(value.shape))
    axes = [number for number, k in enumerate(keys) if k is not None]
    place = axes[value.axis]
    piece = keys[place]
    if keys[axes[0]] != slice(None) or not isinstance(piece, slice) or piece.step not in (None, 1):
        return _unknown(trace, call, "takes single channels, or every other one")
    flat = value.labels.ravel()
    start, stop, _ = piece.indices(flat.size)
    if stop <= start:
        return _unknown(trace, call, "takes no channel")
    taken = flat[start:stop]
    _keep_one_each(trace, [taken])

    def recall(args: tuple[Any, ...], kept: Kept) -> tuple[Any, ...]:
        moved = slice(kept(flat[:start]), kept(flat[:stop]))
        return (args[0], (*keys[:place], moved, *keys[place + 1 :]), *args[2:])

    trace.recalls[id(call.operation)] = recall
    shown = [k for k in keys if not isinstance(k, int)]
    at = sum(not isinstance(k, int) for k in keys[:place])
    return [placed(taken, len(shown), at)]


def _spelled_out(keys: list[Any], ndim: int) -> list[Any]:
    """Returns one key for each axis, and None for each new one."""
    used = sum(k is not None and k is not Ellipsis for k in keys)
    if Ellipsis not in keys:
        keys = [*keys, Ellipsis]
    place = keys.index(Ellipsis)
    return [*keys[:place], *[slice(None)] * (ndim - used), *keys[place + 1 :]]


def _keep_one_each(trace: Trace, pieces: Sequence[Labels]) -> None:
    """Lets the first channel of each piece stay: a tensor of no channels is none."""
    for piece in pieces:
        roots = trace.units.roots(piece)
        if all(trace.units.reason(int(root)) is None for root in np.unique(roots)):
            trace.units.fix(piece[:1], "the first of a piece, which must not be empty")


_POOLING = (
    layers.MaxPooling1D,
    layers.MaxPooling2D,
    layers.MaxPooling3D,
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.AveragePooling3D,
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalAveragePooling3D,
    layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D,
    layers.GlobalMaxPooling3D,
    layers.UpSampling2D,
    layers.UpSampling3D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
    layers.Cropping2D,
    layers.Cropping3D,
)

STRUCTURE_LAYERS: Sequence[tuple[type | tuple[type, ...], Rule]] = (
    (_POOLING, _spatial),
    ((layers.UpSampling1D, layers.ZeroPadding1D, layers.Cropping1D), _along_time),
    (layers.RepeatVector, _repeat_vector),
    (layers.Rescaling, _rescaling),
    (layers.Reshape, _reshape),
    (layers.Flatten, _flatten),
    (layers.Permute, _permute),
    (layers.Concatenate, _concatenated),
)

STRUCTURE_OPERATIONS: dict[str, Rule] = {
    "Concatenate": _concatenated,
    "ExpandDims": _expand_dims,
    "GetItem": _item,
    "Max": _reduced,
    "Mean": _reduced,
    "Min": _reduced,
    "Reshape": _reshape,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sum": _reduced,
    "Transpose": _transpose,
}
