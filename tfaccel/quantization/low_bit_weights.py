"""Weights of one or two bits: what stands for a weight in training, and its gradient.

Every method keeps the raw weights in full precision, computes with f(w) of two or three values, and
passes the gradient on as its paper says (straight-through estimators, Bengio et al. 2013). The
value is exact in training too: two or three values a channel, to the last bit those that are baked.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import keras

from tfaccel.core.checks import check_fraction, check_in, check_positive
from tfaccel.core.registry import Registry
from tfaccel.core.transforms import QUANTIZE, StateSpec, WeightTransform

GRANULARITIES = ("channel", "layer")


@dataclasses.dataclass(frozen=True)
class Levels:
    """A weight of two or three values.

    Attributes:
        codes: int8 of the weight's shape: 1 where it is `positive`, -1 where `-negative`, else 0.
        positive: values that broadcast against the weight, one for each scale.
        negative: likewise.
    """

    codes: Any
    positive: Any
    negative: Any

    def values(self) -> Any:
        """Returns the weight that the codes stand for."""
        zeros = keras.ops.zeros_like(self.positive)
        below = keras.ops.where(self.codes < 0, -self.negative, zeros)
        return keras.ops.where(self.codes > 0, self.positive, below)


class LowBitWeights(WeightTransform):
    """A weight of two or three values for each scale.

    Attributes:
        bits: of a stored weight: 1 (two values) or 2 (three values).
        binary_inputs: whether the layer's inputs are to be signs too.
        input_scale: whether outputs are scaled by the size of the inputs that the signs lost.
    """

    stage: ClassVar[int] = QUANTIZE
    bits: ClassVar[int]
    binary_inputs: bool = False
    input_scale: bool = False

    def levels(self, weight: Any) -> Levels:
        """Returns the codes and scales of a weight, as they are baked."""
        raise NotImplementedError(f"{type(self).__name__} must define levels.")

    def finalize(self, weight: Any) -> Any:
        """Returns the weight, of two or three values for each scale."""
        return self.levels(weight).values()

    def copy_for(self, axes: Sequence[int], seed: int) -> "LowBitWeights":
        """Returns a new transform of the same settings for one weight.

        Args:
            axes: the output channels of the weight, where the method has a scale for each.
            seed: where the method draws lots.
        """
        given = {"axes": tuple(axes), "seed": seed}
        names = {field.name for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        new = {name: value for name, value in given.items() if name in names}
        return dataclasses.replace(self, **new)  # type: ignore[type-var]


LOW_BIT: Registry[LowBitWeights] = Registry("low-bit method", LowBitWeights)


def straight_through(value: Any, source: Any, slope: Any = 1.0) -> Any:
    """Returns `value` to the last bit, with the gradient `slope` towards `source`."""
    stop = keras.ops.stop_gradient
    return value + stop(slope) * (source - stop(source))


def _signs(weight: Any) -> Any:
    return keras.ops.cast(keras.ops.where(weight >= 0, 1, -1), "int8")


def _other_axes(weight: Any, axes: Sequence[int]) -> tuple[int, ...]:
    rank = len(weight.shape)
    kept = {axis % rank for axis in axes}
    return tuple(axis for axis in range(rank) if axis not in kept)


class _UnitSigns(LowBitWeights):
    """Weights that are +1 or -1; raw ones stay in [-1, 1]."""

    bits: ClassVar[int] = 1

    def levels(self, weight: Any) -> Levels:
        """Returns the signs (that of zero is +1), and 1 for the one scale."""
        one = keras.ops.ones((), weight.dtype)
        return Levels(_signs(weight), one, one)

    def __call__(self, weight: Any, training: bool | None = None) -> Any:  # noqa: ARG002
        """Returns the signs; the gradient passes straight through."""
        return straight_through(self.finalize(weight), weight)

    def constrain(self, weight: Any) -> Any:
        """Returns the raw weight, clipped: beyond ±1 it would only be harder to turn."""
        return keras.ops.clip(weight, -1.0, 1.0)


class _StateSeed(keras.random.SeedGenerator):
    """A seed generator whose state is a variable of the layer, so that it is saved with it."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def next(self, ordered: bool = True) -> Any:  # noqa: ARG002
        """Returns the current seed and moves on."""
        seed = keras.ops.copy(keras.ops.convert_to_tensor(self.state))
        self.state.assign(seed + keras.ops.convert_to_tensor([0, 1], dtype=self.state.dtype))
        return seed


