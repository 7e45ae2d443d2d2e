"""How each kind of layer and operation treats channels: rules for `dependencies`."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from tfaccel.core.transforms import weight_keys
from tfaccel.pruning.structure_rules import STRUCTURE_LAYERS, STRUCTURE_OPERATIONS
from tfaccel.pruning.tracing import CARRIES, CONSUMES, PRODUCES, Rule, Trace, TracedCall
from tfaccel.pruning.units import Channels, Labels, constant, placed

# One name for each line would hide what matters.
# fmt: off
_ELEMENTWISE = frozenset(
    (
        "celu", "elu", "exponential", "gelu", "hard_shrink", "hard_sigmoid", "hard_silu",
        "hard_swish", "hard_tanh", "leaky_relu", "linear", "log_sigmoid", "mish", "relu", "relu6",
        "selu", "sigmoid", "silu", "soft_shrink", "softplus", "softsign", "sparse_plus",
        "sparse_sigmoid", "squareplus", "swish", "tanh", "tanh_shrink", "threshold",
    )
)

_UNARY_OPERATIONS = frozenset(
    (
        "Absolute", "Abs", "Cast", "Ceil", "Celu", "Clip", "Copy", "Cos", "Elu", "Exp", "Expm1",
        "Floor", "Gelu", "HardShrink", "HardSigmoid", "HardSilu", "HardTanh", "LeakyRelu", "Log",
        "Log1p", "LogSigmoid", "Negative", "Reciprocal", "Relu", "Relu6", "Round", "Rsqrt", "Selu",
        "Sigmoid", "Sign", "Silu", "Sin", "SoftShrink", "Softplus", "Softsign", "SparsePlus",
        "SparseSigmoid", "Sqrt", "Square", "Squareplus", "StopGradient", "Tanh", "TanhShrink",
        "Threshold", "SaturateCast",
    )
)
_BINARY_OPERATIONS = frozenset(
    (
        "Add", "Divide", "DivideNoNan", "FloorDivide", "Maximum", "Minimum", "Mod", "Multiply",
        "Power", "Subtract", "TrueDivide", "Fmax", "Fmin",
    )
)
# fmt: on


def rule_for(operation: Any) -> Rule:
    """Returns the rule for a layer or functional operation; of unknown ones, one that fixes all."""
    for kinds, rule in (*_LAYERS, *STRUCTURE_LAYERS):
        if isinstance(operation, kinds):
            return rule
    if not isinstance(operation, keras.layers.Layer):
        name = type(operation).__name__
        if name in _UNARY_OPERATIONS:
            return _passed
        if name in _BINARY_OPERATIONS:
            return _joined
        if name in STRUCTURE_OPERATIONS:
            return STRUCTURE_OPERATIONS[name]
    return _unknown


# Layers with kernels


def _convolution(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    layer, (value,) = call.operation, call.inputs
    rank = len(layer.kernel.shape)
    axis = _channel_axis(layer, rank)
    read = trace.along(value, axis, _elsewhere(layer))
    groups = layer.groups
    if groups == 1:
        trace.lay(layer, "kernel", rank - 2, CONSUMES, read)
        made = trace.fresh(layer, "filters", layer.filters)
        _resize(trace, layer, filters=made)
    elif groups == read.size:
        # A depthwise convolution by another name: each filter belongs to its input channel.
        made = np.repeat(read, layer.filters // groups)
        _resize(trace, layer, filters=made, groups=read)
    else:
        # Each group must keep as many, so that the groups stay equal.
        rows = _tied(trace, read, groups)
        trace.lay(layer, "kernel", rank - 2, CONSUMES, rows)
        made = np.tile(trace.fresh(layer, "filters", layer.filters // groups), groups)
        _resize(trace, layer, filters=made)
    role = CARRIES if groups == read.size and groups > 1 else PRODUCES
    trace.lay(layer, "kernel", rank - 1, role, made)
    return [_finish(trace, layer, made, len(value.shape), axis)]


def _transposed_convolution(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    layer, (value,) = call.operation, call.inputs
    rank = len(layer.kernel.shape)
    axis = _channel_axis(layer, rank)
    read = trace.along(value, axis, _elsewhere(layer))
    made = trace.fresh(layer, "filters", layer.filters)
    trace.lay(layer, "kernel", rank - 1, CONSUMES, read)
    trace.lay(layer, "kernel", rank - 2, PRODUCES, made)
    _resize(trace, layer, filters=made)
    return [_finish(trace, layer, made, len(value.shape), axis)]


def _depthwise(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    layer, (value,) = call.operation, call.inputs
    rank = len(layer.kernel.shape)
    axis = _channel_axis(layer, rank)
    read = trace.along(value, axis, _elsewhere(layer))
    trace.lay(layer, "kernel", rank - 2, CARRIES, read)
    carried = np.repeat(read, layer.depth_multiplier)
    return [_finish(trace, layer, carried, len(value.shape), axis)]


def _separable(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    layer, (value,) = call.operation, call.inputs
    rank = len(layer.pointwise_kernel.shape)
    axis = _channel_axis(layer, rank)
    read = trace.along(value, axis, _elsewhere(layer))
    made = trace.fresh(layer, "filters", layer.filters)
    trace.lay(layer, "depthwise_kernel", rank - 2, CONSUMES, read)
    trace.lay(
        layer, "pointwise_kernel", rank - 2, CONSUMES, np.repeat(read, layer.depth_multiplier)
    )
    trace.lay(layer, "pointwise_kernel", rank - 1, PRODUCES, made)
    _resize(trace, layer, filters=made)
    return [_finish(trace, layer, made, len(value.shape), axis)]


def _dense(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    layer, (value,) = call.operation, call.inputs
    read = trace.along(value, -1, _elsewhere(layer))
    made = trace.fresh(layer, "units", layer.units)
    trace.lay(layer, "kernel", 0, CONSUMES, read)
    trace.lay(layer, "kernel", 1, PRODUCES, made)
    _resize(trace, layer, units=made)
    return [_finish(trace, layer, made, len(value.shape), -1)]


def _embedding(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    layer, (value,) = call.operation, call.inputs
    trace.fix([value], _elsewhere(layer))
    made = trace.fresh(layer, "output_dim", layer.output_dim)
    trace.lay(layer, "embeddings", 1, PRODUCES, made)
    _resize(trace, layer, output_dim=made)
    return [placed(made, len(value.shape) + 1, -1)]


# Recurrent layers: (class, gates side by side in the kernels)
_GATES = ((layers.LSTM, 4), (layers.GRU, 3), (layers.SimpleRNN, 1))


def _recurrent(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    layer = call.operation
    sequence, *states = call.inputs
    made = trace.fresh(layer, "units", layer.units)
    _lay_recurrent(trace, layer, layer, made, sequence)
    for state in states:
        trace.units.unite(trace.along(state, -1, _elsewhere(layer)), made)
    _resize(trace, layer, units=made)
    return [placed(made, len(shape), -1) for shape in call.outputs]


def _bidirectional(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    layer = call.operation
    inner = (layer.forward_layer, layer.backward_layer)
    plain = all(isinstance(one, tuple(kind for kind, _ in _GATES)) for one in inner)
    same = plain and inner[0].units == inner[1].units
    if not same or len(call.inputs) != 1 or len(call.outputs) != 1:
        return _unknown(trace, call)
    made = trace.fresh(layer, "units", inner[0].units)
    for one in inner:
        _lay_recurrent(trace, layer, one, made, call.inputs[0])

    def resize(config: dict[str, Any], kept: Callable[[Labels], int]) -> None:
        for name in ("layer", "backward_layer"):
            if config.get(name):
                config[name]["config"]["units"] = kept(made)
                # Else the inner layer would come built for the input that it had.
                config[name].pop("build_config", None)

    trace.resizes[id(layer)] = resize
    ndim = len(call.outputs[0])
    labels = np.concatenate([made, made]) if layer.merge_mode == "concat" else made
    return [placed(labels, ndim, -1)]


def _lay_recurrent(
    trace: Trace, holder: Any, layer: keras.layers.RNN, made: Labels, sequence: Channels
) -> None:
    gates = next(count for kind, count in _GATES if isinstance(layer, kind))
    read = trace.along(sequence, -1, _elsewhere(holder))
    own = {id(variable) for variable in layer.weights}
    for key, variable in weight_keys(holder).items():
        if id(variable) not in own:
            continue
        name = key.rsplit("/", 1)[-1]
        if name == "kernel":
            trace.lay(holder, key, 0, CONSUMES, read)
        if name == "recurrent_kernel":
            trace.lay(holder, key, 0, CONSUMES, made)
        role = PRODUCES if name == "kernel" else CARRIES
        trace.lay(holder, key, len(variable.shape) - 1, role, np.tile(made, gates))
    _fix_unless_elementwise(trace, made, layer.activation, holder)


def _attention(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    """Multi-head attention: heads inside, the query's width outside."""
    layer = call.operation
    names = ("query", "value", "key")
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    query, value = given["query"], given["value"]
    key = given["key"] if given.get("key") is not None else value
    others = [v for v in call.inputs if all(v is not one for one in (query, value, key))]
    trace.fix(others, _elsewhere(layer))
    if len(call.outputs) != 1 or any(len(v.shape) != 3 for v in (query, value, key)):
        return _unknown(trace, call)
    heads = trace.fresh(layer, "heads", layer.num_heads)
    made = trace.fresh(layer, "width", call.outputs[0][-1] or 1)
    for name, read in (("query", query), ("key", key), ("value", value)):
        trace.lay(layer, f"{name}/kernel", 0, CONSUMES, trace.along(read, -1, _elsewhere(layer)))
        trace.lay(layer, f"{name}/kernel", 1, PRODUCES if name == "value" else CARRIES, heads)
        if layer.use_bias:
            trace.lay(layer, f"{name}/bias", 0, CARRIES, heads)
    trace.lay(layer, "attention_output/kernel", 0, CONSUMES, heads)
    trace.lay(layer, "attention_output/kernel", 2, PRODUCES, made)
    if layer.use_bias:
        trace.lay(layer, "attention_output/bias", 0, CARRIES, made)

    def resize(config: dict[str, Any], kept: Callable[[Labels], int]) -> None:
        config["num_heads"] = kept(heads)
        config["output_shape"] = (kept(made),)

    trace.resizes[id(layer)] = resize
    return [placed(made, 3, -1)]


