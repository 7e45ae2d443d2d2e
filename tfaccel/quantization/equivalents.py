"""Layers written as others that compute the same and that the runtime has integers for.

Built-in activations become layers of their own, a separable convolution its two halves, swish a
product, and Rescaling and batch normalization that stands alone become 1x1 depthwise convolutions:
one factor for each channel, which is exact on an 8-bit grid of its own. Normalization of layers,
attention and recurrence are written out, see `composites` and `recurrent_steps`.
"""

from collections.abc import Callable, Collection
from typing import Any

import keras
import numpy as np
from keras import layers

from tfaccel.core.cloning import clone_built, clone_operation
from tfaccel.core.graph import Graph, Node, map_models
from tfaccel.core.names import FreeNames
from tfaccel.core.transforms import TransformedLayer, wrap_layer
from tfaccel.quantization.composites import Attention, Composite, Normalization
from tfaccel.quantization.operators import (
    KERNEL_AXES,
    RELUS,
    TRANSPOSED,
    activation_name,
    activation_of,
    folds_into,
    inner_layer,
    is_batch_norm,
)
from tfaccel.quantization.recurrent_steps import Recurrence

_COMPOSITES: dict[type, type[Composite]] = {
    layers.Bidirectional: Recurrence,
    layers.GRU: Recurrence,
    layers.LSTM: Recurrence,
    layers.LayerNormalization: Normalization,
    layers.MultiHeadAttention: Attention,
}
_HALVES: dict[type, tuple[type, type]] = {
    layers.SeparableConv1D: (layers.DepthwiseConv1D, layers.Conv1D),
    layers.SeparableConv2D: (layers.DepthwiseConv2D, layers.Conv2D),
}
_DEPTHWISE: dict[int, type] = {3: layers.DepthwiseConv1D, 4: layers.DepthwiseConv2D}  # by rank


def has_kernels(layer: keras.layers.Layer) -> bool:
    """Whether a layer has kernels that are rounded, as it is or in the parts it is written as."""
    rounded = type(layer) in KERNEL_AXES or type(layer) in _HALVES
    return rounded or _COMPOSITES.get(type(layer)) in (Recurrence, Attention)


def _fused_with(layer: keras.layers.Layer) -> tuple[str, ...]:
    """Returns the built-in activations that the runtime computes in one operator with a layer."""
    return ("linear",) if isinstance(layer, TRANSPOSED) else ("linear", *RELUS)


