"""Recurrent layers of a known number of steps, written out step by step.

The runtime has a fused LSTM in integers, but no way to hand it ranges that were trained; and none
at all for a GRU or a loop. Written out, every gate is a dense layer, a sum, a sigmoid.
"""

import types
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from tfaccel.core.graph import Node
from tfaccel.quantization.composites import Array, Composite

MOST_STEPS = 64
_MERGES: dict[str, type] = {
    "concat": layers.Concatenate,
    "mul": layers.Multiply,
    "sum": layers.Add,
}


class Recurrence(Composite):
    """An LSTM, a GRU, or a `Bidirectional` of one of them."""

    def refusal(self, node: Node) -> str:
        """Says why this call cannot be written so; empty if it can."""
        shape = node.inputs[0].shape if node.inputs else ()
        kind = type(self.layer).__name__
        if len(node.inputs) != 1:
            return f"{kind} with a mask or states of its own"
        if len(shape) != 3 or shape[1] is None:
            return f"{kind} of a number of steps that is not fixed"
        if shape[1] > MOST_STEPS:
            return f"{kind} of {shape[1]} steps, more than the {MOST_STEPS} that are written out"
        merge = getattr(self.layer, "merge_mode", "concat")
        if merge not in _MERGES:
            return f"{kind} with merge_mode={merge!r}"
        return next(filter(None, map(_refusal_of_one, _directions(self.layer))), "")

    def outputs(self, *tensors: Any) -> Any:
        """Returns what the layer gives for x [batch, steps, features]."""
        (x,) = tensors
        directions = _directions(self.layer)
        if len(directions) == 1:
            return self._run(directions[0], x, self.layer.name, "")
        both = []
        for layer, part in zip(directions, ("forward_", "backward_"), strict=True):
            both.append(self._run(layer, x, self.name(part[:-1]), part))
        merge = _MERGES[self.layer.merge_mode]
        return merge(name=self.layer.name, dtype=self.layer.dtype_policy)(both)

    def _run(self, layer: Any, x: Any, name: str, part: str) -> Any:
        steps = list(range(x.shape[1]))
        if layer.go_backwards:
            steps.reverse()
        if layer.dropout:  # one mask for all steps, as the layer itself has it
            x = layers.SpatialDropout1D(layer.dropout, name=self.name(f"{part}dropout"))(x)
        unroll = _Lstm if isinstance(layer, layers.LSTM) else _Gru
        states = unroll(self, layer, part).states(x, steps)
        if not layer.return_sequences:
            return layers.Identity(name=name)(states[-1])
        if isinstance(self.layer, layers.Bidirectional) and layer.go_backwards:
            states.reverse()  # which puts them in the order of the steps
        rows = [
            layers.Reshape((1, layer.units), name=self.name(f"{part}row_{number}"))(state)
            for number, state in enumerate(states)
        ]
        if len(rows) == 1:
            return layers.Identity(name=name)(rows[0])
        return layers.Concatenate(axis=1, name=name, dtype=self.layer.dtype_policy)(rows)


def _directions(layer: Any) -> list[Any]:
    if isinstance(layer, layers.Bidirectional):
        return [layer.forward_layer, layer.backward_layer]
    return [layer]


def _refusal_of_one(layer: Any) -> str:
    kind = type(layer).__name__
    if type(layer) not in (layers.LSTM, layers.GRU):
        return f"{kind} in two directions"
    for option in ("return_state", "stateful", "recurrent_dropout"):
        if getattr(layer, option, False):
            return f"{kind} with {option}"
    gates = layer.recurrent_activation, layer.activation
    if gates != (keras.activations.sigmoid, keras.activations.tanh):
        return f"{kind} with other activations than sigmoid and tanh"
    return ""


