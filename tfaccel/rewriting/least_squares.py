"""A convolution as depthwise and pointwise convolution, fitted to what it reads and should give."""

import numpy as np

from tfaccel.rewriting.decomposition import Array

# Of the mean diagonal. Held-out error is much lower with few samples, and no higher with many.
_DAMPING = 1e-2
_TINY = 1e-30
_SETTLED = 1e-4


def split_channels(kernel: Array, multiplier: int) -> tuple[Array, Array]:
    """Returns the nearest depthwise-separable kernel: a truncated SVD for each input channel.

    Args:
        kernel: [taps, input channels, output channels].
        multiplier: depthwise outputs for each input channel, the rank of each SVD.

    Returns:
        Depthwise [taps, input channels, multiplier], of norm 1, and pointwise [input channels,
        multiplier, output channels].
    """
    left, values, right = np.linalg.svd(kernel.transpose(1, 0, 2), full_matrices=False)
    depthwise = left[:, :, :multiplier].transpose(1, 0, 2)
    return depthwise, values[:, :multiplier, np.newaxis] * right[:, :multiplier]


class SeparableFit:
    """Least squares of |y - y'|², where y' is depthwise and pointwise convolution of patches x.

    Only second moments are kept: memory does not grow with the data, but with (taps * input
    channels)² numbers.

    Args:
        kernel: [taps, input channels, output channels] of the convolution to stand for.
        biased: whether y' may have a bias.
    """

    def __init__(self, kernel: Array, biased: bool) -> None:
        self._taps, self._channels, self._filters = kernel.shape
        self._biased = biased
        size = self._taps * self._channels
        self._gram = np.zeros((size, size))
        self._cross = np.zeros((size, self._filters))
        self._power = 0.0
        self._count = 0
        self._x = np.zeros(size)
        self._y = np.zeros(self._filters)

    def add(self, patches: Array, targets: Array) -> None:
        """Adds data.

        Args:
            patches: [samples, taps, input channels].
            targets: [samples, output channels], what should come out.
        """
        x = patches.reshape(len(patches), -1)
        self._gram += x.T @ x
        self._cross += x.T @ targets
        self._power += float(np.sum(targets**2))
        self._count += len(x)
        self._x += x.sum(axis=0)
        self._y += targets.sum(axis=0)

    def solve(
        self, depthwise: Array, pointwise: Array, rounds: int
    ) -> tuple[Array, Array, Array, list[float]]:
        """Improves a separable kernel by solving for one factor at a time.

        Each half of a round is a linear least-squares problem, so that the error falls; rounds end
        early when it hardly does.

        Args:
            depthwise: [taps, input channels, multiplier], where to begin.
            pointwise: [input channels, multiplier, output channels], likewise.
            rounds: at most so many times the depthwise factor is solved for; at 0 only the
                pointwise factor is, once.

        Returns:
            Depthwise, pointwise, bias [output channels], zero if there is none, and the share of
            the outputs' power that is lost: at the beginning, then after each solution.
        """
        gram, cross, power = self._centred()
        if not power > 0:  # nothing but the bias to fit to
            return depthwise, pointwise, self._bias(depthwise, pointwise), [0.0]
        errors = [_error(gram, cross, power, depthwise, pointwise)]
        best = depthwise, pointwise
        steps = [_solve_pointwise, *[_solve_depthwise, _solve_pointwise] * rounds]
        for number, step in enumerate(steps):
            trial = step(gram, cross, *best)
            error = _error(gram, cross, power, *trial)
            if error > errors[-1]:
                break  # what is left is rounding
            best = _normalized(*trial)
            errors.append(error)
            whole_round = step is _solve_pointwise and number > 0
            if whole_round and errors[-3] - error <= _SETTLED * errors[-3]:
                break
        return *best, self._bias(*best), errors

    def _centred(self) -> tuple[Array, Array, float]:
        gram, cross, power = self._gram, self._cross, self._power
        if self._biased and self._count:
            gram = gram - np.outer(self._x, self._x) / self._count
            cross = cross - np.outer(self._x, self._y) / self._count
            power = power - float(np.sum(self._y**2)) / self._count
        shape = (self._taps, self._channels)
        return gram.reshape(*shape, *shape), cross.reshape(*shape, self._filters), power

    def _bias(self, depthwise: Array, pointwise: Array) -> Array:
        if not (self._biased and self._count):
            return np.zeros(self._filters)
        kernel = np.einsum("tcm,cmn->tcn", depthwise, pointwise).reshape(-1, self._filters)
        return (self._y - self._x @ kernel) / self._count


def _error(gram: Array, cross: Array, power: float, depthwise: Array, pointwise: Array) -> float:
    within, against = _through(gram, cross, depthwise)
    flat = pointwise.reshape(len(within), -1)
    lost = power - 2 * float(np.sum(against * flat)) + float(np.sum(flat * (within @ flat)))
    return max(0.0, lost / power)


def _through(gram: Array, cross: Array, depthwise: Array) -> tuple[Array, Array]:
    """Returns the moments of what comes out of the depthwise convolution."""
    size = depthwise.shape[1] * depthwise.shape[2]
    half = np.einsum("tcm,tcue->cmue", depthwise, gram)
    within = np.einsum("cmue,uel->cmel", half, depthwise).reshape(size, size)
    against = np.einsum("tcm,tcn->cmn", depthwise, cross).reshape(size, -1)
    return within, against


def _solve_pointwise(
    gram: Array, cross: Array, depthwise: Array, pointwise: Array
) -> tuple[Array, Array]:
    within, against = _through(gram, cross, depthwise)
    start = pointwise.reshape(against.shape)
    return depthwise, _solve(within, against, start).reshape(pointwise.shape)


def _solve_depthwise(
    gram: Array, cross: Array, depthwise: Array, pointwise: Array
) -> tuple[Array, Array]:
    taps, channels, multiplier = depthwise.shape
    size = taps * channels * multiplier
    between = np.einsum("cmn,eln->cmel", pointwise, pointwise)
    matrix = gram[:, :, np.newaxis, :, :, np.newaxis] * between[:, :, np.newaxis]
    against = np.einsum("tcn,cmn->tcm", cross, pointwise)
    start = depthwise.reshape(size, 1)
    solution = _solve(matrix.reshape(size, size), against.reshape(size, 1), start)
    return solution.reshape(depthwise.shape), pointwise


def _solve(matrix: Array, right: Array, start: Array) -> Array:
    """Solves normal equations by a step from `start` that is damped (Levenberg 1944).

    What the data do not determine stays as it is, and the error never rises.
    """
    damped = matrix.copy()
    damped.flat[:: len(matrix) + 1] += _DAMPING * np.trace(matrix) / len(matrix) + _TINY
    return start + np.linalg.solve(damped, right - matrix @ start)


def _normalized(depthwise: Array, pointwise: Array) -> tuple[Array, Array]:
    """Moves the scale of each depthwise kernel to the pointwise one: quantization likes it even."""
    norms = np.linalg.norm(depthwise, axis=0)
    norms[norms == 0] = 1.0
    return depthwise / norms, pointwise * norms[:, :, np.newaxis]
