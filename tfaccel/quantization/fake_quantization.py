"""Rounding in training as the integer runtime will round: for weights and for activations.

Values are rounded to the grid of the integers and back, and the gradient passes as if nothing had
happened (straight-through estimator, Bengio et al. 2013). Scale and zero point are TFLite's:
weights symmetric per output channel, real = scale * integer with integers in [-127, 127];
activations per tensor, real = scale * (integer - zero_point), with zero exactly on the grid (Jacob
et al. 2018, section 3).
"""

import dataclasses
from typing import Any, ClassVar

import keras

from tfaccel.core.checks import check_fraction, check_in
from tfaccel.core.graph import Graph, map_models
from tfaccel.core.transforms import QUANTIZE, WeightTransform

BITS = range(2, 9)
# A factor of -1 is simplified away by the converter, together with the negation behind it.
_BARELY_BEYOND_MINUS_ONE = -1 - 2**-23


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(eq=False)
class FakeQuantizeWeights(WeightTransform):
    """Rounds a weight to a symmetric grid, one scale for each slice along `axes`.

    The scale is max |w| / (2^(bits-1) - 1), so that it has no state. Since it is linear in w,
    rounding commutes with the factor that batch-norm folding puts on a channel: the folded kernel
    lies on the grid that the runtime reads from it. Zeros stay zeros.

    Args:
        axes: the axes that have a scale of their own: output channels, or () for one scale in all.
        bits: 2 to 8.

    Raises:
        ValueError: `bits` is out of range.
    """

    stage: ClassVar[int] = QUANTIZE

    axes: tuple[int, ...] = (-1,)
    bits: int = 8

    def __post_init__(self) -> None:
        check_in("bits", self.bits, BITS)
        self.axes = tuple(self.axes)

    def scale(self, weight: Any) -> Any:
        """Returns the step of the grid, of the weight's rank with size 1 along the other axes."""
        kept = {axis % len(weight.shape) for axis in self.axes}
        others = tuple(axis for axis in range(len(weight.shape)) if axis not in kept)
        largest = keras.ops.max(keras.ops.abs(weight), axis=others, keepdims=True)
        # An all-zero channel has any scale.
        largest = keras.ops.where(largest > 0, largest, keras.ops.ones_like(largest))
        return largest / (2 ** (self.bits - 1) - 1)

    def __call__(self, weight: Any, training: bool | None = None) -> Any:  # noqa: ARG002
        """Returns the rounded weight; the gradient passes straight through."""
        return weight + keras.ops.stop_gradient(self.finalize(weight) - weight)

    def finalize(self, weight: Any) -> Any:
        """Returns the rounded weight, exactly on the grid."""
        scale = self.scale(weight)
        return keras.ops.round(weight / scale) * scale


@keras.saving.register_keras_serializable("tfaccel")
class FakeQuantize(keras.layers.Layer):
    """Rounds an activation to the grid of its range, which it learns from what it sees in training.

    The range is an exponential moving average of each batch's minimum and maximum, begun with the
    first batch and always containing zero (Jacob et al. 2018, section 3.1). Values outside are
    clipped, and get no gradient. Before the first training batch values pass unchanged.

    Args:
        bits: 2 to 8.
        momentum: share of the old range in the new one after each batch, in [0, 1).
        fixed_range: (minimum, maximum) that is not learnt, for operators whose range the runtime
            prescribes, such as softmax.
        name: of the layer.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        bits: int = 8,
        momentum: float = 0.99,
        fixed_range: tuple[float, float] | None = None,
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
        self.supports_masking = True
        low, high = self.fixed_range or (0.0, 0.0)
        constant = keras.initializers.Constant
        self.minimum = self._add_number("minimum", constant(low))
        self.maximum = self._add_number("maximum", constant(high))
        self.batches = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False, name="batches"
        )
        self.built = True

    def _add_number(self, name: str, initializer: Any) -> keras.Variable:
        return self.add_weight(
            shape=(),
            dtype="float32",
            initializer=initializer,
            trainable=False,
            autocast=False,
            name=name,
        )

    @property
    def calibrated(self) -> bool:
        """Whether the range is known: it is fixed, or a training batch was seen."""
        return self.fixed_range is not None or int(keras.ops.convert_to_numpy(self.batches)) > 0

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Rounds `inputs`, after learning from them in training; any shape, any float type."""
        # Ranges are float32 under mixed precision too: half the digits would move the grid.
        values = keras.ops.cast(inputs, "float32")
        if self.fixed_range is not None:
            rounded = _fake_quantize(values, *self.fixed_range, self.bits)
            return keras.ops.cast(rounded, inputs.dtype)
        if training:
            low, high = self._observe(keras.ops.stop_gradient(values))
            return keras.ops.cast(_fake_quantize(values, low, high, self.bits), inputs.dtype)
        low, high = (keras.ops.convert_to_tensor(v) for v in (self.minimum, self.maximum))
        rounded = _fake_quantize(values, *_never_empty(low, high), self.bits)
        return keras.ops.cast(keras.ops.where(high > low, rounded, values), inputs.dtype)

    def _observe(self, values: Any) -> tuple[Any, Any]:
        """Moves the range towards that of `values`; returns it, or any if all was zero so far."""
        ops = keras.ops
        old = [ops.convert_to_tensor(v) for v in (self.minimum, self.maximum)]
        seen = ops.minimum(ops.min(values), 0.0), ops.maximum(ops.max(values), 0.0)
        begun = old[1] > old[0]
        moved = []
        for before, now in zip(old, seen, strict=True):
            # An overflow under float16 must not spoil the range for good.
            sound = ops.where(ops.isfinite(now), now, before)
            mean = self.momentum * before + (1 - self.momentum) * sound
            moved.append(ops.where(begun, mean, sound))
        self.minimum.assign(moved[0])
        self.maximum.assign(moved[1])
        self.batches.assign_add(1)
        return _never_empty(*moved)

    def set_range(self, low: float, high: float) -> None:
        """Sets the range as if it had been learnt; it is widened to contain zero."""
        self.minimum.assign(min(low, 0.0))
        self.maximum.assign(max(high, 0.0))
        self.batches.assign(keras.ops.maximum(self.batches, 1))

    def frozen(self) -> "FakeQuantize":
        """Returns a layer of the same name whose range is fixed to what this one has learnt.

        Raises:
            ValueError: nothing was learnt yet.
        """
        if not self.calibrated:
            raise ValueError(
                f"The range of {self.name!r} is not known yet: the quantization-aware model was "
                "never trained. Run model.fit on a few batches first."
            )
        low, high = (float(keras.ops.convert_to_numpy(v)) for v in (self.minimum, self.maximum))
        fixed = (low, high) if high > low else (0.0, 1.0)  # any, for what was always zero
        return FakeQuantize(self.bits, self.momentum, self.fixed_range or fixed, name=self.name)

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


def freeze_ranges(model: keras.Model) -> keras.Model:
    """Returns a quantization-aware model whose ranges no longer move.

    Raises:
        ValueError: a range was never learnt.
    """

    def edit(graph: Graph) -> None:
        for layer in graph.layers():
            if isinstance(layer, FakeQuantize):
                graph.replace_layer(layer, layer.frozen())

    return map_models(model, edit)


def _never_empty(low: Any, high: Any) -> tuple[Any, Any]:
    """Returns the range, or (0, 1) for an empty one: what was always zero is exact on any grid."""
    return low, keras.ops.where(high > low, high, low + 1.0)


def _fake_quantize(values: Any, low: Any, high: Any, bits: int) -> Any:
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
