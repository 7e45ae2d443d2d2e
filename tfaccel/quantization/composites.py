"""Layers that the runtime computes in several operators, written as those.

Layer normalization becomes means, products and an inverse square root; attention becomes dense
layers, products of matrices and a softmax. Each of their values is then rounded as the runtime
rounds it.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from tfaccel.core.graph import Graph, Node, Tensor

Array = Any
NewName = Callable[[str], str]


class Composite:
    """Writes one layer as calls of others.

    Args:
        layer: a built layer; not changed. The last of the new layers has its name.
        new_name: makes a name that no layer has.
        exact: gains the ids of new layers whose kernels are exact on their grid as they are.
    """

    def __init__(self, layer: Any, new_name: NewName, exact: set[int]) -> None:
        self.layer = layer
        self._new_name = new_name
        self._exact = exact

    def refusal(self, node: Node) -> str:
        """Says why this call cannot be written so; empty if it can."""
        raise NotImplementedError

    def inputs(self, node: Node) -> Sequence[Tensor]:
        """Returns the tensors that `outputs` takes."""
        return node.inputs

    def outputs(self, *tensors: Any) -> Any:
        """Returns what the layer gives for tensors, all computed anew."""
        raise NotImplementedError

    def apply(self, graph: Graph, node: Node) -> None:
        """Edits the graph."""
        entries = [
            keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype)
            for tensor in self.inputs(node)
        ]
        model = keras.Model(entries, self.outputs(*entries))
        for call in graph.splice(node, model, self.inputs(node)):
            if call.layer is None:
                kind = re.sub(r"_\d+$", "", call.name)
                call.operation.name = self._new_name(f"{self.layer.name}_{kind}")

    def name(self, part: str) -> str:
        """Returns a name for a part of the layer."""
        return self._new_name(f"{self.layer.name}_{part}")

    def dense(
        self, x: Any, name: str, kernel: Array, bias: Array | None, likeness: Any = None
    ) -> Any:
        """Returns a dense layer's output.

        Args:
            x: [batch, ..., inputs].
            name: of the dense layer.
            kernel: [inputs, outputs].
            bias: [outputs], or None.
            likeness: a layer whose regularizers and constraints it has too.
        """
        return self.make_dense(x.shape, name, kernel, bias, likeness)(x)

    def make_dense(
        self,
        shape: Sequence[int | None],
        name: str,
        kernel: Array,
        bias: Array | None,
        likeness: Any = None,
    ) -> Any:
        """Returns a dense layer for inputs of a shape, with its weights."""
        options = {
            f"{weight}_{kind}": getattr(likeness, f"{weight}_{kind}", None)
            for weight in ("kernel", "bias")
            for kind in ("regularizer", "constraint")
        }
        dense: Any = layers.Dense(
            kernel.shape[1],
            use_bias=bias is not None,
            dtype=self.layer.dtype_policy,
            name=name,
            **options,
        )
        dense.build(tuple(shape))
        dense.set_weights([kernel] if bias is None else [kernel, bias])
        dense.trainable = self.layer.trainable
        return dense

    def factors(self, x: Any, scale: Array, offset: Array | None) -> Any:
        """Returns scale * x + offset for each channel of x, trained on; with the layer's name."""
        rank, channels = len(x.shape), x.shape[-1]
        depthwise: Any = (layers.DepthwiseConv2D if rank == 4 else layers.DepthwiseConv1D)(
            1,
            use_bias=offset is not None,
            data_format="channels_last",
            dtype=self.layer.dtype_policy,
            name=self.layer.name if rank > 2 else self.name("factors"),
        )
        depthwise.build((*(None,) * (max(rank, 3) - 1), channels))
        kernel = np.reshape(scale, depthwise.kernel.shape)
        depthwise.set_weights([kernel] if offset is None else [kernel, offset])
        depthwise.trainable = self.layer.trainable
        self._exact.add(id(depthwise))
        if rank > 2:
            return depthwise(x)
        lifted = layers.Reshape((1, channels), name=self.name("rows"))(x)
        return layers.Reshape((channels,), name=self.layer.name)(depthwise(lifted))


