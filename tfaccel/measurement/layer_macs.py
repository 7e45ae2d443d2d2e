"""Multiply-accumulates of Keras layers and operations, by shapes alone."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import keras
from keras import layers

from tfaccel.core import keras_private
from tfaccel.core.cloning import clone_built
from tfaccel.core.transforms import TransformedLayer
from tfaccel.core.walking import walk_shapes
from tfaccel.measurement.einsum_macs import macs_of_einsum, macs_of_tensordot

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer or of a functional operation, batch dimension included.

    Attributes:
        operation: what is called.
        args: positional arguments, a tree in which each tensor is a `keras.KerasTensor`.
        kwargs: keyword arguments, likewise.
        outputs: shapes of what comes out.
    """

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Shape, ...]

    @property
    def inputs(self) -> list[Shape]:
        """Shapes of all tensors that go in, constants and variables too, positional ones first."""
        leaves = keras.tree.flatten((self.args, self.kwargs))
        return [tuple(leaf.shape) for leaf in leaves if hasattr(leaf, "shape")]

    @property
    def known(self) -> bool:
        """Whether every size is known."""
        return all(size is not None for shape in (*self.inputs, *self.outputs) for size in shape)

    def shape(self, place: int, name: str, default: Shape | None = None) -> Shape:
        """Returns the shape of the argument that is given by place or by name."""
        value: Any = self.args[place] if place < len(self.args) else self.kwargs.get(name)
        if value is None and default is not None:
            return default
        return tuple(value.shape)

    def through(self, operation: Any) -> "Call":
        """Returns the same call of another operation."""
        return dataclasses.replace(self, operation=operation)


def walk_macs(
    model: keras.Model, inputs: Sequence[keras.KerasTensor]
) -> Iterator[tuple[Call, int | None]]:
    """Yields each call that a model makes, those of nested models in their place, and its MACs.

    Args:
        model: a model with a graph.
        inputs: one for each input of the model, batch dimension included; other sizes may be None.
    """
    for visit in walk_shapes(model, inputs):
        shapes = tuple(tuple(output.shape) for output in visit.outputs)
        call = Call(visit.node.operation, visit.args, visit.kwargs, shapes)
        yield call, macs_of_call(call)


def macs_of_model(model: keras.Model, inputs: Sequence[keras.KerasTensor]) -> int | None:
    """Returns the MACs of one call of a model, None if a size that matters is not known."""
    total = 0
    for _, macs in walk_macs(model, inputs):
        if macs is None:
            return None
        total += macs
    return total


def macs_of_call(call: Call) -> int | None:
    """Returns the MACs of one call, None if a size that matters is not known."""
    operation = call.operation
    rule = _rule(operation)
    if rule is None:
        return 0
    return rule(call) if call.known else None


def _rule(operation: Any) -> Callable[[Call], int | None] | None:
    if hasattr(operation, "count_macs"):
        return _own_word
    if not isinstance(operation, layers.Layer):
        return _OPERATIONS.get(type(operation).__name__)
    for kinds, rule in _LAYERS:
        if isinstance(operation, kinds):
            return rule
    of_keras = type(operation).__module__.partition(".")[0] == "keras"
    has_kernels = any(len(weight.shape) > 1 for weight in operation.weights)
    return None if of_keras or not has_kernels else _look_inside


def _own_word(call: Call) -> int:
    shapes = call.inputs
    return int(call.operation.count_macs(shapes[0] if len(shapes) == 1 else shapes))


def _look_inside(call: Call) -> int | None:
    """Follows the call of a layer that is made of other layers or of operations on its weights."""

    def to_input(leaf: Any) -> Any:
        if _is_symbolic(leaf):
            return keras.Input(batch_shape=leaf.shape, dtype=leaf.dtype)
        return leaf

    args, kwargs = keras.tree.map_structure(to_input, (call.args, call.kwargs))
    inputs = [leaf for leaf in keras.tree.flatten((args, kwargs)) if _is_symbolic(leaf)]
    try:
        # A copy, since calls leave their traces on the layers inside.
        outputs = clone_built(call.operation).call(*args, **kwargs)
        return macs_of_model(keras.Model(inputs, outputs), inputs)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # its code does more than Keras operations on tensors


# Layers


def _dense(call: Call) -> int:
    return prod(call.outputs[0]) * call.inputs[0][-1]


def _conv(call: Call) -> int:
    layer = call.operation
    channels = _channels(layer, call.inputs[0])
    return prod(call.outputs[0]) * prod(layer.kernel_size) * channels // layer.groups


def _transposed_conv(call: Call) -> int:
    layer = call.operation
    return prod(call.inputs[0]) * prod(layer.kernel_size) * layer.filters


def _depthwise_conv(call: Call) -> int:
    return prod(call.outputs[0]) * prod(call.operation.kernel_size)


def _separable_conv(call: Call) -> int:
    layer = call.operation
    positions = prod(call.outputs[0]) // layer.filters
    between = _channels(layer, call.inputs[0]) * layer.depth_multiplier
    return positions * between * (prod(layer.kernel_size) + layer.filters)


def _einsum_dense(call: Call) -> int:
    return macs_of_einsum(call.operation.equation, [call.inputs[0], call.operation.kernel.shape])


def _multi_head_attention(call: Call) -> int:
    layer = call.operation
    query = call.shape(0, "query")
    value = call.shape(1, "value")
    key = call.shape(2, "key", default=value)
    positions_out = prod(query[:-1])
    # Attention runs along some of the axes and is repeated over the others.
    axes = layer.get_config()["attention_axes"] or range(1, len(query) - 1)
    attended = prod(value[axis] for axis in axes)
    heads, key_dim, value_dim = layer.num_heads, layer.key_dim, layer.value_dim
    projections = (
        prod(query) * heads * key_dim
        + prod(key) * heads * key_dim
        + prod(value) * heads * value_dim
        + prod(call.outputs[0]) * heads * value_dim
    )
    return projections + positions_out * attended * heads * (key_dim + value_dim)