@LOW_BIT.register("binary_connect")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(eq=False, kw_only=True)
class BinaryConnect(_UnitSigns):
    """Weights +1 or -1, inputs in float (Courbariaux et al. 2015, BinaryConnect).

    The gradient of the sign goes to the raw weight, which is clipped to [-1, 1] after each update
    (algorithm 1). The learning rate is not scaled by Glorot's coefficient, as the paper does beside
    it (section 2.5): Adam makes steps of one size whatever the scale.

    Args:
        stochastic: whether a weight is drawn in training, +1 with probability
            clip((w + 1) / 2, 0, 1) (eq. 2-3). Outside of training it is the sign all the same; the
            paper then uses the raw weight, which is no bit.
        seed: for the draws.
    """

    stochastic: bool = False
    seed: int = 0

    def state_spec(self, shape: tuple[int, ...], dtype: str) -> dict[str, StateSpec]:  # noqa: ARG002
        """Returns the state of the random numbers, where there are any."""
        if not self.stochastic:
            return {}
        kind = keras.random.SeedGenerator(0).state.dtype  # backends differ
        return {"random": StateSpec((2,), kind)}

    def initialize(self, weight: Any) -> None:  # noqa: ARG002
        """Begins the random numbers."""
        if self.stochastic:
            self.state["random"].assign([self.seed, 0])

    def __call__(self, weight: Any, training: bool | None = None) -> Any:
        """Returns the signs, drawn if need be; the gradient passes straight through."""
        if not (self.stochastic and training):
            return super().__call__(weight, training)
        draw = keras.random.uniform(
            weight.shape, dtype=weight.dtype, seed=_StateSeed(self.state["random"])
        )
        drawn = keras.ops.where(draw < (weight + 1) / 2, 1.0, -1.0)
        return straight_through(keras.ops.cast(drawn, weight.dtype), weight)


@LOW_BIT.register("binary_net")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(eq=False, kw_only=True)
class BinaryNet(_UnitSigns):
    """Weights and inputs +1 or -1 (Hubara et al. 2016, Binarized Neural Networks).

    The raw weight gets the gradient of its sign and is clipped to [-1, 1] after each update
    (algorithm 1); an input gets it where |x| <= 1 (eq. 4, hard tanh).
    """

    binary_inputs = True


@LOW_BIT.register("xnor")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(eq=False, kw_only=True)
class XNORNet(LowBitWeights):
    """Signs times one scale for each output channel, on signs of inputs (Rastegari et al. 2016).

    The scale is alpha = mean |w| (eq. 6). The gradient of a raw weight is that of its stand-in
    times 1/n + alpha * [|w| <= 1] (section 3.1), and raw weights stay in [-1, 1].

    Args:
        binary_inputs: False gives the Binary-Weight-Networks of the same paper.
        input_scale: whether outputs are multiplied by K, the mean |x| of the inputs that each sums
            over (eq. 11). The paper finds that it changes accuracy by less than 1 point (table 2).
        axes: the output channels of the weight.
    """

    bits: ClassVar[int] = 1
    binary_inputs: bool = True
    input_scale: bool = False
    axes: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        self.axes = tuple(self.axes)
        if self.input_scale and not self.binary_inputs:
            raise ValueError(
                "input_scale=True makes up for inputs that are signs, but got binary_inputs=False. "
                "Leave one of them out."
            )

    def levels(self, weight: Any) -> Levels:
        """Returns the signs and mean |w| of each output channel."""
        others = _other_axes(weight, self.axes)
        scale = keras.ops.mean(keras.ops.abs(weight), axis=others, keepdims=True)
        return Levels(_signs(weight), scale, scale)

    def __call__(self, weight: Any, training: bool | None = None) -> Any:  # noqa: ARG002
        """Returns scaled signs, with the paper's gradient."""
        levels = self.levels(weight)
        count = 1
        for axis in _other_axes(weight, self.axes):
            count *= weight.shape[axis]
        inside = keras.ops.cast(keras.ops.abs(weight) <= 1, weight.dtype)
        slope = 1 / count + levels.positive * inside
        return straight_through(keras.ops.stop_gradient(levels.values()), weight, slope)

    def constrain(self, weight: Any) -> Any:
        """Returns the raw weight, clipped: beyond ±1 it gets next to no gradient."""
        return keras.ops.clip(weight, -1.0, 1.0)


