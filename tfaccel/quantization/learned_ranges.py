"""Ranges that are trained by the gradient of the loss: steps of grids, and where ReLUs are clipped.

The step of a grid is trained after Esser et al. 2020 (Learned Step Size Quantization), the value at
which a ReLU is clipped after Choi et al. 2018 (PACT: Parameterized Clipping Activation for
Quantized Neural Networks).

What is trained is the change of a number that the first batch has set, so that the first batch may
set it on every backend, though a backend may let only the optimizer write what is trained.
"""

import dataclasses
import math
from typing import Any

import keras

from tfaccel.core.checks import check_number
from tfaccel.core.transforms import StateSpec
from tfaccel.quantization.fake_quantization import (
    FakeQuantize,
    FakeQuantizeWeights,
    fake_quantize,
    round_to_grid,
)

# A step or a clipping value does not fall below this share of where it began.
_LEAST_SHARE = 1e-3


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(eq=False)
class LearnedStepWeights(FakeQuantizeWeights):
    """Rounds a weight to a symmetric grid whose steps are trained (Esser et al. 2020, eq. 1 to 5).

    w' = s * round(clip(w / s, -q, q)), q = 2^(bits-1) - 1, with the gradients of the paper: 1 to w
    inside the grid and 0 beyond; to s round(w / s) - w / s inside and -q or q beyond, times
    1 / sqrt(n q) for the n weights of a step. A step begins at 2 E|w| / sqrt(q).

    Args:
        axes: as in `FakeQuantizeWeights`.
        bits: 2 to 8.
        symmetric: True; the paper's grid has no other form.
        block: as in `FakeQuantizeWeights`.

    Raises:
        ValueError: a number is out of range.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.symmetric:
            raise ValueError(
                "Learned steps (ranges='lsq') are for symmetric weights. Use ranges='ema' with a "
                "scheme that has symmetric_weights=False."
            )

    def state_spec(self, shape: tuple[int, ...], dtype: str) -> dict[str, StateSpec]:
        """Returns the steps, which are trained, and those that they are held at."""
        blocks = self._blocks(keras.ops.zeros(shape, dtype))
        summed = self._summed(len(blocks.shape))
        steps = tuple(1 if a in summed else int(n) for a, n in enumerate(blocks.shape))
        return {
            "step": StateSpec(steps, dtype, "ones", trainable=True),
            "held_step": StateSpec(steps, dtype, "zeros"),  # zero: not held
        }

    def initialize(self, weight: Any) -> None:
        """Sets the steps to 2 E|w| / sqrt(q)."""
        blocks = self._blocks(weight)
        axes = self._summed(len(blocks.shape))
        mean = keras.ops.mean(keras.ops.abs(blocks), axis=axes, keepdims=True)
        start = 2 * mean / math.sqrt(self.levels[1])
        self.state["step"].assign(keras.ops.where(mean > 0, start, keras.ops.ones_like(mean)))

    def hold(self) -> None:
        """Stops learning: from the next batch on the steps stay as they are."""
        step = keras.ops.convert_to_tensor(self.state["step"])
        self.state["held_step"].assign(keras.ops.maximum(step, keras.config.epsilon()))

    def _grid(self, blocks: Any) -> tuple[Any, Any]:  # noqa: ARG002
        step = keras.ops.convert_to_tensor(self.state["step"])
        held = keras.ops.convert_to_tensor(self.state["held_step"])
        # An optimizer with momentum goes on moving what gets no gradient any more.
        positive = keras.ops.where(held > 0, held, _at_least(step, keras.config.epsilon()))
        return positive + keras.ops.stop_gradient(self._stored(positive) - positive), None

    def integers(self, weight: Any) -> Any:
        """Returns the whole numbers q, as floats, that stand for the weight: q * scale."""
        blocks = self._blocks(weight)
        ratio = keras.ops.clip(blocks / self._grid(blocks)[0], *self.levels)
        return keras.ops.reshape(keras.ops.round(ratio), weight.shape)

    def __call__(self, weight: Any, training: bool | None = None) -> Any:  # noqa: ARG002
        """Returns the rounded weight, with the paper's gradients to weight and step."""
        blocks = self._blocks(weight)
        step = self._grid(blocks)[0]
        share = _weights_of_a_step(blocks.shape, step.shape)
        scaled = scale_gradient(step, 1 / math.sqrt(share * self.levels[1]))
        return keras.ops.reshape(_rounded(blocks, scaled, *self.levels), weight.shape)


