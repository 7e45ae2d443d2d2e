"""How the weights of a layer are rounded: to the nearest, or as its outputs want it (AdaRound)."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.checks import check_fraction, check_positive
from tfaccel.core.configurable import Configurable
from tfaccel.core.registry import Registry
from tfaccel.quantization.grids import at_end, largest_integer, round_to, weight_scales
from tfaccel.quantization.sequential import LayerProblem

Array = npt.NDArray[Any]

# Louizos et al. 2018: the sigmoid is stretched to these, then clipped to [0, 1].
ZETA, GAMMA = 1.1, -0.1
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # Adam's


@runtime_checkable
class Rounding(Protocol):
    """Puts the kernel of a layer on its grid.

    Attributes:
        sequential: whether it needs what the layer gets from the quantized layers before it.
    """

    sequential: bool

    def round_weight(self, problem: LayerProblem) -> Array:
        """Returns the rounded weight, [groups, k, n]; each output keeps one at an end."""


ROUNDINGS: Registry[Rounding] = Registry("rounding", Rounding)  # type: ignore[type-abstract]


@ROUNDINGS.register("nearest")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class Nearest(Configurable):
    """To the nearest level, of the grid that costs the least squared error of the weights."""

    sequential = False

    def round_weight(self, problem: LayerProblem) -> Array:
        """Returns the nearest weights on the grid."""
        scale = weight_scales(problem.weight, problem.bits)
        return round_to(problem.weight, scale, problem.bits)


@ROUNDINGS.register("adaround")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class AdaRound(Configurable):
    """Rounds each weight up or down, whichever serves the output of the layer (Nagel et al. 2020).

    Minimizes |f(W x + b) - f(W~ x^ + b)|^2 + lambda sum_i (1 - |2 h(V_i) - 1|^beta) over V, with
    W~ = s clip(floor(W / s) + h(V)), h the rectified sigmoid, x^ what the quantized layers before
    give, and f the activation (eqs. 21 to 25). Beta is annealed, so that h ends at 0 or 1.

    Attributes:
        steps: of Adam, for each layer.
        batch_size: positions of each step.
        learning_rate: Adam's.
        regularization: lambda.
        warm_up: share of the steps before the regularizer sets in, in [0, 1).
        beta_start: of the annealing.
        beta_end: likewise.

    Raises:
        TypeError: an argument is no number.
        ValueError: an argument is out of range.

    References:
        Nagel et al. 2020, Up or Down? Adaptive Rounding for Post-Training Quantization.
    """

    sequential = True

    steps: int = 1000
    batch_size: int = 512
    learning_rate: float = 1e-2
    regularization: float = 1e-2
    warm_up: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "warm_up":
                check_fraction(field.name, value)
            else:
                check_positive(field.name, value)

    def beta(self, step: int) -> float:
        """Returns the annealed exponent (a cosine from start to end), 0 for none in warm-up."""
        first = self.warm_up * self.steps
        if step < first:
            return 0.0
        done = (step - first) / (self.steps - first)
        return self.beta_end + (self.beta_start - self.beta_end) * (1 + np.cos(np.pi * done)) / 2

    def round_weight(self, problem: LayerProblem) -> Array:
        """Returns the weights, rounded up or down as the outputs of the layer want it."""
        return _Search(self, problem).run()


class _Search:
    """The minimization for one layer; its gradients are written out, so that no framework is."""

    def __init__(self, how: AdaRound, problem: LayerProblem) -> None:
        self._how = how
        self._bias = problem.bias
        self._activation = problem.activation
        self._inputs = problem.inputs
        self._target = activate(problem.float_outputs(), problem.activation)
        self._end = largest_integer(problem.bits)
        self._scale = weight_scales(problem.weight, problem.bits).astype(np.float32)
        steps = problem.weight / self._scale
        self._floor = np.floor(steps)
        # Zeros of a pruned kernel stay zeros, and the largest weights give the grid its step.
        stays = at_end(problem.weight, self._scale, problem.bits) | (problem.weight == 0)
        self._fixed = np.clip(np.rint(steps), -self._end, self._end)
        self._free = ~stays
        share = np.clip((steps - self._floor - GAMMA) / (ZETA - GAMMA), 1e-4, 1 - 1e-4)
        self._v = np.log(share / (1 - share)).astype(np.float32)
        self._means = np.zeros_like(self._v)
        self._squares = np.zeros_like(self._v)
        self._random = np.random.default_rng(problem.seed)

    def run(self) -> Array:
        how, places = self._how, self._inputs.shape[1]
        size = min(how.batch_size, places)
        for step in range(how.steps):
            chosen = self._random.integers(places, size=size)
            gradient = self._gradient(self._inputs[:, chosen], self._target[:, chosen], step)
            self._update(gradient, step)
        raised = np.where(self._free, self._floor + (self._v >= 0), self._fixed)
        return np.clip(raised, -self._end, self._end) * self._scale

    def _gradient(self, x: Array, target: Array, step: int) -> Array:
        """Returns the gradient by V of the mean over places, summed over outputs."""
        sigmoid = 1 / (1 + np.exp(-self._v))
        stretched = sigmoid * (ZETA - GAMMA) + GAMMA
        h = np.clip(stretched, 0, 1)
        level = self._floor + h
        weight = np.where(self._free, np.clip(level, -self._end, self._end), self._fixed)
        outputs = np.matmul(x, weight * self._scale) + self._bias
        error = activate(outputs, self._activation) - target
        error *= slope(outputs, self._activation) * (2 / x.shape[1])
        by_h = np.matmul(np.swapaxes(x, 1, 2), error) * self._scale
        by_h *= np.abs(level) <= self._end
        beta = self._how.beta(step)
        if beta:
            apart = 2 * h - 1
            fall = np.abs(apart) ** (beta - 1) * np.sign(apart)
            by_h -= (2 * beta * self._how.regularization) * fall
        inside = (stretched > 0) & (stretched < 1) & self._free
        result: Array = by_h * inside * sigmoid * (1 - sigmoid) * (ZETA - GAMMA)
        return result

    def _update(self, gradient: Array, step: int) -> None:
        self._means += (1 - _BETA1) * (gradient - self._means)
        self._squares += (1 - _BETA2) * (gradient**2 - self._squares)
        mean = self._means / (1 - _BETA1 ** (step + 1))
        square = self._squares / (1 - _BETA2 ** (step + 1))
        self._v -= self._how.learning_rate * mean / (np.sqrt(square) + _EPSILON)


def activate(values: Array, activation: str) -> Array:
    """Returns what an activation that is computed in one with a layer makes of its outputs."""
    if activation == "linear":
        return values
    return np.clip(values, 0, 6 if activation == "relu6" else None)


def slope(values: Array, activation: str) -> Array:
    """Returns the derivative of `activate`."""
    if activation == "linear":
        return np.ones_like(values)
    return ((values > 0) & ((values < 6) | (activation != "relu6"))).astype(values.dtype)
