"""Feed-forward over one part of the positions at a time."""

from typing import Any

import keras
from keras import layers, ops

from tfaccel.architectures.recomputation import in_turn, pull_back
from tfaccel.core.checks import check_positive, check_type


@keras.saving.register_keras_serializable("tfaccel")
class ChunkedFeedForward(layers.Layer):
    """Dense, activation, Dense, in chunks of the positions (Kitaev et al. 2020, section 3).

    The hidden activations, `units` wide, exist for one chunk at a time, in training too: there only
    the inputs are kept, and each chunk's hidden activations are computed again on the way back. The
    outputs are those of two Dense layers. The chunks are written out one after another, not in a
    loop, which an integer .tflite file could not have.

    Input and output: [batch, time, features]. A Keras mask goes on to the next layer.

    Args:
        units: width of the hidden layer.
        chunks: parts into which time is cut, the last one shorter if they do not come out even; not
            more than there are positions. 1 computes all at once, and keeps nothing either.
        activation: of the hidden layer.
        recompute: False keeps the hidden activations in training, for comparison.
        kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: a number is out of range, or the activation is not known.
    """

    def __init__(
        self,
        units: int,
        chunks: int = 8,
        *,
        activation: Any = "relu",
        recompute: bool = True,
        **kwargs: Any,
    ) -> None:
        for name, value in {"units": units, "chunks": chunks}.items():
            check_positive(name, value)
            check_type(name, value, int)
        super().__init__(**kwargs)
        self.units = units
        self.chunks = chunks
        self.activation = keras.activations.get(activation)
        self.recompute = recompute
        self.supports_masking = True

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes two kernels and two biases.

        Raises:
            ValueError: the input is not [batch, time, features], or the length of time is not known
                and there are several chunks.
        """
        if len(input_shape) != 3 or input_shape[-1] is None:
            raise ValueError(
                f"{self.name!r} needs inputs [batch, time, features], but got {input_shape}."
            )
        if input_shape[1] is None and self.chunks > 1:
            raise ValueError(
                f"{self.name!r} cuts the positions into {self.chunks} chunks, but their number is "
                "not known. Give keras.Input a fixed length, or use chunks=1."
            )
        features = input_shape[-1]
        for name, size, width in (("hidden", features, self.units), ("out", self.units, features)):
            kernel = self.add_weight(
                shape=(size, width), initializer="glorot_uniform", name=f"{name}_kernel"
            )
            bias = self.add_weight(shape=(width,), initializer="zeros", name=f"{name}_bias")
            setattr(self, f"{name}_kernel", kernel)
            setattr(self, f"{name}_bias", bias)
        super().build(input_shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Returns [batch, time, features]."""
        variables = (self.hidden_kernel, self.hidden_bias, self.out_kernel, self.out_bias)
        # Copies, since a gradient of our own may depend on tensors only.
        weights = [ops.copy(variable) for variable in variables]
        symbolic = isinstance(inputs, keras.KerasTensor)
        known_backend = keras.backend.backend() in ("tensorflow", "jax")
        if not (training and self.recompute and known_backend) or symbolic:
            return self._run(inputs, weights, training=False)

        @ops.custom_gradient
        def run(x: Any, *weights: Any) -> Any:
            def gradient(*upstream: Any) -> Any:
                return self._backwards(x, weights, upstream[0])

            return self._run(x, weights, training=True), gradient

        return run(inputs, *weights)

    def _bounds(self, time: int | None) -> list[tuple[int, int | None]]:
        if time is None or self.chunks == 1:
            return [(0, time)]
        length = -(-time // self.chunks)
        return [(begin, min(begin + length, time)) for begin in range(0, time, length)]

    def _run(self, x: Any, weights: Any, training: bool) -> Any:
        bounds = self._bounds(x.shape[1])
        outputs: list[Any] = []
        for begin, end in bounds:
            part = x[:, begin:end] if len(bounds) > 1 else x
            if outputs:
                (part,) = in_turn([part], outputs[-1:], compiled=training)
            outputs.append(self._feed_forward(part, *weights))
        return ops.concatenate(outputs, axis=1) if len(outputs) > 1 else outputs[0]

    def _feed_forward(
        self, x: Any, hidden_kernel: Any, hidden_bias: Any, out_kernel: Any, out_bias: Any
    ) -> Any:
        hidden = self.activation(ops.matmul(x, hidden_kernel) + hidden_bias)
        return ops.matmul(hidden, out_kernel) + out_bias

    def _backwards(self, x: Any, weights: Any, upstream: Any) -> list[Any]:
        """Returns the gradients with respect to `x` and the weights."""
        bounds = self._bounds(x.shape[1])
        parts: list[Any] = []
        totals: list[Any] = []
        for begin, end in bounds:
            part, dy = (z[:, begin:end] if len(bounds) > 1 else z for z in (x, upstream))
            if parts:
                part, dy = in_turn([part, dy], [parts[-1], *totals])
            _, (dx, *others) = pull_back(self._feed_forward, [part, *weights], dy)
            parts.append(dx)
            totals = [a + b for a, b in zip(totals, others, strict=True)] if totals else others
        dx = ops.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        return [dx, *totals]

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the shape of the input."""
        return tuple(input_shape)

    def count_macs(self, input_shape: tuple[int, ...]) -> int:
        """Returns the multiply-accumulates of one call."""
        batch, time, features = input_shape
        return 2 * batch * time * features * self.units

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {
            **super().get_config(),
            "units": self.units,
            "chunks": self.chunks,
            "activation": keras.activations.serialize(self.activation),
            "recompute": self.recompute,
        }