class Rewriter:
    """Writes the layers of one graph so that the runtime can compute them in integers.

    Args:
        graph: edited by `rewrite`.
        skipped: ids of the layers that stay as they are.
        free_name: makes a name that no layer has.
        masked: whether the model has masks, which layers pass on where the graph does not show it.
        wide: whether values have 16 bits.

    Attributes:
        exact: ids of the layers made here whose kernels are exact on their grid as they are.
        refusals: for layers that could have been written out but for this call, by id, the reason.
        origins: for names made here, the layer that the new one is a part of.
    """

    def __init__(
        self,
        graph: Graph,
        skipped: set[int],
        free_name: Callable[[str], str],
        *,
        masked: bool = False,
        wide: bool = False,
    ) -> None:
        self._graph = graph
        self._skipped = skipped
        self._make_name = free_name
        self._masked = masked
        self._wide = wide
        self._current = ""
        self.exact: set[int] = set()
        self.refusals: dict[int, str] = {}
        self.origins: dict[str, str] = {}

    def _free_name(self, wanted: str) -> str:
        name = self._make_name(wanted)
        self.origins[name] = self._current
        return name

    def rewrite(self) -> None:
        """Edits the graph."""
        for layer in self._graph.layers():
            inner = layer.layer if isinstance(layer, TransformedLayer) else layer
            self._current = layer.name
            if id(inner) in self._skipped:
                continue
            if type(inner) in _COMPOSITES:
                self._write_out(layer)
            elif type(layer) in _HALVES:
                self._split_separable(layer)
            elif type(inner) in KERNEL_AXES and activation_name(inner) not in _fused_with(inner):
                self._split_activation(layer, inner)
        for node in list(self._graph.nodes):
            if id(inner_layer(node)) in self._skipped:
                continue
            self._current = self.origins.get(node.name, node.name)
            if activation_of(node) == "silu":
                self._split_swish(node)
            elif type(node.layer) is layers.Rescaling:
                self._replace_rescaling(node)
            elif is_batch_norm(node):
                self._lead_norm(node)

    def _write_out(self, layer: Any) -> None:
        """Writes a layer as several, or says why not."""
        calls = self._graph.calls(layer)
        composite = _COMPOSITES.get(type(layer))
        if composite is None:
            reason = "pruned already; prune after quantize_aware()"
            self.refusals[id(layer.layer)] = f"{type(layer.layer).__name__} that is {reason}"
            return
        made = composite(layer, self._free_name, self.exact)
        kind = type(layer).__name__
        reason = f"{kind} that is called more than once" if len(calls) > 1 else ""
        if self._masked and composite is not Normalization:
            reason = f"{kind} in a model with masks"
        if self._wide:
            reason = f"{kind} in 16 bits"
        reason = reason or made.refusal(calls[0])
        if reason:
            self.refusals[id(layer)] = reason
        else:
            made.apply(self._graph, calls[0])

    def _split_separable(self, layer: Any) -> None:
        depthwise, pointwise = _halves_of(layer, self._free_name(f"{layer.name}_depthwise"))
        self._graph.replace_layer(layer, pointwise)
        for node in self._graph.calls(pointwise):
            self._graph.insert_before(node, node.inputs[0], depthwise)
        if activation_name(pointwise) not in ("linear", *RELUS):
            self._split_activation(pointwise, pointwise)

    def _split_activation(self, layer: keras.layers.Layer, inner: Any) -> None:
        """Takes a built-in activation that the runtime computes apart out of its layer."""
        plain = _without_activation(inner)
        new = plain if layer is inner else wrap_layer(layer, {}, inner=plain)
        self._graph.replace_layer(layer, new)
        activation = _as_layer(inner, self._free_name(f"{inner.name}_activation"))
        for node in self._graph.calls(new):
            self._graph.insert_after(node.outputs[0], activation)

    def _split_swish(self, node: Node) -> None:
        """Writes x * sigmoid(x), as the runtime does, so that the sigmoid is rounded too."""
        operation = node.operation
        dtype = node.layer.dtype_policy if node.layer else None
        product = layers.Multiply(name=operation.name, dtype=dtype)
        sigmoid = layers.Activation(
            "sigmoid", name=self._free_name(f"{operation.name}_sigmoid"), dtype=dtype
        )
        self._graph.replace_layer(operation, product)
        for call in self._graph.calls(product):
            (x,) = call.inputs
            call.args, call.kwargs = ([x, self._graph.insert_after(x, sigmoid, [])],), {}

    def _replace_rescaling(self, node: Node) -> None:
        layer: Any = node.layer
        inputs = [call.inputs[0] for call in self._graph.calls(layer)]
        rank, channels = len(inputs[0].shape), inputs[0].shape[-1]
        alike = all(
            x.dtype.startswith(("float", "bfloat"))
            and (len(x.shape), x.shape[-1]) == (rank, channels)
            for x in inputs
        )
        factors = [np.asarray(value, "float32") for value in (layer.scale, layer.offset)]
        if alike and all(f.ndim == 0 or f.shape == (channels,) for f in factors):
            scale, offset = (np.broadcast_to(f, (channels or 0,)) for f in factors)
            depthwise = _factors(layer, layer.name, rank, scale, offset)
            if depthwise is not None:
                self._graph.replace_layer(layer, depthwise)
                self.exact.add(id(depthwise))

    def _lead_norm(self, node: Node) -> None:
        """Gives batch normalization that stands alone a convolution to be folded into."""
        norm: Any = node.layer
        x = node.inputs[0]
        if folds_into(self._graph, node, self._graph.producer(x)):
            return
        if len(self._graph.calls(norm)) > 1:
            return
        ones = np.ones(x.shape[-1] or 0, "float32")
        name = self._free_name(f"{norm.name}_depthwise")
        depthwise = _factors(norm, name, len(x.shape), ones, None)
        if depthwise is not None:
            self._graph.insert_before(node, x, depthwise)
            self.exact.add(id(depthwise))


