"""Recurrent layers whose matrix products do not wait for the step before: QRNN and SRU."""

import math
from typing import Any

import keras
from keras import ops

from tfaccel.architectures.recurrence import (
    GatedCell,
    LightRecurrent,
    check_count,
    linear_recurrence,
    sequence_shape,
)
from tfaccel.core.checks import check_fraction, check_in, check_number

_GATES = {"f": 2, "fo": 3, "ifo": 4}


@keras.saving.register_keras_serializable("tfaccel")
class QRNN(LightRecurrent):
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
        self.kernel_size = check_count("kernel_size", kernel_size)
        check_in("pooling", pooling, tuple(_GATES))
        check_fraction("zoneout", zoneout)
        self.pooling = pooling
        self.zoneout = zoneout
        self.seed = seed
        if zoneout:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape: Any) -> None:
        """Makes the kernel and the biases of all gates."""
        features = self._check_input(input_shape)[-1]
        size = _GATES[self.pooling] * self.units
        self.kernel = self._add_kernel("kernel", (self.kernel_size, features, size))
        self.bias = self._add_bias("bias", size)

    def call(
        self, inputs: Any, initial_state: Any = None, mask: Any = None, training: bool | None = None
    ) -> Any:
        """Runs the layer."""
        initial = self._check_state(initial_state)
        inputs, mask = self._prepare(inputs, mask)
        gates = self._gates(inputs)
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
        states = linear_recurrence(forget, added * candidate, initial)
        outputs = states if self.pooling == "f" else ops.sigmoid(gates[2]) * states
        return self._give(outputs, states, mask)

    def _gates(self, inputs: Any) -> list[Any]:
        padded = ops.pad(inputs, [[0, 0], [self.kernel_size - 1, 0], [0, 0]])
        gates = ops.conv(padded, self.kernel, padding="valid", data_format="channels_last")
        if self.bias is not None:
            gates = gates + self.bias
        return ops.split(gates, _GATES[self.pooling], axis=-1)

    def count_macs(self, input_shape: Any) -> int:
        """MACs of the convolution, for the whole batch."""
        batch, time, features = sequence_shape(input_shape)
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
class SRU(LightRecurrent):
    """Simple recurrent unit (Lei et al. 2018).

    "Simple Recurrent Units for Highly Parallelizable Recurrence":

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
        highway_scale: alpha; by default sqrt(1 + 2 exp(highway_bias)), which keeps the variance
            (section 3.2): 1.73 for 0.
        highway_bias: what b_r begins with, b in the paper; below 0 the inputs pass at first, as
            deep stacks like it.
        activation: of the state on its way out; the paper's 2018 form has none.
        unroll: writes the steps out instead of looping, as static int8 export needs it with
            `recurrent_gates`; the number of steps must then be known.
        use_bias: whether the gates have biases.
        kernel_initializer: of the kernel [features, 3 or 4 times units]; the paper's is uniform
            with variance 1 / features.
        bias_initializer: of b_f.
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
        highway_bias: float = 0.0,
        unroll: bool = False,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "lecun_uniform",
        bias_initializer: Any = "zeros",
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
        check_number("highway_bias", highway_bias)
        if highway_scale is not None:
            check_number("highway_scale", highway_scale)
        if highway_bias and not use_bias:
            raise ValueError(
                f"highway_bias is what a bias begins with, but got {highway_bias!r} with "
                "use_bias=False. Leave one of them out."
            )
        self.recurrent_gates = recurrent_gates
        self.highway_scale = highway_scale
        self.highway_bias = highway_bias
        self.unroll = unroll

    @property
    def _scale(self) -> float:
        if self.highway_scale is not None:
            return self.highway_scale
        return math.sqrt(1.0 + 2.0 * math.exp(self.highway_bias))

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
        self.bias = self._add_bias("bias", 2 * self.units, self._initial_biases)
        self.reset_vector = None
        if not self.recurrent_gates:
            return
        self.reset_vector = self._vector(self.add_weight, "reset_vector")
        cell = GatedCell(self.units, self._vector, dtype=self.dtype_policy)
        self._loop = keras.layers.RNN(
            cell, return_sequences=True, unroll=self.unroll, dtype=self.dtype_policy
        )
        self._loop.build((None, None, 2 * self.units))

    def _initial_biases(self, shape: Any, dtype: Any = None) -> Any:
        forget = self.bias_initializer((shape[0] // 2,), dtype=dtype)
        reset = ops.full((shape[0] // 2,), self.highway_bias, dtype=dtype)
        return ops.concatenate([forget, reset])

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
        initial = self._check_state(initial_state)
        inputs, mask = self._prepare(inputs, mask)
        products = ops.split(
            ops.matmul(inputs, self.kernel), self.kernel.shape[-1] // self.units, axis=-1
        )
        candidate, forget, reset = products[:3]
        highway = products[3] if len(products) == 4 else inputs
        if self.bias is not None:
            forget_bias, reset_bias = ops.split(self.bias, 2)
            forget, reset = forget + forget_bias, reset + reset_bias
        counts = None if mask is None else ops.cast(ops.expand_dims(mask, -1), forget.dtype)
        if self.reset_vector is None:
            added = 1.0 - ops.sigmoid(forget)
            if counts is not None:
                added = added * counts
            states = linear_recurrence(1.0 - added, added * candidate, initial)
        else:
            if initial is None:
                initial = ops.zeros_like(candidate[:, 0])
            given = [candidate, forget] if counts is None else [candidate, forget, counts]
            states = self._loop(ops.concatenate(given, axis=-1), initial_state=initial)
            before = ops.concatenate([ops.expand_dims(initial, 1), states[:, :-1]], axis=1)
            reset = reset + self.reset_vector * before
        reset = ops.sigmoid(reset)
        outputs = reset * self.activation(states) + (1.0 - reset) * (self._scale * highway)
        return self._give(outputs, states, mask)

    def count_macs(self, input_shape: Any) -> int:
        """MACs of the product with the kernel, for the whole batch."""
        batch, time, features = sequence_shape(input_shape)
        matrices = 3 if features == self.units else 4
        return int(batch * time * features * matrices * self.units)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        own = {
            "recurrent_gates": self.recurrent_gates,
            "highway_scale": self.highway_scale,
            "highway_bias": self.highway_bias,
            "unroll": self.unroll,
        }
        return {**super().get_config(), **own}
