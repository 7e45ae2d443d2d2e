"""Recurrences computed side by side, not one by one, and what the layers made of them share."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tfaccel.core.checks import check_positive, check_type

# Steps written out in a row. The log2(steps) rounds of Hillis & Steele (1986), over the whole array
# each, took 2.5 times as long on two cores, and 6.6 times under XLA: too many bytes to move.
_STRETCH = 16
# Rounds of cutting where the number of steps is open: good for 16**6 steps, over 16 million. Those
# that a short sequence does not need run on a single stretch.
_ROUNDS = 6


def linear_recurrence(forget: Any, update: Any, initial: Any = None) -> Any:
    """Computes c[t] = forget[t] * c[t - 1] + update[t] for all steps t, stretches side by side.

    A parallel scan in blocks (Blelloch 1990, section 1.2): the sequence is cut into stretches of 16
    steps, each of which runs from a state of zero, all at once; the states at their ends are a
    sequence 16 times as short, treated alike; what reaches each stretch is then added, times what
    its gates let through. Some 16 log16(steps) products in a row in place of `steps`. It divides by
    nothing and takes no logarithm, so that a gate of 0 or 1 is exact; it has no loop, so that it
    can be quantized and exported. Its gradient g is such a recurrence too, from the last step to
    the first: g[t] = dL/dc[t] + forget[t + 1] g[t + 1].

    Args:
        forget: [batch, steps, units]; the number of steps may be open, up to 16 million.
        update: [batch, steps, units].
        initial: the state before the first step, [batch, units]; by default zeros.

    Returns:
        [batch, steps, units].
    """
    if initial is not None:
        first = update[:, :1] + forget[:, :1] * ops.expand_dims(initial, 1)
        update = ops.concatenate([first, update[:, 1:]], axis=1)
    return _recur(forget, update)


@ops.custom_gradient
def _recur(forget: Any, update: Any) -> Any:
    # Left to the backend, the gradient pads each slice of the scan to the whole sequence and adds
    # them up: 54 ms in place of 14 for 32 sequences of 512 steps and 128 units, 52 of 9 under XLA.
    states = _scan(forget, update, _ROUNDS)

    def gradient(*given: Any, upstream: Any = None) -> tuple[Any, Any]:
        change = given[0] if upstream is None else upstream
        following = ops.pad(forget[:, 1:], [[0, 0], [0, 1], [0, 0]])
        backwards = _recur(ops.flip(following, 1), ops.flip(change, 1))
        change = ops.flip(backwards, 1)
        before = ops.pad(states[:, :-1], [[0, 0], [1, 0], [0, 0]])
        return change * before, change

    return states, gradient


def _scan(forget: Any, update: Any, rounds: int) -> Any:
    known, units = forget.shape[1:]
    if known is not None and known <= _STRETCH:
        return ops.stack(_run([(forget[:, t], update[:, t]) for t in range(known)])[0], axis=1)
    if known is None and rounds == 0:
        return update  # one step is left
    steps = ops.shape(forget)[1]
    stretches = -(-steps // _STRETCH)
    # An open number of steps is filled up by a fixed one and cut: converters take no other padding.
    missing = _STRETCH - 1 if known is None else stretches * _STRETCH - steps
    cut = (-1, stretches, _STRETCH, units)
    forget, update = (
        ops.reshape(
            ops.pad(x, [[0, 0], [0, missing], [0, 0]])[:, : stretches * _STRETCH],
            cut,
        )
        for x in (forget, update)
    )
    states, gates = _run([(forget[:, :, t], update[:, :, t]) for t in range(_STRETCH)])
    ends = _scan(gates[-1], states[-1], rounds - 1)
    before = ops.pad(ends[:, :-1], [[0, 0], [1, 0], [0, 0]])
    reached = [state + gate * before for state, gate in zip(states, gates, strict=True)]
    whole = ops.reshape(ops.stack(reached, axis=2), (-1, stretches * _STRETCH, units))
    return whole[:, :steps]


def _run(steps: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """Returns the states from zero on, and the products of the gates up to each step."""
    (gate, state), *rest = steps
    states, gates = [state], [gate]
    for forget, update in rest:
        states.append(forget * states[-1] + update)
        gates.append(forget * gates[-1])
    return states, gates


class GatedCell(keras.layers.Layer):
    """One step of SRU (Lei et al. 2018, eqs. 1 and 2) for keras.layers.RNN.

    Its forget gate waits for the state, f = sigmoid(g + v c), so that no scan can be used.

    Args:
        units: channels of the state.
        vector: makes the recurrent vector v, given `add_weight`.
        **kwargs: of a layer.

    Input shape:
        [batch, 2 * units]: candidates x, and the rest of the gate g. With one channel more, it is 1
        where the step counts and 0 where it keeps the state. Keras's own masks would not do: the
        outputs of the RNN, which are the states here, are zeros up to the first step that counts,
        whatever the initial state.
    """

    def __init__(self, units: int, vector: Callable[..., keras.Variable], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.state_size = self.output_size = units
        self._make = vector

    def build(self, input_shape: Any) -> None:  # noqa: ARG002
        """Makes the recurrent vector."""
        self.vector = self._make(self.add_weight)

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        """Runs one step."""
        units, before = self.state_size, states[0]
        masked = inputs.shape[-1] > 2 * units
        parts = ops.split(inputs, [units, 2 * units] if masked else 2, axis=-1)
        taken = 1.0 - ops.sigmoid(parts[1] + self.vector * before)
        if masked:
            taken = taken * parts[2]
        state = (1.0 - taken) * before + taken * parts[0]
        return state, [state]


def last_step(x: Any, mask: Any) -> Any:
    """Returns what the last step that is not masked gives, zeros where all are: [batch, units].

    Args:
        x: [batch, steps, units].
        mask: [batch, steps], True where a step counts; None where all do.
    """
    if mask is None:
        return x[:, -1]
    later = ops.flip(ops.cumsum(ops.flip(ops.cast(mask, "int32"), 1), 1), 1)
    is_last = ops.logical_and(mask, ops.equal(later, 1))
    return ops.sum(x * ops.cast(ops.expand_dims(is_last, -1), x.dtype), axis=1)


class LightRecurrent(keras.layers.Layer):
    """What QRNN and SRU share: arguments, masks, direction, what is returned."""

    def __init__(
        self,
        units: int,
        *,
        activation: Any,
        use_bias: bool,
        kernel_initializer: Any,
        bias_initializer: Any,
        kernel_regularizer: Any,
        bias_regularizer: Any,
        kernel_constraint: Any,
        bias_constraint: Any,
        return_sequences: bool,
        return_state: bool,
        go_backwards: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.units = check_count("units", units)
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.return_sequences = return_sequences
        self.return_state = return_state
        self.go_backwards = go_backwards
        self.stateful = False  # keras.layers.Bidirectional asks
        self.supports_masking = True

    def _add_kernel(self, name: str, shape: tuple[Any, ...]) -> keras.Variable:
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )

    def _add_bias(self, name: str, size: int, initializer: Any = None) -> keras.Variable | None:
        if not self.use_bias:
            return None
        return self.add_weight(
            name=name,
            shape=(size,),
            initializer=initializer or self.bias_initializer,
            regularizer=self.bias_regularizer,
            constraint=self.bias_constraint,
        )

    def _check_input(self, shape: Any) -> tuple[Any, ...]:
        shape = tuple(shape)
        if len(shape) != 3 or shape[-1] is None:
            raise ValueError(
                f"{type(self).__name__} {self.name!r} takes [batch, time, features] with a known "
                f"number of features, but got the shape {shape}."
            )
        return shape

    def _check_state(self, initial_state: Any) -> Any:
        """Returns the one state, which Keras gives alone or in a list; None if there is none."""
        nested = isinstance(initial_state, (list, tuple))
        if nested and len(initial_state) != 1:
            raise ValueError(
                f"{type(self).__name__} {self.name!r} has one state, but got {len(initial_state)}."
            )
        state = initial_state[0] if nested else initial_state
        if state is not None and (len(state.shape) != 2 or state.shape[-1] != self.units):
            raise ValueError(
                f"{type(self).__name__} {self.name!r} takes an initial_state [batch, "
                f"{self.units}], but got the shape {tuple(state.shape)}."
            )
        return state

    def _prepare(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
        """Turns the sequence round if it is read so, and puts zeros where it is masked."""
        if self.go_backwards:
            inputs, mask = ops.flip(inputs, 1), None if mask is None else ops.flip(mask, 1)
        if mask is not None:
            mask = ops.cast(mask, "bool")
            # Not times 0, since what is masked may be no number.
            inputs = ops.where(ops.expand_dims(mask, -1), inputs, ops.zeros_like(inputs))
        return inputs, mask

    def _give(self, outputs: Any, states: Any, mask: Any) -> Any:
        """Returns what the layer gives, of the outputs and states [batch, time, units]."""
        result = outputs if self.return_sequences else last_step(outputs, mask)
        # A masked step has kept the state, so the last one has it.
        return (result, states[:, -1]) if self.return_state else result

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:  # noqa: ARG002
        """Sequences keep their mask, in the order in which they come out."""
        mask = keras.tree.flatten(mask)[0] if mask is not None else None
        if mask is not None and self.go_backwards:
            mask = ops.flip(mask, 1)
        output_mask = mask if self.return_sequences else None
        return (output_mask, None) if self.return_state else output_mask

    def compute_output_shape(self, inputs_shape: Any, initial_state_shape: Any = None) -> Any:  # noqa: ARG002
        """[batch, time, units] or [batch, units], and [batch, units] for the state."""
        batch, time, _ = inputs_shape
        output = (batch, time, self.units) if self.return_sequences else (batch, self.units)
        return (output, (batch, self.units)) if self.return_state else output

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            **{
                f"{part}_{kind}": keras.saving.serialize_keras_object(
                    getattr(self, f"{part}_{kind}")
                )
                for part in ("kernel", "bias")
                for kind in ("initializer", "regularizer", "constraint")
            },
            "return_sequences": self.return_sequences,
            "return_state": self.return_state,
            "go_backwards": self.go_backwards,
        }


def check_count(name: str, value: Any) -> int:
    """Returns a number of things, at least 1; raises if it is none."""
    check_type(name, value, (int, np.integer))
    check_positive(name, value)
    return int(value)


def sequence_shape(input_shape: Any) -> Any:
    """Returns the shape of the sequence, which comes in a list where a state goes in beside it."""
    return input_shape[0] if isinstance(input_shape[0], (list, tuple)) else input_shape
