"""`low_bit` makes a model that trains with weights of one or two bits, and signs for inputs."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tfaccel.core.checks import check_model, check_type
from tfaccel.core.cloning import clone_operation
from tfaccel.core.graph import Graph, flat_layers, map_models
from tfaccel.core.names import FreeNames
from tfaccel.core.nodes import Node, swap
from tfaccel.core.selection import Choice, Selector, select_layers
from tfaccel.core.transforms import PRUNE, TransformedLayer, transformed_layers, wrap_layer
from tfaccel.quantization.binary_layers import Binarize, InputScale
from tfaccel.quantization.ends import layers_at_ends
from tfaccel.quantization.low_bit_weights import LOW_BIT, LowBitWeights

_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
# The authors' code has these, and few steps are enough for a mean of 0.9.
_NORM = {"momentum": 0.9, "epsilon": 1e-4}


def low_bit(
    model: keras.Model,
    how: str | LowBitWeights = "xnor",
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    batch_norm: bool = True,
    seed: int | None = None,
) -> keras.Model:
    """Returns a model that computes with weights of two or three values.

    Compile and fit the result, then take `tfaccel.strip(result)`, or `save_packed` for a file with
    one or two bits a weight. Outputs change a lot at first: the weights are a start for training.
    Methods with binary inputs can compute in bits on a CPU: `PackedNetwork`.

    Where inputs become signs, the order is the paper's: batch norm, sign, layer. A ReLU right in
    front is skipped, as all signs behind it would be +1, and batch norm is put where there is none,
    so that about half of the signs are -1.

    Args:
        model: a built Functional or Sequential model; not changed.
        how: "binary_connect" (weights ±1), "binary_net" (weights and inputs ±1), "xnor" (weights ±a
            for each output channel, inputs ±1), "twn" (weights -a, 0, a), "ttq" (weights -n, 0, p,
            both trained), or an instance such as `XNORNet(input_scale=True)`.
        include: layers to transform (names, patterns, predicate), whatever their place. By default
            dense layers and convolutions, without the first and the last layer with a kernel and
            without depthwise kernels; `low_bit_plan` says which and why.
        exclude: layers to leave alone.
        batch_norm: whether batch norm is put in front of a sign that has none.
        seed: for methods that draw lots.

    Returns:
        The rewritten model, weights carried over.

    Raises:
        TypeError: the model is subclassed.
        ValueError: the model is not built, the method is not known, a selector matches nothing,
            there is nothing to transform, a layer is of low bits already, or binary weights are to
            stand for pruned ones, which need a zero.

    References:
        Courbariaux et al. 2015, BinaryConnect; Hubara et al. 2016, Binarized Neural Networks;
        Rastegari et al. 2016, XNOR-Net; Li & Liu 2016, Ternary Weight Networks; Zhu et al. 2017,
        Trained Ternary Quantization.
    """
    check_model(model, "low_bit")
    method = LOW_BIT.get(how)
    choices = low_bit_plan(model, method, include=include, exclude=exclude)
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    check_type("seed", seed, (int, np.integer))
    chosen = [choice.layer for choice in choices if choice.chosen]
    if not chosen:
        reasons = "; ".join(f"{c.layer.name}: {c.reason}" for c in choices if c.layer.weights)
        raise ValueError(
            f"low_bit() found nothing to transform in {model.name!r} "
            f"({reasons or 'no layer has weights'}). Name the layers with include=."
        )
    _check_earlier_transforms(model, method, chosen)
    seeds = np.random.SeedSequence(int(seed)).generate_state(len(chosen)) % 2**31
    rewriter = _Rewriter(
        {
            id(layer): method.copy_for(_output_axes(layer), int(number))
            for layer, number in zip(chosen, seeds, strict=True)
        },
        batch_norm,
        {layer.name for layer in flat_layers(model)},
    )
    return map_models(model, rewriter.edit)


def low_bit_plan(
    model: keras.Model,
    how: str | LowBitWeights = "xnor",
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
) -> list[Choice]:
    """Returns for each layer whether `low_bit` would transform it, and why.

    Args:
        model: a built Functional or Sequential model; not changed.
        how: as in `low_bit`.
        include: as in `low_bit`.
        exclude: as in `low_bit`.
    """
    check_model(model, "low_bit_plan")
    method = LOW_BIT.get(how)
    first, last = layers_at_ends(model, _has_kernel)
    choices = []
    for choice in select_layers(model, include, exclude):
        layer = choice.layer
        reason = _why_not(layer, method) if choice.chosen else choice.reason
        if not reason and choice.reason == "default":
            if id(layer) in first:
                reason = "first layer: few weights, and all else rests on what it makes of the data"
            elif id(layer) in last:
                reason = "last layer: few weights, and its outputs are the model's"
            elif isinstance(layer, _DEPTHWISE):
                reason = "depthwise kernel: a handful of weights per channel"
            elif not layer.trainable:
                reason = "frozen: its weights do not train"
        if reason:
            choices.append(Choice(layer, False, reason))
        else:
            count = int(np.prod(layer.kernel.shape))
            choices.append(Choice(layer, True, f"kernel: {count} weights"))
    return choices


def _why_not(layer: keras.layers.Layer, method: LowBitWeights) -> str:
    kernels = (keras.layers.Dense, *_CONVOLUTIONS, *_TRANSPOSED, *_DEPTHWISE)
    if not isinstance(layer, kernels):
        return "no kernel of a dense layer or convolution" if layer.weights else "no weights"
    if not method.input_scale:
        return ""
    if not isinstance(layer, (keras.layers.Dense, *_CONVOLUTIONS)):
        return f"no input scale is defined for {type(layer).__name__}"
    special = getattr(layer, "groups", 1) > 1 or (
        isinstance(layer, _CONVOLUTIONS)
        and (layer.data_format != "channels_last" or layer.padding == "causal")
    )
    return "no input scale for groups, channels_first or causal padding" if special else ""


def _output_axes(layer: keras.layers.Layer) -> tuple[int, ...]:
    if isinstance(layer, _DEPTHWISE):
        return (-2, -1)
    return (-2,) if isinstance(layer, _TRANSPOSED) else (-1,)


def _check_earlier_transforms(
    model: keras.Model, method: LowBitWeights, chosen: list[keras.layers.Layer]
) -> None:
    for layer in transformed_layers(model):
        if not any(layer.layer is inner for inner in chosen):
            continue
        for _, transform in layer.transforms:
            kind = type(transform).__name__
            if isinstance(transform, LowBitWeights):
                raise ValueError(  # noqa: TRY004 (the model is of the right type)
                    f"Layer {layer.name!r} is of low bits already ({kind}). "
                    "Strip the model first (tfaccel.strip), or exclude this layer."
                )
            if transform.stage == PRUNE and method.bits == 1:
                raise ValueError(
                    f"Layer {layer.name!r} is pruned ({kind}), but a weight of one bit cannot be "
                    "zero. Take how='twn' or 'ttq', or exclude this layer."
                )


def _has_kernel(layer: keras.layers.Layer) -> bool:
    return any(len(weight.shape) > 1 for weight in layer.weights)


@dataclasses.dataclass
class _Parts:
    """What takes the place of one layer, wherever it is called."""

    layer: keras.layers.Layer
    norm: keras.layers.Layer | None = None
    binarize: keras.layers.Layer | None = None
    scale: keras.layers.Layer | None = None
    activation: keras.layers.Layer | None = None


class _Rewriter:
    """Edits the graphs of a model and its nested models; a shared layer gets one set of parts."""

    def __init__(
        self, transforms: dict[int, LowBitWeights], batch_norm: bool, names: set[str]
    ) -> None:
        self._transforms = transforms
        self._batch_norm = batch_norm
        self._free_name = FreeNames(names)
        self._made: dict[int, _Parts] = {}

    def edit(self, graph: Graph) -> None:
        """Transforms the chosen layers of one graph."""
        for layer, inner in list(_with_inner(graph)):
            transform = self._transforms.get(id(inner))
            if transform is None:
                continue
            if id(inner) not in self._made:
                self._made[id(inner)] = self._make(layer, inner, transform)
            parts = self._made[id(inner)]
            nodes = graph.calls(layer)
            graph.replace_layer(layer, parts.layer)
            for node in nodes:
                if parts.binarize is not None:
                    self._feed_signs(graph, node, parts)

    def _make(self, layer: keras.layers.Layer, inner: Any, transform: LowBitWeights) -> _Parts:
        bare = None
        policy = {"dtype": inner.dtype_policy}
        if transform.input_scale:
            bare = _without_bias(inner)
        parts = _Parts(wrap_layer(layer, {"kernel": transform}, bare))
        if transform.binary_inputs:
            parts.binarize = Binarize(name=self._free_name(f"{layer.name}_sign"), **policy)
            parts.norm = keras.layers.BatchNormalization(
                name=self._free_name(f"{layer.name}_norm"),
                axis=_channel_axis(inner),
                **_NORM,
                **policy,
            )
        if bare is not None:
            parts.scale = _scale_for(self._free_name(f"{layer.name}_scale"), inner)
            if inner.activation is not keras.activations.linear:
                parts.activation = keras.layers.Activation(
                    inner.activation,
                    name=self._free_name(f"{layer.name}_activation"),
                    **policy,
                )
        return parts

    def _feed_signs(self, graph: Graph, node: Node, parts: _Parts) -> None:
        tensor = node.inputs[0]
        before = graph.producer(tensor)
        if _keeps_no_sign(before):
            node.args, node.kwargs = (
                swap(tree, tensor, before.inputs[0]) for tree in (node.args, node.kwargs)
            )
            tensor = before.inputs[0]
        normal = isinstance(graph.producer(tensor).operation, keras.layers.BatchNormalization)
        if self._batch_norm and not normal:
            tensor = graph.insert_before(node, tensor, parts.norm)
        graph.insert_before(node, tensor, parts.binarize)
        if parts.scale is not None:
            scaled = graph.insert_after(node.outputs[0], parts.scale)
            graph.producer(scaled).args = ([node.outputs[0], tensor],)
            if parts.activation is not None:
                graph.insert_after(scaled, parts.activation)


def _with_inner(graph: Graph) -> Iterator[tuple[keras.layers.Layer, keras.layers.Layer]]:
    for layer in graph.layers():
        yield layer, layer.layer if isinstance(layer, TransformedLayer) else layer


def _keeps_no_sign(node: Node) -> bool:
    """Whether a call is a ReLU or a kin: its output says no more of the sign than its input."""
    operation = node.operation
    if len(node.inputs) != 1:
        return False
    if isinstance(operation, keras.layers.Activation):
        return operation.activation in (keras.activations.relu, keras.activations.relu6)
    if isinstance(operation, keras.layers.ReLU):
        return not operation.threshold
    # Functional operations have no public class: keras.ops.relu(x) makes a "Relu".
    return isinstance(operation, keras.layers.LeakyReLU) or (
        node.layer is None and type(operation).__name__ in ("Relu", "Relu6")
    )


def _channel_axis(inner: Any) -> int:
    return 1 if getattr(inner, "data_format", None) == "channels_first" else -1


def _without_bias(inner: Any) -> keras.layers.Layer:
    config = {**inner.get_config(), "use_bias": False, "activation": "linear"}
    bare = clone_operation(inner, config)
    bare.build(inner.get_build_config()["input_shape"])
    bare.kernel.assign(keras.ops.copy(inner.kernel.value))
    return bare


def _scale_for(name: str, inner: Any) -> InputScale:
    window: dict[str, Any] = {}
    if isinstance(inner, _CONVOLUTIONS):
        fields = ("kernel_size", "strides", "padding", "dilation_rate")
        window = {field: getattr(inner, field) for field in fields}
    scale = InputScale(**window, use_bias=inner.use_bias, dtype=inner.dtype_policy, name=name)
    shape = inner.get_build_config()["input_shape"]
    scale.build([inner.compute_output_shape(shape), shape])
    if scale.bias is not None:
        scale.bias.assign(keras.ops.copy(inner.bias.value))
    return scale