def _at_least(value: Any, floor: Any) -> Any:
    """Returns the larger; the gradient flows all the same, for else it could not come back up."""
    stopped = keras.ops.stop_gradient
    return stopped(keras.ops.maximum(value, floor)) + (value - stopped(value))


def _weights_of_a_step(weights: Any, steps: Any) -> int:
    return math.prod(int(n) for n in weights) // math.prod(int(n) for n in steps)


def scale_gradient(value: Any, factor: Any) -> Any:
    """Returns `value`, to which a gradient flows `factor` times as strong."""
    return value * factor + keras.ops.stop_gradient(value * (1 - factor))


def _rounded(values: Any, step: Any, least: int, most: int) -> Any:
    """Returns step * round(clip(values / step)); rounding passes its gradient straight through."""
    ratio = keras.ops.clip(values / step, least, most)
    return step * (ratio + keras.ops.stop_gradient(keras.ops.round(ratio) - ratio))


def _rounded_by_tensorflow(values: Any, step: Any, bits: int, least: int, most: int) -> Any:
    """Returns the same as `_rounded` in a third of the passes over the values.

    TensorFlow's operator sums the gradients below and above its range; what is missing for the step
    is the sum of gradient * (rounded - value) / step inside.
    """
    import tensorflow as tf

    @tf.custom_gradient
    def compute(values: Any, step: Any) -> tuple[Any, Any]:
        ends = {"min": least * step, "max": most * step, "num_bits": bits}
        rounded = tf.quantization.fake_quant_with_min_max_vars(values, **ends)

        def gradient(upstream: Any) -> tuple[Any, Any]:
            to_values, below, above = tf.quantization.fake_quant_with_min_max_vars_gradient(
                upstream, values, **ends
            )
            inside = tf.tensordot(
                tf.reshape(to_values, [-1]), tf.reshape(rounded - values, [-1]), 1
            )
            return to_values, inside / step + least * below + most * above

        return rounded, gradient

    return compute(values, step)


class LearnedRange(FakeQuantize):
    """Rounds an activation to a grid given by one number that is trained.

    Subclasses say where the number begins, and what the grid is for it.
    """

    def _add_state(self) -> None:
        self._first = self._add_number("first")
        self._change = self._add_number("change", trainable=True)

    @property
    def learned(self) -> Any:
        """The number that is trained, [] float32; 0 before the first training batch."""
        return self._learned(keras.ops.convert_to_tensor(self._first))

    def _learned(self, first: Any) -> Any:
        moved = _at_least(first + keras.ops.convert_to_tensor(self._change), _LEAST_SHARE * first)
        # An optimizer with momentum goes on moving what gets no gradient any more.
        return keras.ops.where(keras.ops.convert_to_tensor(self.held) > 0, first, moved)

    @property
    def minimum(self) -> Any:
        """The lower end of the range that is learnt, [] float32."""
        return self._ends(self.learned)[0]

    @property
    def maximum(self) -> Any:
        """The upper end of the range that is learnt, [] float32."""
        return self._ends(self.learned)[1]

    def _learn(self, values: Any) -> Any:
        """Returns the number to use for a training batch, which may be the first."""
        ops = keras.ops
        known = ops.convert_to_tensor(self._first)
        still = ops.stop_gradient(values)
        first = ops.cond(known > 0, lambda: known, lambda: self._begin(still))
        # A first batch with an overflow under float16 is no beginning, nor is one of zeros.
        self._first.assign(ops.where(ops.isfinite(first), first, known))
        self.batches.assign_add(1)
        usable = ops.logical_and(ops.isfinite(first), first > 0)
        return self._learned(ops.where(usable, first, ops.ones_like(first)))

    def _begin(self, values: Any) -> Any:
        """Returns the number to begin with, for the values of the first batch."""
        raise NotImplementedError

    def _ends(self, learned: Any) -> tuple[Any, Any]:
        """Returns the range for a number."""
        raise NotImplementedError

    def hold_range(self) -> None:
        """Stops learning: from the next batch on the range stays as it is."""
        now = self.learned
        super().hold_range()
        self._first.assign(now)

    def _set(self, learned: float) -> None:
        self._first.assign(learned)
        self._change.assign(0.0)
        self.batches.assign(keras.ops.maximum(self.batches, 1))


