"""The grid of a rounded kernel: its step for each output, found by the error that it costs."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_SHARES = np.linspace(0.4, 1.0, 61)
# A weight this close to the end of the grid, in steps, is at the end.
_AT_END = 1e-3


def largest_integer(bits: int) -> int:
    """Returns the largest of the integers of a symmetric grid, which are -q to q."""
    return int(2 ** (bits - 1) - 1)


def weight_scales(weight: Array, bits: int, importance: Array | None = None) -> Array:
    """Returns the step for each output that costs the least squared error.

    Shares of the largest weight are tried for the end of the grid; weights beyond it are clipped.

    Args:
        weight: [groups, k, n].
        bits: of a rounded weight.
        importance: [groups, k, 1] of an error, such as the mean square of the input that a weight
            is multiplied with; by default all alike.

    Returns:
        [groups, 1, n].
    """
    largest = np.abs(weight).max(axis=1, keepdims=True)
    largest = np.where(largest > 0, largest, 1.0)
    best, best_error = largest, np.full(largest.shape, np.inf)
    for share in _SHARES[::-1]:
        scale = share * largest / largest_integer(bits)
        error = (weight - round_to(weight, scale, bits)) ** 2
        if importance is not None:
            error = error * importance
        total = error.sum(axis=1, keepdims=True)
        better = total < best_error
        best, best_error = np.where(better, scale, best), np.where(better, total, best_error)
    return best


def round_to(weight: Array, scale: Array, bits: int) -> Array:
    """Returns the nearest weights on the grid."""
    end = largest_integer(bits)
    return np.clip(np.rint(weight / scale), -end, end) * scale


def at_end(weight: Array, scale: Array, bits: int) -> Array:
    """Says which weights are at an end of the grid or beyond.

    The runtime, and `FakeQuantizeWeights`, read the step of a kernel off its largest weight. So at
    least one weight of each output has to stay at the end of the grid.
    """
    return np.abs(weight) >= (largest_integer(bits) - _AT_END) * scale