def _grouped_query_attention(call: Call) -> int:
    layer = call.operation
    query = call.shape(0, "query")
    value = call.shape(1, "value")
    key = call.shape(2, "key", default=value)
    width = layer.num_query_heads * layer.head_dim
    shared = layer.num_key_value_heads * layer.head_dim
    projections = (
        prod(query) * width + (prod(key) + prod(value)) * shared + prod(call.outputs[0]) * width
    )
    return projections + prod(query[:-1]) * value[1] * width * 2


def _attention(call: Call) -> int:
    query, value, *rest = (tuple(tensor.shape) for tensor in call.args[0])
    key = rest[0] if rest else value
    return prod(query[:-1]) * value[-2] * (key[-1] + value[-1])


def _dot_layer(call: Call) -> int:
    axes = call.operation.axes
    axis = axes if isinstance(axes, int) else axes[0]
    return prod(call.outputs[0]) * call.inputs[0][axis]


def _recurrent(call: Call) -> int:
    batch, steps, *_ = call.inputs[0]
    return batch * steps * _kernel_size(call.operation.cell)


def _conv_recurrent(call: Call) -> int:
    layer = call.operation
    batch, steps, *_ = call.inputs[0]
    output = call.outputs[0][2:] if layer.return_sequences else call.outputs[0][1:]
    positions = prod(output) // layer.filters
    return batch * steps * positions * _kernel_size(layer.cell)


def _kernel_size(cell: layers.Layer) -> int:
    """Returns the size of a recurrent cell's kernels, each of which is used once in a step."""
    kernels = [w for w in cell.weights if len(w.shape) > 1 and not w.name.endswith("bias")]
    return sum(prod(kernel.shape) for kernel in kernels)


def _bidirectional(call: Call) -> int | None:
    layer = call.operation
    ways = (layer.forward_layer, layer.backward_layer)
    # What comes out of one way is not what comes out of both, but only its sizes in space are read.
    counts = [macs_of_call(call.through(way)) for way in ways]
    known = [macs for macs in counts if macs is not None]
    return sum(known) if len(known) == len(counts) else None


def _time_distributed(call: Call) -> int | None:
    inner = call.operation.layer
    batch, steps, *sample = call.inputs[0]
    step = keras.KerasTensor((batch, *sample), dtype=inner.compute_dtype)
    if keras_private.has_graph(inner):
        macs = macs_of_model(inner, [step])
    else:
        shapes = tuple((shape[0], *shape[2:]) for shape in call.outputs)
        macs = macs_of_call(Call(inner, (step,), {}, shapes))
    return None if macs is None else macs * steps


def _wrapped(call: Call) -> int | None:
    return macs_of_call(call.through(call.operation.layer))


def _channels(layer: Any, shape: Shape) -> int:
    return shape[1] if layer.data_format == "channels_first" else shape[-1]


_LAYERS: list[tuple[type | tuple[type, ...], Callable[[Call], int | None]]] = [
    (TransformedLayer, _wrapped),
    (layers.Dense, _dense),
    ((layers.Conv1D, layers.Conv2D, layers.Conv3D), _conv),
    ((layers.DepthwiseConv1D, layers.DepthwiseConv2D), _depthwise_conv),
    ((layers.SeparableConv1D, layers.SeparableConv2D), _separable_conv),
    ((layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose), _transposed_conv),
    (layers.EinsumDense, _einsum_dense),
    (layers.MultiHeadAttention, _multi_head_attention),
    (layers.GroupQueryAttention, _grouped_query_attention),
    (layers.Attention, _attention),
    (layers.Dot, _dot_layer),
    ((layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D), _conv_recurrent),
    (layers.RNN, _recurrent),
    (layers.Bidirectional, _bidirectional),
    (layers.TimeDistributed, _time_distributed),
    (layers.Wrapper, _wrapped),
]


# Functional operations, by the names of their classes


def _matmul(call: Call) -> int:
    return prod(call.outputs[0]) * call.inputs[0][-1]


def _einsum(call: Call) -> int:
    return macs_of_einsum(call.operation.subscripts, call.inputs)


def _tensordot(call: Call) -> int:
    return macs_of_tensordot(call.operation.axes, call.inputs[0], call.outputs[0])


def _conv_operation(call: Call) -> int:
    return prod(call.outputs[0]) * prod(call.inputs[1][:-1])


def _depthwise_operation(call: Call) -> int:
    return prod(call.outputs[0]) * prod(call.inputs[1][:-2])


def _transposed_operation(call: Call) -> int:
    return prod(call.inputs[0]) * prod(call.inputs[1][:-1])


def _attention_operation(call: Call) -> int:
    query, key, value = call.inputs[:3]  # [batch, length, heads, size]
    return prod(query[:-1]) * key[1] * (key[-1] + value[-1])


_OPERATIONS: dict[str, Callable[[Call], int | None]] = {
    "Conv": _conv_operation,
    "ConvTranspose": _transposed_operation,
    "DepthwiseConv": _depthwise_operation,
    "Dot": _matmul,
    "DotProductAttention": _attention_operation,
    "Einsum": _einsum,
    "Matmul": _matmul,
    "Tensordot": _tensordot,
}


def _is_symbolic(leaf: Any) -> bool:
    return isinstance(leaf, keras.KerasTensor)
