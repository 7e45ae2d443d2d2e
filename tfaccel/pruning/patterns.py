"""Which weights stand or fall together, and how many of them stand."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.configurable import Configurable
from tfaccel.core.registry import Registry

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


class Pattern(Configurable):
    """Base class: pools the scores of weights to units, selects units, spreads the choice."""

    def units(self, scores: Array) -> Array:
        """Returns the scores of one kernel's units, flat."""
        raise NotImplementedError(f"{type(self).__name__} must define units(scores).")

    def select(self, units: Array, sparsity: float) -> Mask:
        """Returns which units are kept."""
        return keep_largest(units, sparsity)

    def expand(self, kept: Mask, shape: tuple[int, ...]) -> Mask:
        """Returns the mask of a kernel of `shape` from the choice of its units."""
        raise NotImplementedError(f"{type(self).__name__} must define expand(kept, shape).")

    def masks(self, scores: Sequence[Array], sparsity: float) -> list[Mask]:
        """Returns the masks of kernels that are ranked together.

        Args:
            scores: of each kernel's weights, in the kernel's shape.
            sparsity: share of zeros over all of them, in [0, 1).

        Returns:
            For each kernel, True where a weight is kept.
        """
        units = [self.units(score) for score in scores]
        kept = self.select(np.concatenate(units), sparsity)
        ends = np.cumsum([unit.size for unit in units])[:-1]
        return [
            self.expand(part, score.shape)
            for part, score in zip(np.split(kept, ends), scores, strict=True)
        ]


PATTERNS: Registry[Pattern] = Registry("pattern", Pattern)


@PATTERNS.register("element")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class Element(Pattern):
    """Every weight for itself."""

    def units(self, scores: Array) -> Array:
        """Returns the scores themselves."""
        return scores.ravel()

    def expand(self, kept: Mask, shape: tuple[int, ...]) -> Mask:
        """Returns the choice in the kernel's shape."""
        return kept.reshape(shape)


def keep_count(size: int, sparsity: float) -> int:
    """Returns how many of `size` units are kept: TFMOT's number, at least one.

    TFMOT counts in float32 and rounds halves to even; the difference would show in the mask.

    >>> keep_count(10, 0.75), keep_count(6, 0.75), keep_count(3, 0.9)
    (2, 2, 1)
    """
    kept = np.float32(size) * (np.float32(1) - np.float32(sparsity))
    return min(max(int(np.round(kept)), 1), size)


def keep_largest(scores: Array, sparsity: float) -> Mask:
    """Returns True for the highest scores, exactly `keep_count` of them.

    Of equal scores the earlier ones are kept. TFMOT keeps all that equal the last one kept, and so
    more than it was asked for; without such a tie its mask is the same, bit for bit. A score that
    is not a number is kept, so that diverged training stays visible.

    Args:
        scores: [units].
        sparsity: share to drop, in [0, 1).

    >>> keep_largest(np.array([1.0, 5.0, 2.0, 5.0]), 0.5)
    array([False,  True, False,  True])
    """
    scores = np.where(np.isnan(scores), math.inf, scores)
    count = keep_count(scores.size, sparsity)
    threshold = np.partition(scores, scores.size - count)[scores.size - count]
    kept: Mask = scores > threshold
    ties = np.flatnonzero(scores == threshold)
    kept[ties[: count - int(kept.sum())]] = True
    return kept
