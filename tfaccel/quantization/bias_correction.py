"""Biases that take back the mean error of rounding (Nagel et al. 2019, section 4.2)."""

from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.checks import check_in
from tfaccel.quantization.moments import Moments, spread
from tfaccel.quantization.patches import to_matrices
from tfaccel.quantization.sequential import LayerProblem

Array = npt.NDArray[Any]

EMPIRICAL, ANALYTIC, NONE = "empirical", "analytic", "none"


def check_correction(correct_bias: str | bool) -> str:
    """Returns the name of a bias correction; True stands for "empirical", False for "none".

    Raises:
        ValueError: there is no such correction.
    """
    if isinstance(correct_bias, bool):
        return EMPIRICAL if correct_bias else NONE
    check_in("correct_bias", correct_bias, (EMPIRICAL, ANALYTIC, NONE, True, False))
    return correct_bias


def empirical_bias(problem: LayerProblem, rounded: Array) -> Array:
    """Returns the bias that takes back a rounded layer's mean error on the data.

    The mean of W x - W~ x^ is measured for each output, before the activation (Nagel et al. 2019,
    appendix D). Where the activation clips the float output, an error counts for a tenth.

    Args:
        problem: the layer in float, and what it gets.
        rounded: [groups, k, n] its kernel on the grid.

    Returns:
        [groups, 1, n].
    """
    missing = problem.float_outputs() - np.matmul(problem.inputs, rounded)
    weights = problem.importance()
    total = (missing * weights).sum(axis=1, keepdims=True)
    result: Array = total / weights.sum(axis=1, keepdims=True)
    return result


def analytic_bias(layer: Any, old_kernel: Array, new_kernel: Array, moments: Moments) -> Array:
    """Returns the bias that takes back (W - W~) E[x], by what batch norm says of x.

    Nagel et al. 2019, eq. 17: what is read is taken to be normal in each channel, clipped by its
    activation.

    Args:
        layer: one of `tfaccel.quantization.patches.AS_MATRICES` with a bias.
        old_kernel: in the layer's shape.
        new_kernel: likewise, rounded.
        moments: of the layer's input.

    Returns:
        [outputs].
    """
    lost = to_matrices(layer, np.asarray(old_kernel, np.float64) - new_kernel)
    bias: Array = keras.ops.convert_to_numpy(layer.bias)
    return bias + mean_of_lost(lost, moments).ravel()


def mean_of_lost(lost: Array, moments: Moments) -> Array:
    """Returns (W - W~) E[x], zeros where nothing is known of x.

    Args:
        lost: [groups, k, n] W - W~.
        moments: of the layer's input.

    Returns:
        [groups, 1, n].
    """
    if not moments.known:
        return np.zeros((len(lost), 1, lost.shape[2]))
    mean: Array = np.matmul(spread(moments.mean, lost), lost)
    return mean