# Layers that pass channels on


def _batch_norm(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    layer, value = call.operation, call.inputs[0]
    if len(call.inputs) > 1:  # a mask
        return _unknown(trace, call)
    labels = trace.along(value, layer.axis, _elsewhere(layer))
    for key in weight_keys(layer):
        trace.lay(layer, key, 0, CARRIES, labels)
    return [placed(labels, len(value.shape), layer.axis)]


def _prelu(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    layer, (value,) = call.operation, call.inputs
    settled = trace.units.settle(value.labels)
    at = Channels(value.shape, value.dtype, settled).axis
    if at is not None and at not in (layer.shared_axes or []):
        trace.lay(layer, "alpha", at - 1, CARRIES, trace.along(value, at, _elsewhere(layer)))
    return [value.labels]


def _activation(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    layer, (value,) = call.operation, call.inputs
    _fix_unless_elementwise(trace, value.labels, layer.activation, layer)
    return [value.labels]


def _passed(trace: Trace, call: TracedCall) -> Sequence[Labels]:  # noqa: ARG001
    return [call.inputs[0].labels]


def _joined(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    """Layers and operations that combine tensors place by place, with broadcasting."""
    shape = call.outputs[0]
    ndim = len(shape)
    values = [_padded(value, ndim) for value in call.inputs]
    settled = [Channels(v.shape, v.dtype, trace.units.settle(v.labels)) for v in values]
    axes = {value.axis for value in settled if value.axis is not None}
    if len(axes) != 1:
        trace.fix(settled, f"{call.operation.name!r} joins channels along several axes")
        return [constant(ndim)]
    axis = next(iter(axes))
    joined: Labels | None = None
    for value in settled:
        if value.shape[axis] == 1:  # stretched over all channels
            trace.fix([value], f"{call.operation.name!r} stretches it over all channels")
            continue
        labels = trace.along(value, axis, _elsewhere(call.operation))
        if joined is None:
            joined = labels
        trace.units.unite(joined, labels)
    if joined is None or joined.size == 1:
        return [constant(ndim)]
    if _has_array(call, axis - ndim):
        trace.units.fix(joined, f"{call.operation.name!r} has a constant for each channel")
    return [placed(joined, ndim, axis)]


def _unknown(trace: Trace, call: TracedCall) -> Sequence[Labels]:
    """Whatever is not known channel by channel keeps all that it reads."""
    kind = type(call.operation).__name__
    trace.fix(call.inputs, f"{kind} {call.operation.name!r} is not computed channel by channel")
    return [constant(len(shape)) for shape in call.outputs]


_Layers = Sequence[tuple[type | tuple[type, ...], Rule]]
_LAYERS: _Layers = (
    ((layers.DepthwiseConv1D, layers.DepthwiseConv2D), _depthwise),
    ((layers.SeparableConv1D, layers.SeparableConv2D), _separable),
    (
        (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose),
        _transposed_convolution,
    ),
    ((layers.Conv1D, layers.Conv2D, layers.Conv3D), _convolution),
    (layers.Dense, _dense),
    (layers.Embedding, _embedding),
    (tuple(kind for kind, _ in _GATES), _recurrent),
    (layers.Bidirectional, _bidirectional),
    (layers.MultiHeadAttention, _attention),
    (layers.BatchNormalization, _batch_norm),
    (layers.PReLU, _prelu),
    (layers.Activation, _activation),
    (
        (
            layers.ReLU,
            layers.LeakyReLU,
            layers.ELU,
            layers.Identity,
            layers.Dropout,
            layers.SpatialDropout1D,
            layers.SpatialDropout2D,
            layers.SpatialDropout3D,
            layers.GaussianDropout,
            layers.GaussianNoise,
            layers.ActivityRegularization,
        ),
        _passed,
    ),
    (
        (
            layers.Add,
            layers.Subtract,
            layers.Multiply,
            layers.Average,
            layers.Maximum,
            layers.Minimum,
        ),
        _joined,
    ),
)


# Parts


def _channel_axis(layer: Any, rank: int) -> int:
    return 1 if layer.data_format == "channels_first" else rank - 1


def _elsewhere(operation: Any) -> str:
    kind = type(operation).__name__
    return f"{kind} {operation.name!r} reads it along another axis than that of its channels"


def _resize(trace: Trace, layer: Any, **sizes: Labels) -> None:
    def resize(config: dict[str, Any], kept: Callable[[Labels], int]) -> None:
        config.update({name: kept(labels) for name, labels in sizes.items()})

    trace.resizes[id(layer)] = resize


def _finish(trace: Trace, layer: Any, labels: Labels, ndim: int, axis: int) -> Labels:
    """Lays the bias along what a layer gives, and returns its output's labels."""
    if layer.use_bias:
        trace.lay(layer, "bias", 0, CARRIES, labels)
    _fix_unless_elementwise(trace, labels, layer.activation, layer)
    return placed(labels, ndim, axis)


def _fix_unless_elementwise(trace: Trace, labels: Labels, activation: Any, layer: Any) -> None:
    name = getattr(activation, "__name__", None)
    known = name in _ELEMENTWISE and getattr(keras.activations, name, None) is activation
    if isinstance(activation, keras.layers.Layer):
        name = activation.name
        known = isinstance(activation, (layers.ReLU, layers.LeakyReLU, layers.ELU))
    if activation is not None and not known:
        trace.units.fix(
            labels, f"the activation {name!r} of {layer.name!r} is not known channel by channel"
        )


def _tied(trace: Trace, labels: Labels, groups: int) -> Labels:
    """Unites the k-th channel of every group, and returns those of one."""
    table = labels.reshape(groups, -1)
    trace.units.unite(np.broadcast_to(table[:1], table.shape), table)
    return table[0]


def _padded(value: Channels, ndim: int) -> Channels:
    missing = (1,) * (ndim - len(value.shape))
    return Channels(
        (*missing, *value.shape), value.dtype, value.labels.reshape(*missing, *value.labels.shape)
    )


def _has_array(call: TracedCall, axis: int) -> bool:
    leaves = keras.tree.flatten((call.args, call.kwargs))
    arrays = [leaf for leaf in leaves if not isinstance(leaf, Channels) and np.ndim(leaf) >= -axis]
    return any(np.shape(array)[axis] != 1 for array in arrays)
