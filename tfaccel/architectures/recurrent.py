"""Recurrent layers whose matrix products do not wait for the step before: QRNN and SRU."""

import math
from typing import Any

import keras
from keras import ops

from tfaccel.architectures.recurrence import GatedCell, last_step, linear_recurrence
from tfaccel.core.checks import check_fraction, check_in, check_positive

_GATES = {"f": 2, "fo": 3, "ifo": 4}


class _LightRecurrent(keras.layers.Layer):
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
        check_positive("units", units)
        self.units = int(units)
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

    def _recur(self, forget: Any, update: Any, initial: Any) -> Any:
        """Returns all states [batch, time, units], by a scan where the number of steps is known."""
        if forget.shape[1] is not None:
            return linear_recurrence(forget, update, initial)
        return self._loop(ops.concatenate([update, forget], axis=-1), initial_state=initial)

    def _make_loop(self, **arguments: Any) -> None:
        cell = GatedCell(self.units, dtype=self.dtype_policy, **arguments)
        self._loop = keras.layers.RNN(cell, return_sequences=True, dtype=self.dtype_policy)
        self._loop.unroll = getattr(self, "unroll", False)
        self._loop.build((None, None, 2 * self.units))

    def _turn(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
        if not self.go_backwards:
            return inputs, mask
        return ops.flip(inputs, 1), None if mask is None else ops.flip(mask, 1)

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


@keras.saving.register_keras_serializable("tfaccel")
class QRNN(_LightRecurrent):
    """Quasi-recurrent layer (Bradbury et al. 2017, "Quasi-Recurrent Neural Networks").

    All gates come from one masked convolution along time, which sees the step itself and the
    `kernel_size - 1` before it (section 2, eq. 1); only the elementwise pooling is recurrent:

        f-pooling    h[t] = f[t] h[t-1] + (1 - f[t]) z[t]                               (eq. 3)
        fo-pooling   c[t] = f[t] c[t-1] + (1 - f[t]) z[t],  h[t] = o[t] c[t]            (eq. 4)
        ifo-pooling  c[t] = f[t] c[t-1] + i[t] z[t],        h[t] = o[t] c[t]            (eq. 5)

    which is linear in the state and runs as a parallel scan (`linear_recurrence`). Zoneout keeps a
    random share of the channels' states in training: f = 1 - dropout(1 - sigmoid(...)), not
    rescaled (section 2.1, eq. 6). The paper's encoder-decoder attention is not part of the layer.

    Args:
        units: channels of the state and the output.
        kernel_size: steps that the convolution sees, the paper's k; 2 there for most tasks.
        pooling: "f", "fo" or "ifo".
        zoneout: share of channels and steps whose state is kept, in training.
        activation: of the candidate z.
        use_bias: whether the gates have biases.
        kernel_initializer: of the kernel [kernel_size, features, gates * units].
        bias_initializer: of the biases [gates * units].
        kernel_regularizer: likewise, and so on as in keras.layers.LSTM.
        bias_regularizer: likewise.
        kernel_constraint: likewise.
        bias_constraint: likewise.
        return_sequences: whether all steps come out, or the last only.
        return_state: whether the last state c comes out too.
        go_backwards: whether the sequence is read from its end; outputs come in that order.
        seed: of zoneout.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        [batch, time, features]; a mask [batch, time], of which masked steps keep the state and are
        zeros to the convolution; `initial_state` [batch, units].

    Output shape:
        [batch, time, units] or [batch, units]; with `return_state` a pair with [batch, units].

    Raises:
        ValueError: an argument is out of range, or the input has another rank.
    """

    def __init__(
        self,
        units: int,
        kernel_size: int = 2,
        pooling: str = "fo",
        *,
        zoneout: float = 0.0,
        activation: Any = "tanh",
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            units,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            return_sequences=return_sequences,
            return_state=return_state,
            go_backwards=go_backwards,
            **kwargs,
        )
        check_positive("kernel_size", kernel_size)
        check_in("pooling", pooling, tuple(_GATES))
        check_fraction("zoneout", zoneout)
        self.kernel_size = int(kernel_size)
        self.pooling = pooling
        self.zoneout = zoneout
        self.seed = seed
        if zoneout:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape: Any) -> None:
        """Makes the kernel and the biases of all gates."""
        features = self._check_input(input_shape)[-1]
        size = _GATES[self.pooling] * self.units
        self._make_loop()
        self.kernel = self._add_kernel("kernel", (self.kernel_size, features, size))
        self.bias = self._add_bias("bias", size)

    def call(
        self, inputs: Any, initial_state: Any = None, mask: Any = None, training: bool | None = None
    ) -> Any:
        """Runs the layer."""
        inputs, mask = self._turn(inputs, mask)
        gates = self._gates(inputs, mask)
        candidate, forget = self.activation(gates[0]), ops.sigmoid(gates[1])
        added = ops.sigmoid(gates[3]) if self.pooling == "ifo" else None
        if self.zoneout and training:
            open_ = keras.random.uniform(ops.shape(forget), seed=self.seed_generator)
            taken = ops.cast(open_ >= self.zoneout, forget.dtype)
            forget = 1.0 - taken * (1.0 - forget)
        added = 1.0 - forget if added is None else added
        if mask is not None:
            counts = ops.cast(ops.expand_dims(mask, -1), forget.dtype)
            forget, added = 1.0 - counts * (1.0 - forget), added * counts
        states = self._recur(forget, added * candidate, _only(initial_state))
        outputs = states if self.pooling == "f" else ops.sigmoid(gates[2]) * states
        return self._give(outputs, states, mask)

    def _gates(self, inputs: Any, mask: Any) -> list[Any]:
        if mask is not None:
            inputs = inputs * ops.cast(ops.expand_dims(mask, -1), inputs.dtype)
        padded = ops.pad(inputs, [[0, 0], [self.kernel_size - 1, 0], [0, 0]])
        gates = ops.conv(padded, self.kernel, padding="valid", data_format="channels_last")
        if self.bias is not None:
            gates = gates + self.bias
        return ops.split(gates, _GATES[self.pooling], axis=-1)

    def count_macs(self, input_shape: Any) -> int:
        """MACs of the convolution, for the whole batch."""
        batch, time, features = input_shape
        return int(batch * time * self.kernel_size * features * _GATES[self.pooling] * self.units)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        own = {
            "kernel_size": self.kernel_size,
            "pooling": self.pooling,
            "zoneout": self.zoneout,
            "seed": self.seed,
        }
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("tfaccel")
class SRU(_LightRecurrent):
    """Simple recurrent unit (Lei et al. 2018, "Simple Recurrent Units for Highly Parallelizable").

        f[t] = sigmoid(W_f x[t] + v_f c[t-1] + b_f)                                     (eq. 1)
        c[t] = f[t] c[t-1] + (1 - f[t]) W x[t]                                          (eq. 2)
        r[t] = sigmoid(W_r x[t] + v_r c[t-1] + b_r)                                     (eq. 3)
        h[t] = r[t] c[t] + (1 - r[t]) alpha x[t]                                        (eq. 4)

    All products are elementwise but those with x, which are made for the whole sequence at once.
    Through v_f the forget gate depends on the state, so that the steps go one by one; without it
    (`recurrent_gates=False`, the form of the preprint) they run as a parallel scan. Where features
    and units differ, a fourth matrix takes x to the highway.

    Args:
        units: channels of the state and the output.
        recurrent_gates: whether the gates see the state, by v_f and v_r.
        highway_scale: alpha; by default sqrt(1 + 2 exp(forget_bias)), which keeps the variance
            (section 3.2): 1.73 for 0.
        forget_bias: what b_f and b_r begin with, b in the paper; above 0 for long memories.
        activation: of the state on its way out; the paper's 2018 form has none.
        unroll: writes the steps out instead of looping, as static int8 export needs it with
            `recurrent_gates`; the number of steps must then be known.
        use_bias: whether the gates have biases.
        kernel_initializer: of the kernel [features, 3 or 4 times units]; the paper's is uniform
            with variance 1 / features.
        kernel_regularizer: as in keras.layers.LSTM, and so on.
        bias_regularizer: likewise.
        kernel_constraint: likewise.
        bias_constraint: likewise.
        return_sequences: whether all steps come out, or the last only.
        return_state: whether the last state c comes out too.
        go_backwards: whether the sequence is read from its end; outputs come in that order.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape:
        [batch, time, features]; a mask [batch, time], whose masked steps keep the state;
        `initial_state` [batch, units].

    Output shape:
        [batch, time, units] or [batch, units]; with `return_state` a pair with [batch, units].

    Raises:
        ValueError: an argument is out of range, or the input has another rank.
    """

    def __init__(
        self,
        units: int,
        *,
        recurrent_gates: bool = True,
        highway_scale: float | None = None,
        forget_bias: float = 0.0,
        unroll: bool = False,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "lecun_uniform",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            units,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=keras.initializers.Constant(forget_bias),
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            return_sequences=return_sequences,
            return_state=return_state,
            go_backwards=go_backwards,
            **kwargs,
        )
        self.recurrent_gates = recurrent_gates
        self.highway_scale = highway_scale
        self.forget_bias = forget_bias
        self.unroll = unroll

    @property
    def _scale(self) -> float:
        if self.highway_scale is not None:
            return self.highway_scale
        return math.sqrt(1.0 + 2.0 * math.exp(self.forget_bias))

    def build(self, input_shape: Any) -> None:
        """Makes the kernel, the biases and the recurrent vectors."""
        _, steps, features = self._check_input(input_shape)
        if self.unroll and steps is None:
            raise ValueError(
                f"SRU {self.name!r} with unroll=True needs a known number of steps, but got the "
                f"shape {tuple(input_shape)}. Give keras.Input the whole shape."
            )
        matrices = 3 if features == self.units else 4
        self.kernel = self._add_kernel("kernel", (features, matrices * self.units))
        self.bias = self._add_bias("bias", 2 * self.units)
        self.reset_vector = None
        if self.recurrent_gates:
            self.reset_vector = self._vector(self.add_weight, "reset_vector")
        self._make_loop(vector=self._vector if self.recurrent_gates else None)

    def _vector(self, add_weight: Any, name: str = "forget_vector") -> keras.Variable:
        # Drawn as the matrices are, with variance 1 / units (section 3.2).
        bound = math.sqrt(3.0 / self.units)
        return add_weight(
            name=name,
            shape=(self.units,),
            initializer=keras.initializers.RandomUniform(-bound, bound),
            regularizer=self.kernel_regularizer,
        )

    def call(self, inputs: Any, initial_state: Any = None, mask: Any = None) -> Any:
        """Runs the layer."""
        inputs, mask = self._turn(inputs, mask)
        products = ops.split(
            ops.matmul(inputs, self.kernel), self.kernel.shape[-1] // self.units, axis=-1
        )
        candidate, forget, reset = products[:3]
        highway = products[3] if len(products) == 4 else inputs
        if self.bias is not None:
            forget_bias, reset_bias = ops.split(self.bias, 2)
            forget, reset = forget + forget_bias, reset + reset_bias
        initial = _only(initial_state)
        if initial is None:
            initial = ops.zeros_like(candidate[:, 0])
        if self.reset_vector is None:
            forget = ops.sigmoid(forget)
            added = 1.0 - forget
            if mask is not None:
                added = added * ops.cast(ops.expand_dims(mask, -1), forget.dtype)
                forget = 1.0 - added
            states = self._recur(forget, added * candidate, initial)
        else:
            given = ops.concatenate([candidate, forget], axis=-1)
            states = self._loop(given, initial_state=initial, mask=mask)
            before = ops.concatenate([ops.expand_dims(initial, 1), states[:, :-1]], axis=1)
            reset = reset + self.reset_vector * before
        reset = ops.sigmoid(reset)
        outputs = reset * self.activation(states) + (1.0 - reset) * (self._scale * highway)
        return self._give(outputs, states, mask)

    def count_macs(self, input_shape: Any) -> int:
        """MACs of the product with the kernel, for the whole batch."""
        batch, time, features = input_shape
        matrices = 3 if features == self.units else 4
        return int(batch * time * features * matrices * self.units)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        config = super().get_config()
        del config["bias_initializer"]
        own = {
            "recurrent_gates": self.recurrent_gates,
            "highway_scale": self.highway_scale,
            "forget_bias": self.forget_bias,
            "unroll": self.unroll,
        }
        return {**config, **own}


def _only(initial_state: Any) -> Any:
    """Returns the one state, which Keras gives alone or in a list."""
    return initial_state[0] if isinstance(initial_state, (list, tuple)) else initial_state
