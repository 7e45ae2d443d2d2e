"""Reversible residual blocks: training in memory that does not grow with depth."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers, ops

from tfaccel.architectures.recomputation import Repeatable, call_options, in_turn
from tfaccel.core.checks import check_type

Layers = Sequence[tuple[layers.Layer, layers.Layer]]


@keras.saving.register_keras_serializable("tfaccel")
class ReversibleBlocks(layers.Layer):
    """A stack of reversible residual blocks (Kitaev et al. 2020, section 3; Gomez et al. 2017).

    Each block (f, g) computes y1 = x1 + f(x2), y2 = x2 + g(y1) (eq. 9), so that its inputs follow
    from its outputs: x2 = y2 - g(y1), x1 = y1 - f(x2) (eq. 10). In training only the outputs of the
    last block are kept; on the way back each block's inputs and activations are computed again,
    with the same dropout, hashes and other random choices. That costs one more forward pass.

    Streams are kept in the type of the variables (float32 under mixed precision), since every
    rounding of a sum makes the recomputed inputs less exact; f and g compute in their own type.
    Works on TensorFlow and JAX; on other backends activations are kept.

    Input and output: a pair of [batch, time, features], or of any other shape that f and g keep. A
    Keras mask of the first is handed to f and g where they support masking.

    Args:
        blocks: pairs (f, g) of layers whose output has the shape of their input: any Keras layers,
            keras.Sequential among them, as long as they draw random numbers from generators of
            their own and add no losses.
        recompute: False keeps all activations, for comparison.
        kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Raises:
        TypeError: a block is not made of layers.
        ValueError: there is no block, or one is not a pair.
    """

    def __init__(self, blocks: Layers, *, recompute: bool = True, **kwargs: Any) -> None:
        pairs = [tuple(block) for block in blocks]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"blocks must be pairs (f, g), at least one, but got {blocks!r}.")
        for layer in (layer for pair in pairs for layer in pair):
            check_type("each f and g of blocks", layer, layers.Layer)
        policy = keras.dtype_policies.get(kwargs.pop("dtype", None) or keras.config.dtype_policy())
        super().__init__(dtype=policy.variable_dtype, autocast=False, **kwargs)
        self.supports_masking = True
        self.recompute = recompute
        self.functions = [layer for pair in pairs for layer in pair]

    def build(self, input_shape: Sequence[tuple[int | None, ...]]) -> None:
        """Builds f and g of each block.

        Raises:
            ValueError: the input is no pair of equal shapes.
        """
        shapes = [tuple(shape) for shape in input_shape]
        if len(shapes) != 2 or shapes[0] != shapes[1]:
            raise ValueError(
                f"{self.name!r} needs a pair of tensors of the same shape, but got {input_shape}."
            )
        for function in self.functions:
            if not function.built:
                function.build(shapes[0])
        super().build(input_shape)

    def call(self, inputs: Sequence[Any], mask: Any = None, training: bool | None = None) -> Any:
        """Returns [y1, y2] of the last block."""
        x1, x2 = (ops.cast(x, self.variable_dtype) for x in inputs)
        seen = mask[0] if isinstance(mask, (list, tuple)) else mask
        if seen is not None:
            # New tensors, without a mask that f and g would complain of.
            x1, x2 = ops.copy(x1), ops.copy(x2)
        known_backend = keras.backend.backend() in ("tensorflow", "jax")
        symbolic = isinstance(x1, keras.KerasTensor)
        if training and self.recompute and known_backend and not symbolic:
            return self._run_and_forget(x1, x2, seen)
        for f, g in self.pairs:
            x1 = x1 + self._run(f, x2, seen, training)
            x2 = x2 + self._run(g, x1, seen, training)
        return [x1, x2]

    @property
    def pairs(self) -> list[tuple[layers.Layer, layers.Layer]]:
        """The blocks (f, g)."""
        return list(zip(self.functions[::2], self.functions[1::2], strict=True))

    def _run(self, function: layers.Layer, x: Any, mask: Any, training: bool | None) -> Any:
        y = function(x, **call_options(function, training, mask))
        return ops.cast(y, self.variable_dtype)

    def _run_and_forget(self, x1: Any, x2: Any, mask: Any) -> list[Any]:
        calls = [Repeatable(function, True, mask) for function in self.functions]
        weights = _unique(variable for call in calls for variable in call.trainable)
        states = _unique(variable for call in calls for variable in call.states)
        # Read out here, in front of the function whose gradient is ours: it then depends on tensors
        # only, and their gradients go on to the variables by themselves.
        values = {key: ops.copy(v) for key, v in (weights | states).items()}

        @ops.custom_gradient
        def run(x1: Any, x2: Any, *given: Any) -> Any:
            used = dict(zip(weights, given, strict=True))
            current = {key: values[key] for key in states}
            y1, y2 = x1, x2
            for f, g in _paired(calls):
                y1 = y1 + _first(f, y2, used, current)
                y2 = y2 + _first(g, y1, used, current)
            outputs = (y1, y2, *current.values())

            def gradient(*upstream: Any) -> Any:
                if keras.backend.backend() == "jax":
                    (upstream,) = upstream  # the tuple that comes out, as one
                return _backwards(calls, (y1, y2), upstream[:2], used)

            return outputs, gradient

        y1, y2, *after = run(x1, x2, *(values[key] for key in weights))
        for (key, variable), value in zip(states.items(), after, strict=True):
            if value is not values[key]:
                variable.assign(value)
        return [y1, y2]

    def compute_output_shape(self, input_shape: Any) -> list[tuple[int | None, ...]]:
        """Returns the shapes of the input."""
        return [tuple(shape) for shape in input_shape]

    def get_config(self) -> dict[str, Any]:
        """Returns the blocks, serialized."""
        config = super().get_config()
        config["blocks"] = [
            [keras.saving.serialize_keras_object(layer) for layer in pair] for pair in self.pairs
        ]
        config["recompute"] = self.recompute
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ReversibleBlocks":
        """Returns the layer that `get_config` described."""
        blocks = [
            [keras.saving.deserialize_keras_object(layer) for layer in pair]
            for pair in config["blocks"]
        ]
        return cls(**{**config, "blocks": blocks})


def _unique(variables: Any) -> dict[int, keras.Variable]:
    return {id(variable): variable for variable in variables}


def _paired(calls: Sequence[Repeatable]) -> list[tuple[Repeatable, Repeatable]]:
    return list(zip(calls[::2], calls[1::2], strict=True))


def _first(call: Repeatable, x: Any, weights: dict[int, Any], states: dict[int, Any]) -> Any:
    """Runs a layer for the first time and writes its states down."""
    y, after = call.first(
        x, [weights[id(v)] for v in call.trainable], [states[id(v)] for v in call.states]
    )
    states.update({id(v): value for v, value in zip(call.states, after, strict=True)})
    return y


def _backwards(
    calls: Sequence[Repeatable],
    outputs: tuple[Any, Any],
    upstream: Sequence[Any],
    weights: dict[int, Any],
) -> list[Any]:
    """Goes from the outputs of the last block to the inputs of the first.

    Returns:
        Gradients with respect to x1, x2 and the weights.
    """
    y1, y2 = outputs
    dy1, dy2 = upstream
    totals: dict[int, Any] = {}

    def undo(call: Repeatable, x: Any, dy: Any) -> tuple[Any, Any, list[Any]]:
        y, dx, gradients = call.gradients(x, [weights[id(v)] for v in call.trainable], dy)
        for variable, gradient in zip(call.trainable, gradients, strict=True):
            key = id(variable)
            totals[key] = totals[key] + gradient if key in totals else gradient
        return y, dx, gradients

    for f, g in reversed(_paired(calls)):
        out, dx, gradients = undo(g, y1, dy2)
        # Else the inputs of all blocks would be found first, and all activations held until their
        # turn comes.
        streams = [y1, y2 - out, dy1 + dx, dy2]
        y1, y2, dy1, dy2 = in_turn(streams, [dx, *gradients])
        out, dx, gradients = undo(f, y2, dy1)
        streams = [y1 - out, y2, dy1, dy2 + dx]
        y1, y2, dy1, dy2 = in_turn(streams, [dx, *gradients])
    return [dy1, dy2, *(totals[key] for key in weights)]