def rewritten(
    model: keras.Model, skipped: Collection[int] = (), *, masked: bool = False, wide: bool = False
) -> keras.Model:
    """Returns a model whose layers are written as `quantize` writes them, and nothing rounded.

    Args:
        model: a built Functional or Sequential model; not changed.
        skipped: ids of the layers that stay as they are.
        masked: as in `Rewriter`.
        wide: as in `Rewriter`.
    """

    def edit(graph: Graph) -> None:
        names = FreeNames(node.name for node in graph.nodes)
        Rewriter(graph, set(skipped), names, masked=masked, wide=wide).rewrite()

    return map_models(model, edit)


def _without_activation(layer: Any) -> Any:
    """Returns a built copy of a layer with a kernel, its activation linear."""
    plain: Any = type(layer).from_config({**layer.get_config(), "activation": "linear"})
    plain.build_from_config(layer.get_build_config())
    pairs = [(layer.kernel, plain.kernel)]
    if layer.use_bias:
        pairs.append((layer.bias, plain.bias))
    plain.trainable = layer.trainable
    for old, new in pairs:
        new.assign(keras.ops.copy(old.value))
        new.trainable = old.trainable
    return plain


def _as_layer(layer: Any, name: str) -> keras.layers.Layer:
    """Returns the built-in activation of a layer as a layer of its own."""
    activation = layer.activation
    if not isinstance(activation, keras.layers.Layer):
        return layers.Activation(activation, dtype=layer.dtype_policy, name=name)
    copy = clone_built(activation) if activation.built else clone_operation(activation)
    copy.name = name
    return copy


def _factors(
    layer: keras.layers.Layer, name: str, rank: int, scale: Any, offset: Any
) -> keras.layers.Layer | None:
    """Returns a convolution that computes scale * x + offset for each channel, and stays so.

    Returns None where there is no such convolution, or where the channels are not known.
    """
    if rank not in _DEPTHWISE or not len(scale):
        return None
    depthwise = _DEPTHWISE[rank](
        1,
        use_bias=offset is not None,
        data_format="channels_last",
        dtype=layer.dtype_policy,
        name=name,
        trainable=False,
    )
    depthwise.build((*(None,) * (rank - 1), len(scale)))
    depthwise.kernel.assign(np.reshape(scale, depthwise.kernel.shape))
    if offset is not None:
        depthwise.bias.assign(offset)
    return depthwise


def _halves_of(layer: Any, depthwise_name: str) -> tuple[Any, Any]:
    """Returns a depthwise and a pointwise convolution that together are the separable one."""
    config = layer.get_config()
    common = {"dtype": layer.dtype_policy, "data_format": layer.data_format}
    depthwise_class, pointwise_class = _HALVES[type(layer)]
    depthwise = depthwise_class(
        layer.kernel_size if len(layer.kernel_size) > 1 else layer.kernel_size[0],
        strides=layer.strides if len(layer.strides) > 1 else layer.strides[0],
        padding=layer.padding,
        depth_multiplier=layer.depth_multiplier,
        dilation_rate=layer.dilation_rate
        if len(layer.dilation_rate) > 1
        else layer.dilation_rate[0],
        depthwise_regularizer=config["depthwise_regularizer"],
        depthwise_constraint=config["depthwise_constraint"],
        use_bias=False,
        name=depthwise_name,
        **common,
    )
    pointwise = pointwise_class(
        layer.filters,
        1,
        activation=layer.activation,
        use_bias=layer.use_bias,
        kernel_regularizer=config["pointwise_regularizer"],
        kernel_constraint=config["pointwise_constraint"],
        bias_regularizer=config["bias_regularizer"],
        bias_constraint=config["bias_constraint"],
        activity_regularizer=config["activity_regularizer"],
        name=layer.name,
        **common,
    )
    kernels = layer.depthwise_kernel, layer.pointwise_kernel
    for half, kernel in zip((depthwise, pointwise), kernels, strict=True):
        half.build((*(None,) * (len(kernel.shape) - 1), kernel.shape[-2]))
        half.kernel.assign(keras.ops.copy(kernel.value))
    if layer.use_bias:
        pointwise.bias.assign(keras.ops.copy(layer.bias.value))
    depthwise.trainable = pointwise.trainable = layer.trainable
    return depthwise, pointwise