class _Steps:
    """What both kinds of cells have: two dense layers, one of the inputs and one of the state."""

    def __init__(self, owner: Composite, layer: Any, part: str) -> None:
        self._owner = owner
        self._layer = layer
        self._part = part
        cell = layer.cell
        self.kernel, self.recurrent = (
            np.asarray(ops.convert_to_numpy(v), np.float32)
            for v in (cell.kernel, cell.recurrent_kernel)
        )
        self.bias = None
        if layer.use_bias:
            self.bias = np.asarray(ops.convert_to_numpy(cell.bias), np.float32)

    def name(self, part: str) -> str:
        return self._owner.name(f"{self._part}{part}")

    def of_inputs(self, x: Any, bias: Array | None) -> Any:
        return self._owner.dense(x, self.name("inputs"), self.kernel, bias, self._layer.cell)

    def of_state(self, part: str, kernel: Array, bias: Array | None) -> Any:
        cell = self._layer.cell
        likeness = types.SimpleNamespace(
            kernel_regularizer=cell.recurrent_regularizer,
            kernel_constraint=cell.recurrent_constraint,
        )
        shape = (None, self._layer.units)
        return self._owner.make_dense(shape, self.name(part), kernel, bias, likeness)

    def activation(self, kind: str, value: Any, gate: str) -> Any:
        layer = layers.Activation(kind, name=self.name(gate), dtype=self._layer.dtype_policy)
        return layer(value)

    def states(self, x: Any, steps: Sequence[int]) -> list[Any]:
        raise NotImplementedError


class _Lstm(_Steps):
    """c = f c + i tanh(g), h = o tanh(c), gates of the inputs and of h (Hochreiter et al. 1997)."""

    def states(self, x: Any, steps: Sequence[int]) -> list[Any]:
        units = self._layer.units
        given = self.of_inputs(x, self.bias)
        recurrent = self.of_state("recurrent", self.recurrent, None)
        states: list[Any] = []
        carry = None
        for number, step in enumerate(steps):
            z = given[:, step]
            if carry is None:  # nothing to forget yet
                i, g, o = z[:, :units], z[:, 2 * units : 3 * units], z[:, 3 * units :]
            else:
                i, f, g, o = ops.split(z + recurrent(states[-1]), 4, axis=-1)
            fresh = self.activation("sigmoid", i, f"input_{number}") * self.activation(
                "tanh", g, f"candidate_{number}"
            )
            if carry is not None:
                fresh = self.activation("sigmoid", f, f"forget_{number}") * carry + fresh
            carry = fresh
            output = self.activation("sigmoid", o, f"output_{number}")
            states.append(output * self.activation("tanh", carry, f"carry_{number}"))
        return states


class _Gru(_Steps):
    """h = z h + (1 - z) tanh(candidate), reset before or after the matrix (Cho et al. 2014)."""

    def states(self, x: Any, steps: Sequence[int]) -> list[Any]:
        layer, units = self._layer, self._layer.units
        after = layer.reset_after
        biases = (None, None) if self.bias is None else self.bias if after else (self.bias, None)
        given = self.of_inputs(x, biases[0])
        if after:
            whole = self.of_state("recurrent", self.recurrent, biases[1])
        else:
            gates = self.of_state("recurrent", self.recurrent[:, : 2 * units], None)
            candidate = self.of_state("candidate_state", self.recurrent[:, 2 * units :], None)
        # A state of zeros, on the grid of the other values: the step that padding puts in front.
        padded = layers.ZeroPadding1D((1, 0), name=self.name("start"))(given)
        state = padded[:, 0, :units]
        states = []
        for number, step in enumerate(steps):
            x_z, x_r, x_h = ops.split(given[:, step], 3, axis=-1)
            if after:
                h_z, h_r, h_h = ops.split(whole(state), 3, axis=-1)
            else:
                h_z, h_r = ops.split(gates(state), 2, axis=-1)
            update = self.activation("sigmoid", x_z + h_z, f"update_{number}")
            reset = self.activation("sigmoid", x_r + h_r, f"reset_{number}")
            inner = reset * h_h if after else candidate(reset * state)
            new = self.activation("tanh", x_h + inner, f"candidate_{number}")
            state = update * state + (1.0 - update) * new
            states.append(state)
        return states