@LOW_BIT.register("twn")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(eq=False, kw_only=True)
class TernaryWeights(LowBitWeights):
    """Weights -a, 0 or +a, inputs in float (Li & Liu 2016, Ternary Weight Networks).

    A weight is 0 where |w| <= 0.7 mean |w| (eq. 6); a is the mean |w| of the others (eq. 5). The
    gradient passes straight through to the raw weight, which is not clipped.

    Args:
        threshold: 0.7 is the paper's, which is optimal for normal and near it for uniform weights.
        granularity: "channel" gives each output channel a threshold and a scale, "layer" all of
            them one.
        axes: the output channels of the weight.
    """

    bits: ClassVar[int] = 2
    threshold: float = 0.7
    granularity: str = "channel"
    axes: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        check_positive("threshold", self.threshold)
        check_in("granularity", self.granularity, GRANULARITIES)
        self.axes = tuple(self.axes)

    def levels(self, weight: Any) -> Levels:
        """Returns the three-valued codes and the scale of each channel, or of all."""
        ops = keras.ops
        others = _other_axes(weight, self.axes if self.granularity == "channel" else ())
        size = ops.abs(weight)
        limit = self.threshold * ops.mean(size, axis=others, keepdims=True)
        above = ops.cast(size > limit, weight.dtype)
        # A channel of zeros has nothing above, and any scale.
        count = ops.maximum(ops.sum(above, axis=others, keepdims=True), 1)
        scale = ops.sum(size * above, axis=others, keepdims=True) / count
        return Levels(ops.cast(ops.sign(weight) * above, "int8"), scale, scale)

    def __call__(self, weight: Any, training: bool | None = None) -> Any:  # noqa: ARG002
        """Returns the ternary weight; the gradient passes straight through."""
        return straight_through(keras.ops.stop_gradient(self.finalize(weight)), weight)


@LOW_BIT.register("ttq")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(eq=False, kw_only=True)
class TrainedTernary(LowBitWeights):
    """Weights -n, 0 or +p with trained n and p, inputs in float (Zhu et al. 2017, TTQ).

    A weight is 0 where |w| <= t max |w| (eq. 9). p and n get the sums of the gradients of the
    weights that they stand for (eq. 7; with the minus that -n of eq. 6 brings), the raw weight gets
    its stand-in's times p, 1 or n (eq. 8). Both scales begin at the mean |w| of their weights, one
    pair a layer.

    Args:
        threshold: t; 0.05 is the paper's.
    """

    bits: ClassVar[int] = 2
    threshold: float = 0.05

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold)

    def state_spec(self, shape: tuple[int, ...], dtype: str) -> dict[str, StateSpec]:  # noqa: ARG002
        """Returns the two scales, which train."""
        return {name: StateSpec((), dtype, "ones", True) for name in ("positive", "negative")}

    def initialize(self, weight: Any) -> None:
        """Begins the scales at the mean size of the weights that they stand for."""
        codes = self._codes(weight)
        for name, sign in (("positive", 1), ("negative", -1)):
            chosen = keras.ops.cast(codes == sign, weight.dtype)
            count = keras.ops.maximum(keras.ops.sum(chosen), 1)
            self.state[name].assign(keras.ops.sum(keras.ops.abs(weight) * chosen) / count)

    def levels(self, weight: Any) -> Levels:
        """Returns the three-valued codes and the two scales."""
        scales = (keras.ops.convert_to_tensor(self.state[n]) for n in ("positive", "negative"))
        return Levels(self._codes(weight), *scales)

    def __call__(self, weight: Any, training: bool | None = None) -> Any:  # noqa: ARG002
        """Returns the ternary weight, with the paper's gradients."""
        levels = self.levels(weight)
        slope = keras.ops.where(
            levels.codes > 0,
            levels.positive,
            keras.ops.where(levels.codes < 0, levels.negative, keras.ops.ones_like(weight)),
        )
        return straight_through(levels.values(), weight, slope)

    def _codes(self, weight: Any) -> Any:
        size = keras.ops.abs(weight)
        above = keras.ops.cast(size > self.threshold * keras.ops.max(size), weight.dtype)
        return keras.ops.cast(keras.ops.sign(weight) * above, "int8")
