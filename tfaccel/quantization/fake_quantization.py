"""Rounding in training as the integer runtime will round: for weights and for activations.

Values are rounded to the grid of the integers and back, and the gradient passes as if nothing had
happened (straight-through estimator, Bengio et al. 2013). Scale and zero point are TFLite's:
weights symmetric per output channel, real = scale * integer with integers in [-127, 127];
activations per tensor, real = scale * (integer - zero_point), with zero exactly on the grid (Jacob
et al. 2018, section 3). Ranges follow the values here; `tfaccel.quantization.learned_ranges` has
those that are trained by the gradient.
"""

from typing import Any

import keras

from tfaccel.core.checks import check_fraction, check_in
from tfaccel.quantization.rounded_weights import FakeQuantizeWeights
from tfaccel.quantization.schemes import LOW_BITS

__all__ = [
    "Dequantize",
    "FakeQuantize",
    "FakeQuantizeWeights",
    "Floor",
    "fake_quantize",
    "never_empty",
    "round_to_grid",
]

BITS = (*LOW_BITS, 16)
# A factor of -1 is simplified away by the converter, together with the negation behind it.
_BARELY_BEYOND_MINUS_ONE = -1 - 2**-23


@keras.saving.register_keras_serializable("tfaccel")
class FakeQuantize(keras.layers.Layer):
    """Rounds an activation to the grid of its range, which it learns from what it sees in training.

    The range is an exponential moving average of each batch's minimum and maximum, begun with the
    first batch and always containing zero (Jacob et al. 2018, section 3.1). Values outside are
    clipped, and get no gradient. Before the first training batch values pass unchanged.

    Args:
        bits: 2 to 8, or 16.
        momentum: share of the old range in the new one after each batch, in [0, 1).
        fixed_range: (minimum, maximum) that is not learnt, for operators whose range the runtime
            prescribes, such as softmax.
        symmetric: whether the range reaches as far below zero as above, by -2^(bits-1) and
            2^(bits-1) - 1 steps.
        nonnegative: says that no value is below zero, as behind a ReLU.
        name: of the layer.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        bits: int = 8,
        momentum: float = 0.99,
        fixed_range: tuple[float, float] | None = None,
        *,
        symmetric: bool = False,
        nonnegative: bool = False,
        **kwargs: Any,
    ) -> None:
        check_in("bits", bits, BITS)
        check_fraction("momentum", momentum)
        if fixed_range is not None and not (
            fixed_range[0] <= 0 <= fixed_range[1] and fixed_range[0] < fixed_range[1]
        ):
            raise ValueError(
                f"fixed_range must be (minimum, maximum) around zero, but got {fixed_range!r}."
            )
        super().__init__(**{**kwargs, "autocast": False})
        self.bits = bits
        self.momentum = momentum
        self.fixed_range = None if fixed_range is None else (fixed_range[0], fixed_range[1])
        self.symmetric = symmetric
        self.nonnegative = nonnegative
        self.supports_masking = True
        self._add_state()
        self.batches = self._add_number("batches", dtype="int32")
        self.held = self._add_number("held", dtype="int32")
        self.built = True

    def _add_state(self) -> None:
        low, high = self.fixed_range or (0.0, 0.0)
        self._low = self._add_number("minimum", low)
        self._high = self._add_number("maximum", high)

    def _add_number(
        self, name: str, value: float = 0, *, dtype: str = "float32", trainable: bool = False
    ) -> keras.Variable:
        return self.add_weight(
            shape=(),
            dtype=dtype,
            initializer=keras.initializers.Constant(value),
            trainable=trainable,
            autocast=False,
            name=name,
        )

    @property
    def minimum(self) -> Any:
        """The lower end of the range that is learnt, [] float32."""
        return self._low

    @property
    def maximum(self) -> Any:
        """The upper end of the range that is learnt, [] float32."""
        return self._high

    @property
    def calibrated(self) -> bool:
        """Whether the range is known: it is fixed, or a training batch was seen."""
        return self.fixed_range is not None or int(keras.ops.convert_to_numpy(self.batches)) > 0

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Rounds `inputs`, after learning from them in training; any shape, any float type."""
        # Ranges are float32 under mixed precision too: half the digits would move the grid.
        values = keras.ops.cast(inputs, "float32")
        if self.fixed_range is not None:
            rounded = fake_quantize(values, *self.fixed_range, self.bits)
        elif training:
            rounded = self._round_in_training(values)
        else:
            low, high = (keras.ops.convert_to_tensor(v) for v in (self.minimum, self.maximum))
            rounded = fake_quantize(values, *never_empty(low, high), self.bits)
            rounded = keras.ops.where(high > low, rounded, values)
        return keras.ops.cast(rounded, inputs.dtype)

    def _round_in_training(self, values: Any) -> Any:
        low, high = self._observe(keras.ops.stop_gradient(values))
        return fake_quantize(values, low, high, self.bits)

    def _observe(self, values: Any) -> tuple[Any, Any]:
        """Moves the range towards that of `values`; returns it, or any if all was zero so far."""
        ops = keras.ops
        old = [ops.convert_to_tensor(v) for v in (self._low, self._high)]
        # What is not below zero anyway need not be looked through for it.
        least = 0.0 if self.nonnegative else ops.minimum(ops.min(values), 0.0)
        seen = self._widened(least, ops.maximum(ops.max(values), 0.0))
        learning = ops.where(old[1] > old[0], 1 - self.momentum, 1.0)
        share = ops.where(ops.convert_to_tensor(self.held) > 0, 0.0, learning)
        moved = []
        for before, now in zip(old, seen, strict=True):
            # An overflow under float16 must not spoil the range for good.
            sound = ops.where(ops.isfinite(now), now, before)
            moved.append(before + share * (sound - before))
        self._low.assign(moved[0])
        self._high.assign(moved[1])
        self.batches.assign_add(1)
        return never_empty(*moved)

    def _widened(self, low: Any, high: Any) -> tuple[Any, Any]:
        """Returns the range that is kept for one that was seen."""
        if not self.symmetric:
            return low, high
        largest = keras.ops.maximum(-low, high)
        return -largest * (1 + 1 / (2 ** (self.bits - 1) - 1)), largest

    def set_range(self, low: float, high: float) -> None:
        """Sets the range as if it had been learnt; it is widened to contain zero."""
        ends = self._widened(min(low, 0.0), max(high, 0.0))
        self._low.assign(ends[0])
        self._high.assign(ends[1])
        self.batches.assign(keras.ops.maximum(self.batches, 1))

    def hold_range(self) -> None:
        """Stops learning: from the next batch on the range stays as it is."""
        self.held.assign(1)

    def frozen(self) -> "FakeQuantize":
        """Returns a layer of the same name whose range is fixed to what this one has learnt.

        A grid of fewer than 8 bits becomes the part of one of 8 bits, of the same step, that values
        from zero on can reach: its upper end clips, and the ReLU before it is the lower end.

        Raises:
            ValueError: nothing was learnt yet.
        """
        if not self.calibrated:
            raise ValueError(
                f"The range of {self.name!r} is not known yet: the quantization-aware model was "
                "never trained. Run model.fit on a few batches first."
            )
        low, high = (float(keras.ops.convert_to_numpy(v)) for v in (self.minimum, self.maximum))
        # Any range will do for what was always zero.
        low, high = self.fixed_range or ((low, high) if high > low else (0.0, 1.0))
        bits = self.bits
        if bits < 8 and self.nonnegative and not self.symmetric:
            low, bits = high - 255 * high / (2**bits - 1), 8
        return FakeQuantize(
            bits,
            self.momentum,
            (low, high),
            symmetric=self.symmetric,
            nonnegative=self.nonnegative,
            name=self.name,
        )

    def strip_layer(self) -> None:
        """Says that nothing stands in its place in a plain model."""

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the input's shape."""
        return input_shape

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:  # noqa: ARG002
        """Returns the input's shape and type."""
        return keras.KerasTensor(inputs.shape, inputs.dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "bits": self.bits,
            "momentum": self.momentum,
            "fixed_range": self.fixed_range,
            "symmetric": self.symmetric,
            "nonnegative": self.nonnegative,
        }