@keras.saving.register_keras_serializable("tfaccel")
class LearnedStep(LearnedRange):
    """Rounds an activation to a grid whose step is trained (Esser et al. 2020, eq. 1 to 5).

    x' = s * round(clip(x / s, -n, p)), with n = 0 and p = 2^bits - 1 for values that are not below
    zero, else n = 2^(bits-1) and p = n - 1. The step begins at 2 E|x| / sqrt(p) of the first
    batch, and its gradient is multiplied by 1 / sqrt(f p) for the f features of a sample.

    Args:
        bits: 2 to 8, or 16.
        nonnegative: says that no value is below zero, as behind a ReLU.
        name: of the layer.

    Raises:
        ValueError: an argument is out of range.
    """

    @property
    def _levels(self) -> tuple[int, int]:
        if self.nonnegative and not self.symmetric:
            return 0, 2**self.bits - 1
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def _begin(self, values: Any) -> Any:
        return 2 * keras.ops.mean(keras.ops.abs(values)) / math.sqrt(self._levels[1])

    def _ends(self, learned: Any) -> tuple[Any, Any]:
        least, most = self._levels
        return least * learned, most * learned

    def _round_in_training(self, values: Any) -> Any:
        features = math.prod(int(n or 1) for n in values.shape[1:])
        factor = 1 / math.sqrt(features * self._levels[1])
        step = scale_gradient(self._learn(values), factor)
        if keras.backend.backend() == "tensorflow":
            return _rounded_by_tensorflow(values, step, self.bits, *self._levels)
        return _rounded(values, step, *self._levels)

    def set_range(self, low: float, high: float) -> None:
        """Sets the step so that the grid reaches as far as both ends."""
        least, most = self._levels
        self._set(max(high / most, low / least if least else 0.0))


@keras.saving.register_keras_serializable("tfaccel")
class LearnedClipping(LearnedRange):
    """Rounds what a ReLU gives, clipped at a value that is trained (Choi et al. 2018, eq. 1 to 3).

    x' = round(clip(x, 0, a) * q / a) * a / q with q = 2^bits - 1. The gradient to a is 1 from each
    value that is clipped, else 0, and `decay` * a^2 is added to the loss. It begins at the largest
    value of the first batch, where nothing is clipped.

    Args:
        bits: 2 to 8, or 16.
        decay: of the clipping value (the paper's lambda), not below 0.
        name: of the layer.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, bits: int = 8, decay: float = 1e-4, **kwargs: Any) -> None:
        check_decay(decay)
        super().__init__(bits, **{**kwargs, "nonnegative": True})
        self.decay = decay

    def _begin(self, values: Any) -> Any:
        return keras.ops.max(values)

    def _ends(self, learned: Any) -> tuple[Any, Any]:
        return keras.ops.zeros_like(learned), learned

    def _round_in_training(self, values: Any) -> Any:
        clipping = self._learn(values)
        if self.decay:
            held = keras.ops.convert_to_tensor(self.held) > 0
            self.add_loss(keras.ops.where(held, 0.0, self.decay) * keras.ops.square(clipping))
        if keras.backend.backend() == "tensorflow":
            # TensorFlow's operator has this very gradient to the end of its range.
            return fake_quantize(values, 0.0, clipping, self.bits)
        return round_to_grid(values, keras.ops.zeros_like(clipping), clipping, self.bits)

    def set_range(self, low: float, high: float) -> None:  # noqa: ARG002
        """Sets the clipping value."""
        self._set(max(high, 0.0))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "decay": self.decay}


def check_decay(decay: float) -> None:
    """Raises unless `decay` is a number from zero on."""
    check_number("decay", decay)
    if decay < 0:
        raise ValueError(f"decay must not be below 0, but got {decay!r}.")
