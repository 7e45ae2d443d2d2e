"""Rounding one weight after the other, the rest making up for each error (GPTQ)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.checks import check_positive, check_type
from tfaccel.core.configurable import Configurable
from tfaccel.quantization.grids import at_end, largest_integer, weight_scales
from tfaccel.quantization.rounding import ROUNDINGS
from tfaccel.quantization.sequential import LayerProblem

Array = npt.NDArray[Any]

# Shares of the step that is best for each weight alone, tried where a kernel has few rows.
_SHARES, _FEW_ROWS = (1.0, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2), 384
_BLOCK = 64  # rows whose updates of the rest are made in one product


@ROUNDINGS.register("gptq")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class GPTQ(Configurable):
    """Second-order rounding, by the Hessian X^T X of a layer's squared output error.

    Weights are rounded one input after the other, that of the largest Hessian first; the error of
    each is made up for by the inputs that are left (Frantar et al. 2022, GPTQ, after Optimal Brain
    Quantization). Before that the kernel is moved to what gives the float outputs best from the
    inputs that the quantized layers give, within the damping: rounding alone would keep the errors
    of the layers before.

    Both lean on what the data say of the inputs together, which for many inputs and few samples is
    little. So the damping that is added to the Hessian's diagonal is the one with which the moved
    kernel does best on the last quarter of the samples, of which it has not seen any.

    Attributes:
        dampings: shares of the mean of the Hessian's diagonal to choose the damping from.
        correct_inputs: whether the kernel is moved first.
        sweeps: how often each weight is looked at again, the others rounded (Behdin et al. 2023,
            QuantEase), which can only lower the error.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there is no damping, or one is not above zero.
    """

    sequential = True

    dampings: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    correct_inputs: bool = True
    sweeps: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "dampings", tuple(self.dampings))
        if not self.dampings:
            raise ValueError("GPTQ needs at least one damping, but dampings is empty.")
        for damping in self.dampings:
            check_positive("dampings", damping)
        check_type("correct_inputs", self.correct_inputs, bool)

    def round_weight(self, problem: LayerProblem) -> Array:
        """Returns the weights, rounded by the Hessian of each group."""
        problem = weighed(problem)
        damping = choose_damping(problem, self.dampings)
        fit = _Fit(problem.inputs, problem.float_inputs, problem.weight)
        hessian = fit.damped(damping)
        weight = problem.weight.astype(np.float64)
        if self.correct_inputs:
            weight = np.where(weight == 0, 0.0, fit.moved(damping))
        diagonal = np.einsum("gkk->gk", hessian)
        scale = weight_scales(weight, problem.bits, diagonal[:, :, np.newaxis])
        shares = _SHARES if weight.shape[1] <= _FEW_ROWS else (1.0,)
        # With a larger step no weight would be at the end of the grid, see `at_end`.
        largest = np.abs(weight).max(axis=1, keepdims=True) / largest_integer(problem.bits)
        largest = np.where(largest > 0, largest, scale)
        best, least = weight, np.full(scale.shape, np.inf)
        for share in shares:
            step = np.minimum(share * scale, largest)
            rounded = round_by_hessian(weight, hessian, step, problem.bits)
            rounded = descend(rounded, weight, hessian, step, problem.bits, self.sweeps)
            wrong = rounded - weight
            error = (wrong * np.matmul(hessian, wrong)).sum(axis=1, keepdims=True)
            best, least = np.where(error < least, rounded, best), np.minimum(error, least)
        return best


def weighed(problem: LayerProblem) -> LayerProblem:
    """Returns the problem with each place scaled by how much an error there counts.

    Squared errors are then weighed by what the activation leaves of them: exactly where a group has
    one output, as in depthwise convolutions, and by the mean over the outputs elsewhere, as they
    share one Hessian.
    """
    if problem.activation == "linear":
        return problem
    factor = np.sqrt(problem.importance().mean(axis=2, keepdims=True))
    return dataclasses.replace(
        problem,
        inputs=problem.inputs * factor,
        float_inputs=problem.float_inputs * factor,
    )


class _Fit:
    """The kernel that gives the float outputs from other inputs, by least squares with damping."""

    def __init__(self, inputs: Array, float_inputs: Array, weight: Array) -> None:
        turned = np.swapaxes(inputs, 1, 2)
        samples = inputs.shape[1]
        self._weight = weight.astype(np.float64)
        self._hessian = (np.matmul(turned, inputs) / samples).astype(np.float64)
        missing = (np.matmul(turned, float_inputs - inputs) / samples).astype(np.float64)
        self._gain = np.matmul(missing, self._weight)

    def damped(self, damping: float) -> Array:
        """Returns the Hessian, a share of the mean of its diagonal added to the diagonal."""
        mean = np.einsum("gkk->g", self._hessian) / self._hessian.shape[1]
        # An input that is always zero says nothing: its weights are rounded to the nearest.
        added = damping * np.where(mean > 0, mean, 1.0)
        result: Array = self._hessian + added[:, np.newaxis, np.newaxis] * np.eye(
            self._hessian.shape[1]
        )
        return result

    def moved(self, damping: float) -> Array:
        """Returns W + (X^T X + d I)^-1 X^T (X_float - X) W."""
        return self._weight + np.linalg.solve(self.damped(damping), self._gain)


def choose_damping(problem: LayerProblem, dampings: Sequence[float]) -> float:
    """Returns the damping with which a kernel fitted to the first 3/4 of the samples does best.

    Args:
        problem: its samples stand in the order of the data, so that the last are of other data.
        dampings: to choose from.
    """
    samples = problem.inputs.shape[1]
    cut = samples - samples // 4
    if len(dampings) == 1 or cut == samples:
        return dampings[0]
    fit = _Fit(problem.inputs[:, :cut], problem.float_inputs[:, :cut], problem.weight)
    seen, wanted = problem.inputs[:, cut:], problem.float_inputs[:, cut:]
    target = np.matmul(wanted, problem.weight)

    def error(damping: float) -> float:
        return float(np.mean((np.matmul(seen, fit.moved(damping)) - target) ** 2))

    return min(dampings, key=error)


def round_by_hessian(weight: Array, hessian: Array, scale: Array, bits: int) -> Array:
    """Rounds the rows of kernels in turn, each error made up for by the rows that are left.

    Args:
        weight: [groups, k, n].
        hessian: [groups, k, k], positive definite.
        scale: [groups, 1, n] step of the grid.
        bits: of a rounded weight.

    Returns:
        The rounded weight. Zeros stay zeros, and what is at an end of the grid stays there.
    """
    groups, rows, _ = weight.shape
    order = np.argsort(-np.einsum("gkk->gk", hessian), axis=1, kind="stable")
    each = np.arange(groups)[:, np.newaxis]
    left = weight[each, order]
    hessian = hessian[each[:, :, np.newaxis], order[:, :, np.newaxis], order[:, np.newaxis, :]]
    # H^-1 = U^T U: row i of U holds how the rest makes up for row i (Frantar et al., step 3).
    upper = np.swapaxes(np.linalg.cholesky(np.linalg.inv(hessian)), 1, 2)
    stays = at_end(left, scale, bits) | (left == 0)
    end = largest_integer(bits)
    fixed = np.clip(np.rint(left / scale), -end, end)
    integers = np.zeros_like(left)
    for begin in range(0, rows, _BLOCK):
        stop = min(begin + _BLOCK, rows)
        errors = np.zeros_like(left[:, begin:stop])
        for row in range(begin, stop):
            free = np.clip(np.rint(left[:, row] / scale[:, 0]), -end, end)
            integers[:, row] = np.where(stays[:, row], fixed[:, row], free)
            wrong = left[:, row] - integers[:, row] * scale[:, 0]
            error = wrong / upper[:, row, row, np.newaxis]
            errors[:, row - begin] = error
            inside = upper[:, row, row + 1 : stop, np.newaxis]
            left[:, row + 1 : stop] -= inside * error[:, np.newaxis]
        behind = np.swapaxes(upper[:, begin:stop, stop:], 1, 2)
        left[:, stop:] -= np.matmul(behind, errors)
    result = np.empty_like(weight)
    result[each, order] = integers * scale
    return result


def descend(
    rounded: Array, weight: Array, hessian: Array, scale: Array, bits: int, sweeps: int
) -> Array:
    """Rounds each weight again in turn, to the level that is best with all others as they are.

    Args:
        rounded: [groups, k, n] on the grid.
        weight: [groups, k, n] what it stands for.
        hessian: [groups, k, k], positive definite.
        scale: [groups, 1, n] step of the grid.
        bits: of a rounded weight.
        sweeps: over all weights.

    Returns:
        The rounded weight, its error (W~ - W)^T H (W~ - W) no larger in any output.
    """
    end = largest_integer(bits)
    stays = at_end(weight, scale, bits) | (weight == 0)
    result = rounded.copy()
    slope = np.matmul(hessian, result - weight)  # half the gradient
    step = scale[:, 0]
    for _ in range(sweeps):
        for row in range(weight.shape[1]):
            own = hessian[:, row, row, np.newaxis]
            best = result[:, row] - slope[:, row] / own
            level = np.clip(np.rint(best / step), -end, end) * step
            change = np.where(stays[:, row], 0.0, level - result[:, row])
            if change.any():
                result[:, row] += change
                slope += hessian[:, :, row, np.newaxis] * change[:, np.newaxis]
    return result