@keras.saving.register_keras_serializable("tfaccel")
class Dequantize(keras.layers.Layer):
    """Ends the integers: what reads its output is computed in float on the edge as well.

    Without it the converter reaches past the last rounded value: it makes integers of the layers
    behind it, rounds weights that were not trained for that, and clips what it joins to the range
    of one input. An operation that it has no integers for, and that it does not simplify away,
    stops it. The output equals the input within the last digit of a float.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "autocast": False})
        self.supports_masking = True
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Returns `inputs`; any shape, any float type."""
        return inputs if training else -(inputs * _BARELY_BEYOND_MINUS_ONE)

    def strip_layer(self) -> None:
        """Says that nothing stands in its place in a plain model."""

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the input's shape."""
        return input_shape

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:  # noqa: ARG002
        """Returns the input's shape and type."""
        return keras.KerasTensor(inputs.shape, inputs.dtype)


@keras.saving.register_keras_serializable("tfaccel")
class Floor(keras.layers.Layer):
    """Keeps in training what is rounded to zero from being divided by.

    For 1 / sqrt(0) the integer runtime gives the largest value that it has, and so does rounding
    behind an infinity. In training neither a range nor a gradient could be had of that, so zeros
    become one step of the grid, max / (2^bits - 1).

    Args:
        bits: of the grid, 2 to 8, or 16.
        name: of the layer.

    Raises:
        ValueError: `bits` is out of range.
    """

    def __init__(self, bits: int = 8, **kwargs: Any) -> None:
        check_in("bits", bits, BITS)
        super().__init__(**{**kwargs, "autocast": False})
        self.bits = bits
        self.supports_masking = True
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Returns `inputs`; any shape, any float type, not below zero."""
        if not training:
            return inputs
        step = keras.ops.stop_gradient(keras.ops.max(inputs)) / (2**self.bits - 1)
        return keras.ops.maximum(inputs, keras.ops.maximum(step, keras.config.epsilon()))

    def strip_layer(self) -> None:
        """Says that nothing stands in its place in a plain model."""

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the input's shape."""
        return input_shape

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:  # noqa: ARG002
        """Returns the input's shape and type."""
        return keras.KerasTensor(inputs.shape, inputs.dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "bits": self.bits}