class Normalization(Composite):
    """Layer normalization over the last axis: gamma * (x - mean) / sqrt(variance + eps) + beta."""

    def refusal(self, node: Node) -> str:
        """Says why this call cannot be written so; empty if it can."""
        axis, rank = self.layer.axis, len(node.inputs[0].shape)
        axes = list(axis) if isinstance(axis, (list, tuple)) else [axis]
        if axes not in ([-1], [rank - 1]) or rank > 4:
            return "layer normalization over other axes than the last"
        if getattr(self.layer, "rms_scaling", False):
            return "layer normalization with rms_scaling"
        return ""

    def outputs(self, *tensors: Any) -> Any:
        """Returns what the layer gives for x [batch, ..., channels]."""
        (x,) = tensors
        layer = self.layer
        centered = x - ops.mean(x, axis=-1, keepdims=True)
        variance = ops.mean(centered * centered, axis=-1, keepdims=True)
        normal = centered * ops.rsqrt(variance + layer.epsilon)
        channels = x.shape[-1]
        gamma = np.ones(channels) if layer.gamma is None else _value(layer.gamma)
        beta = None if layer.beta is None else _value(layer.beta)
        return self.factors(normal, gamma, beta)


class Attention(Composite):
    """Multi-head attention: softmax(Q K' / sqrt(d)) V of dense layers (Vaswani et al. 2017)."""

    def refusal(self, node: Node) -> str:
        """Says why this call cannot be written so; empty if it can."""
        config = self.layer.get_config()
        if any(len(tensor.shape) != 3 for tensor in self.inputs(node)):
            return "attention over several axes"
        for option in ("use_gate", "sliding_window"):
            if config.get(option):
                return f"attention with {option}"
        axes = config.get("attention_axes")
        if axes is not None and tuple(axes) not in ((1,), (-2,)):
            return "attention over other axes than the middle one"
        plain = ("query", "value", "key", "training")
        given = [k for k, value in node.kwargs.items() if k not in plain and value not in (None, 0)]
        if given or len(node.args) > 3:
            return f"attention with {' and '.join(given) or 'a mask'}"
        return ""

    def inputs(self, node: Node) -> Sequence[Tensor]:
        """Returns query, value and key."""
        names = ("query", "value", "key")
        given = dict(zip(names, node.args, strict=False))
        given.update({name: node.kwargs[name] for name in names if name in node.kwargs})
        key = given.get("key")
        return given["query"], given["value"], given["value"] if key is None else key

    def outputs(self, *tensors: Any) -> Any:
        """Returns what the layer gives for query [batch, m, a], value and key [batch, n, b]."""
        query, value, key = tensors
        layer = self.layer
        heads, width = layer.num_heads, layer.key_dim
        # The factor 1 / sqrt(d) stands in the query's kernel: one rounding fewer.
        q = self._project(query, layer.query_dense, "query", 1 / np.sqrt(width))
        k = self._project(key, layer.key_dense, "key")
        v = self._project(value, layer.value_dense, "value")
        by_head = (0, 2, 1, 3)
        scores = ops.matmul(
            ops.transpose(self._split(q, heads, "query"), by_head),
            ops.transpose(self._split(k, heads, "key"), (0, 2, 3, 1)),
        )
        shares = layers.Softmax(name=self.name("softmax"), dtype=layer.dtype_policy)(scores)
        if layer.dropout:
            shares = layers.Dropout(layer.dropout, name=self.name("dropout"))(shares)
        context = ops.matmul(shares, ops.transpose(self._split(v, heads, "value"), by_head))
        joined = ops.transpose(context, by_head)
        size = heads * v.shape[-1] // heads
        joined = layers.Reshape((-1, size), name=self.name("join"))(joined)
        dense = layer.output_dense
        kernel = _value(dense.kernel).reshape(size, -1)
        bias = None if dense.bias is None else _value(dense.bias).ravel()
        return self.dense(joined, layer.name, kernel, bias, dense)

    def _project(self, x: Any, dense: Any, part: str, factor: float = 1.0) -> Any:
        kernel = _value(dense.kernel).reshape(x.shape[-1], -1) * factor
        bias = None if dense.bias is None else _value(dense.bias).ravel() * factor
        return self.dense(x, self.name(part), kernel, bias, dense)

    def _split(self, x: Any, heads: int, part: str) -> Any:
        shape = (-1, heads, x.shape[-1] // heads)
        return layers.Reshape(shape, name=self.name(f"{part}_heads"))(x)


def _value(variable: Any) -> Array:
    return np.asarray(keras.ops.convert_to_numpy(variable), np.float32)
