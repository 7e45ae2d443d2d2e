"""Classifier heads of dense layers on flattened features, made fully convolutional."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from tfaccel.core import keras_private
from tfaccel.core.checks import check_model
from tfaccel.core.cloning import clone_operation
from tfaccel.core.graph import Graph, Node, Tensor, map_models
from tfaccel.core.names import FreeNames
from tfaccel.rewriting.sampling import Batch, gather_batches

Array = npt.NDArray[Any]

_CONVOLUTIONS: dict[int, tuple[type, type]] = {  # by rank
    3: (layers.Conv1D, layers.GlobalAveragePooling1D),
    4: (layers.Conv2D, layers.GlobalAveragePooling2D),
    5: (layers.Conv3D, layers.GlobalAveragePooling3D),
}
# What does at each position what it did to the vector of features.
_POINTWISE = (
    layers.Activation,
    layers.ActivityRegularization,
    layers.BatchNormalization,
    layers.Dropout,
    layers.ELU,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.Identity,
    layers.LeakyReLU,
    layers.ReLU,
)
_SHARED_CONFIG = (
    "trainable",
    "kernel_initializer",
    "bias_initializer",
    "kernel_regularizer",
    "bias_regularizer",
    "use_bias",
)


def replace_head(
    model: keras.Model,
    data: Any = None,
    *,
    ridge: float = 1e-3,
    samples: int = 512,
    seed: int = 0,
) -> keras.Model:
    """Turns a head of dense layers on flattened features into 1x1 convolutions and an average.

    Flatten -> Dense becomes a 1x1 convolution -> global average pooling -> the activation (Lin et
    al. 2014, Network In Network, section 3.2), and in Flatten -> Dense -> ... -> Dense every dense
    layer a 1x1 convolution, with the pooling after the last. Dropout, batch normalization and
    activations between them stay. The first kernel shrinks by the number of positions; the dense
    layers after it, if any, keep theirs but then run at every position, which costs that many times
    their MACs.

    Weights: a dense kernel on [height, width, channels] features is a kernel for each position. The
    new one is their sum. That is exact where the features are the same at all positions, as on a
    map of 1 x 1, and the least-squares solution where all positions vary alike and independently.
    With `data` the first and the last kernel and bias are instead fitted by least squares to what
    the dense layers computed, before their activations, from the features of these samples; their
    distance from the sums is penalized, so that few samples suffice. Positions that the old head
    told apart, the new one cannot: train for some epochs afterwards.

    Args:
        model: a built Functional or Sequential model; not changed. All heads are replaced, also
            those of nested models.
        data: samples [samples, ...], (x, y), for several inputs a list or dict of arrays, or a
            tf.data.Dataset of batches; None uses the weights alone.
        ridge: weight of that penalty, relative to the mean square of the features.
        samples: how many samples of `data` are used at most.
        seed: of the choice of samples.

    Returns:
        The rewritten model. The convolution of the last dense layer is called "<name>_conv", and
        what gives its output keeps its name. Constraints on kernels are not carried over: their
        axes meant another shape. `tfaccel.diff(model, replaced)` tells what it saved.

    Raises:
        TypeError: the model is subclassed.
        ValueError: the model is not built, it has no such head, the head is within a nested model
            but data was given, or ridge is negative.
    """
    check_model(model, "replace_head")
    if ridge < 0:
        raise ValueError(f"ridge must be 0 or above, but got {ridge!r}.")
    outer = _find_heads(Graph.read(model))
    if data is not None and not outer:
        raise ValueError(
            f"replace_head(data=...) fits a head of {model.name!r} itself, but there is none "
            f"outside of nested models. {_LOOKED_FOR} Leave data out."
        )
    found = 0

    def edit(graph: Graph) -> None:
        nonlocal found
        for head in _find_heads(graph):
            _replace(graph, head)
            found += 1

    replaced = map_models(model, edit)
    if not found:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in Graph.read(model).layers()}))
        raise ValueError(f"{model.name!r} has no head to replace. {_LOOKED_FOR} It has {kinds}.")
    if data is not None:
        batches = gather_batches(model, data, samples, seed, "replace_head")
        _fit(model, replaced, outer, batches, ridge)
    return replaced


_LOOKED_FOR = (
    "Looked for: Flatten (channels last) of features [batch, positions..., channels] that only a "
    "plain Dense layer reads, with at most Dropout, activations and batch normalization between, "
    "each called once, and no layer behind them that gives positions again."
)


@dataclasses.dataclass(frozen=True)
class _Head:
    """A head as it stands in the graph.

    Attributes:
        flatten: the call that takes the positions away.
        chain: what follows, up to the last dense layer.
    """

    flatten: Node
    chain: tuple[Node, ...]

    @property
    def dense(self) -> list[Any]:
        """The dense layers."""
        return [node.layer for node in self.chain if _is_dense(node)]

    @property
    def features(self) -> Tensor:
        """What is flattened."""
        return self.flatten.inputs[0]


# Where a head is


def _find_heads(graph: Graph) -> list[_Head]:
    heads = []
    for flatten in graph.nodes:
        layer: Any = flatten.layer
        if type(layer) is not layers.Flatten or layer.data_format != "channels_last":
            continue
        shape = flatten.inputs[0].shape
        if len(shape) not in _CONVOLUTIONS or None in shape[1:] or len(graph.calls(layer)) > 1:
            continue
        chain = tuple(_chain_after(graph, flatten))
        last = max((n for n, node in enumerate(chain) if _is_dense(node)), default=None)
        if last is not None and not _leads_to_positions(graph, chain[last].outputs[0]):
            heads.append(_Head(flatten, chain[: last + 1]))
    return heads


def _chain_after(graph: Graph, flatten: Node) -> Iterator[Node]:
    """Yields the layers that follow one after the other, while they can be called on positions."""
    node, is_flat = flatten, True
    while not graph.is_output(node.outputs[0]):
        readers = graph.consumers(node.outputs[0])
        if len(readers) != 1:
            return
        (node,) = readers
        plain = len(node.inputs) == len(node.args) == 1 and len(graph.calls(node.operation)) == 1
        if not plain or not (_is_dense(node) or _is_pointwise(node, is_flat=is_flat)):
            return
        is_flat = is_flat and not _is_dense(node)
        yield node


def _is_dense(node: Node) -> bool:
    layer: Any = node.layer
    return (
        type(layer) is layers.Dense
        and getattr(layer, "quantization_mode", None) is None
        and not getattr(layer, "lora_enabled", False)
    )


def _is_pointwise(node: Node, *, is_flat: bool) -> bool:
    layer: Any = node.layer
    if type(layer) not in _POINTWISE or getattr(layer, "noise_shape", None) is not None:
        return False
    # On flattened features these mean one number for each position and channel.
    softmax = getattr(layer, "activation", None) is keras.activations.softmax
    return not (is_flat and (softmax or isinstance(layer, layers.BatchNormalization)))


def _leads_to_positions(graph: Graph, tensor: Tensor) -> bool:
    waiting, seen = [tensor], set()
    while waiting:
        for node in graph.consumers(waiting.pop()):
            if id(node) not in seen:
                seen.add(id(node))
                waiting += node.outputs
                if any(len(output.shape) > 2 for output in node.outputs):
                    return True
    return False


# What takes its place


def _replace(graph: Graph, head: _Head) -> None:
    shape = head.features.shape
    convolution, pooling = _CONVOLUTIONS[len(shape)]
    positions = math.prod(size or 0 for size in shape[1:-1])
    graph.remove(head.flatten)
    free_name = FreeNames(node.name for node in graph.nodes)
    first, final = head.dense[0], head.dense[-1]
    channels = shape[-1]
    for node in head.chain:
        layer: Any = node.layer
        if _is_dense(node):
            kernel = _numpy(layer.kernel)
            if layer is first:
                kernel = kernel.reshape(positions, -1, layer.units).sum(axis=0)
            last = node is head.chain[-1]
            name = free_name(f"{layer.name}_conv") if last else layer.name
            new = _pointwise(convolution, layer, kernel, len(shape), name, bare=last)
            graph.replace_layer(layer, new)
            channels = layer.units
        elif isinstance(layer, layers.BatchNormalization) and layer.axis != -1:
            graph.replace_layer(layer, _on_last_axis(layer, len(shape)))
        # What is put behind these is asked for its shape.
        node.outputs[0].shape = (*shape[:-1], channels)
    _pool(graph, head.chain[-1].outputs[0], final, pooling, free_name)


def _pool(graph: Graph, tensor: Tensor, last: Any, pooling: Any, free_name: FreeNames) -> None:
    """Puts the pooling behind the last convolution, and the last activation behind that."""
    policy = last.dtype_policy
    if last.activation is keras.activations.linear:
        graph.insert_after(tensor, pooling(name=last.name, dtype=policy))
        return
    pool = pooling(name=free_name(f"{last.name}_pool"), dtype=policy)
    pooled = graph.insert_after(tensor, pool)
    graph.insert_after(pooled, layers.Activation(last.activation, name=last.name, dtype=policy))


def _pointwise(
    convolution: Any, dense: Any, kernel: Array, rank: int, name: str, *, bare: bool
) -> Any:
    config = dense.get_config()
    activation = "linear" if bare else dense.activation
    new = convolution(
        dense.units,
        1,
        activation=activation,
        data_format="channels_last",
        dtype=dense.dtype_policy,
        name=name,
        activity_regularizer=dense.activity_regularizer,
        **{key: config[key] for key in _SHARED_CONFIG},
    )
    new.build((*(None,) * (rank - 1), kernel.shape[0]))
    new.kernel.assign(kernel.reshape(new.kernel.shape))
    if dense.use_bias:
        new.bias.assign(_numpy(dense.bias))
    return new


def _on_last_axis(norm: Any, rank: int) -> Any:
    new = clone_operation(norm)
    new.axis = -1
    new.build((*(None,) * (rank - 1), norm.moving_mean.shape[0]))
    new.set_weights(norm.get_weights())
    return new


def _numpy(value: Any) -> Array:
    # float64, so that sums over positions add no rounding of their own.
    return np.asarray(keras.ops.convert_to_numpy(value), np.float64)


# Fitting to data


def _fit(
    old: keras.Model, new: keras.Model, heads: Sequence[_Head], batches: list[Batch], ridge: float
) -> None:
    """Fits the first and the last convolution of each new head to what the old layers computed."""
    for head in heads:
        names = [layer.name for layer in head.dense]
        names[-1] = f"{names[-1]}_conv"
        for place in dict.fromkeys((0, len(names) - 1)):
            dense, conv = head.dense[place], new.get_layer(names[place])
            targets = _run(old, dense.input, batches)
            targets = targets.reshape(len(targets), -1) @ _numpy(dense.kernel)
            if dense.use_bias:
                targets += _numpy(dense.bias)
            inputs = _run(new, conv.input, batches)
            pooled = inputs.mean(axis=tuple(range(1, inputs.ndim - 1)))
            _solve(conv, pooled, targets, ridge)


def _solve(conv: Any, inputs: Array, targets: Array, ridge: float) -> None:
    """Sets kernel and bias to the minimum of |targets - inputs K - b|^2 + penalty |K - K0|^2."""
    start = _numpy(conv.kernel).reshape(inputs.shape[-1], -1)
    rest = targets - inputs @ start
    center, rest_center = (x.mean(axis=0) if conv.use_bias else 0.0 for x in (inputs, rest))
    x, y = inputs - center, rest - rest_center
    gram = x.T @ x
    penalty = max(ridge * np.trace(gram) / len(gram), np.finfo(np.float64).tiny)
    step = np.linalg.lstsq(gram + penalty * np.eye(len(gram)), x.T @ y, rcond=None)[0]
    conv.kernel.assign((start + step).reshape(conv.kernel.shape))
    if conv.use_bias:
        conv.bias.assign(rest_center - center @ step)


def _run(model: keras.Model, tensor: Any, batches: list[Batch]) -> Array:
    structure = keras_private.functional_of(model).input
    inner = keras.Model(structure, tensor)
    given = (keras.tree.pack_sequence_as(structure, batch) for batch in batches)
    return np.concatenate([_numpy(inner(x, training=False)) for x in given])