def never_empty(low: Any, high: Any) -> tuple[Any, Any]:
    """Returns the range, or (0, 1) for an empty one: what was always zero is exact on any grid."""
    return low, keras.ops.where(high > low, high, low + 1.0)


def fake_quantize(values: Any, low: Any, high: Any, bits: int) -> Any:
    """Rounds float32 values to 2^bits levels between low and high, by the backend's best means."""
    if keras.backend.backend() == "tensorflow":
        # The one operation that the converter reads as "this tensor is quantized so".
        import tensorflow as tf

        return tf.quantization.fake_quant_with_min_max_vars(values, low, high, num_bits=bits)
    return round_to_grid(values, low, high, bits)


def round_to_grid(values: Any, low: Any, high: Any, bits: int) -> Any:
    """Rounds to 2^bits levels between low and high, both moved so that zero is a level.

    What TensorFlow's `fake_quant_with_min_max_vars` computes, for the other backends.

    Args:
        values: float32 of any shape.
        low: at most 0.
        high: above 0.
        bits: 2 to 8.
    """
    ops = keras.ops
    levels = 2**bits - 1
    scale = (high - low) / levels
    zero_point = ops.clip(ops.round(-low / scale), 0, levels)
    low, high = -zero_point * scale, (levels - zero_point) * scale
    clipped = ops.clip(values, low, high)
    # floor(x + 1/2), as TensorFlow's kernel rounds.
    rounded = ops.floor((clipped - low) / scale + 0.5) * scale + low
    return clipped + ops.stop_gradient(rounded - clipped)
