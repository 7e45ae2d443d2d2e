"""Which weights stand or fall together, and how many of them stand.

Scores come as stacked matrices, [positions, inputs, outputs] (see `layouts`): a dense kernel
[inputs, outputs] has one position, a convolution one for each pixel of its window.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.checks import check_in, check_type
from tfaccel.core.configurable import Configurable
from tfaccel.core.registry import Registry

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


class Pattern(Configurable):
    """Base class: pools the scores of weights to units, ranks units, spreads the choice.

    A subclass is a frozen dataclass registered with Keras.
    """

    def units(self, scores: Array) -> Array:
        """Returns the scores of one kernel's units, flat.

        Args:
            scores: [positions, inputs, outputs], higher is worth more.
        """
        raise NotImplementedError(f"{type(self).__name__} must define units(scores).")

    def select(self, units: Array, sparsity: float) -> Mask:
        """Returns which units are kept."""
        return keep_largest(units, sparsity)

    def expand(self, kept: Mask, shape: tuple[int, ...]) -> Mask:
        """Returns the mask of a kernel of `shape` from the choice of its units."""
        raise NotImplementedError(f"{type(self).__name__} must define expand(kept, shape).")

    def check(self, sparsity: float) -> None:
        """Raises ValueError if a schedule must not end at this sparsity."""

    def masks(self, scores: Sequence[Array], sparsity: float) -> list[Mask]:
        """Returns the masks of kernels that are ranked together.

        Ranked together, each kernel keeps its best unit: one without any would cut the network. A
        unit then counts as many weights as it has, so that the share of zeros is that of weights.

        Args:
            scores: of each kernel's weights, [positions, inputs, outputs].
            sparsity: share of zeros over all of them, in [0, 1).

        Returns:
            For each kernel, True where a weight is kept.
        """
        units = [self.units(score) for score in scores]
        if len(units) == 1:
            return [self.expand(self.select(units[0], sparsity), scores[0].shape)]
        units = [unit.astype(np.float64) for unit in units]
        for unit in units:
            unit[np.argmax(unit)] = math.inf
        areas = [score.size / unit.size for score, unit in zip(scores, units, strict=True)]
        together = np.concatenate(units)
        if np.ptp(areas) == 0:
            kept = self.select(together, sparsity)
        else:
            sizes = np.repeat(areas, [unit.size for unit in units])
            kept = keep_heaviest(together, sizes, sparsity)
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
        return scores.flatten()

    def expand(self, kept: Mask, shape: tuple[int, ...]) -> Mask:
        """Returns the choice in the kernel's shape."""
        return kept.reshape(shape)


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class NofM(Pattern):
    """Of every m weights in a row along the inputs, n are kept ("2:4": Mishra et al. 2021).

    The groups are TFMOT's `sparsity_m_by_n` (which counts zeros: its (2, 4) is "2:4", its (1, 4) is
    "3:4"): consecutive inputs of one output at one position. Where m does not divide the inputs, a
    shorter group is left at the end, which keeps its n largest as well. A schedule may approach the
    share 1 - n/m from below: the weights that the pattern drops go in the order of their scores.

    Args:
        n: weights kept of each group.
        m: weights in a group.

    Raises:
        ValueError: not 0 < n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        check_type("n", self.n, int)
        check_type("m", self.m, int)
        if not 0 < self.n < self.m:
            raise ValueError(
                "A pattern n:m keeps n of every m weights, 0 < n < m, such as '2:4', but got "
                f"'{self.n}:{self.m}'."
            )

    def units(self, scores: Array) -> Array:
        """Returns the scores, infinite where the pattern keeps a weight in any case."""
        positions, inputs, outputs = scores.shape
        padded = np.pad(
            scores.transpose(0, 2, 1).astype(np.float64),
            [(0, 0), (0, 0), (0, -inputs % self.m)],
            constant_values=-math.inf,
        ).reshape(-1, self.m)
        # Of equal scores the earlier is kept, as by top_k; what is not a number counts as largest.
        order = np.argsort(np.where(np.isnan(padded), -math.inf, -padded), axis=1, kind="stable")
        np.put_along_axis(padded, order[:, : self.n], math.inf, axis=1)
        rows: Array = padded.reshape(positions, outputs, -1)[:, :, :inputs]
        return rows.transpose(0, 2, 1).flatten()

    def select(self, units: Array, sparsity: float) -> Mask:
        """Returns which weights are kept: those of the pattern and the best of the others."""
        return np.isposinf(units) | keep_largest(units, sparsity)

    def expand(self, kept: Mask, shape: tuple[int, ...]) -> Mask:
        """Returns the choice in the kernel's shape."""
        return kept.reshape(shape)

    def check(self, sparsity: float) -> None:
        """Raises ValueError unless the pattern is whole at this sparsity, 1 - n/m."""
        share = 1 - self.n / self.m
        if abs(sparsity - share) > 1e-6:
            raise ValueError(
                f"The pattern '{self.n}:{self.m}' makes {share:.4g} of the weights zero, but the "
                f"schedule ends at {sparsity:.4g}. Give a schedule that ends at {share:.4g}."
            )


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class Block(Pattern):
    """Blocks of weights, `height` inputs by `width` outputs, as TFMOT's `block_size`.

    TFLite holds a dense kernel transposed: its fast 1x4 blocks are "4x1" here, four inputs of one
    output. Where the block does not divide the kernel, the last ones are smaller. (TFMOT then
    scores blocks that are shifted by half of what is missing, if two or more rows are.)

    Args:
        height: inputs in a block.
        width: outputs in a block.
        pooling: "mean" or "max" of the scores in a block.

    Raises:
        ValueError: a side below 1, or an unknown pooling.
    """

    height: int
    width: int
    pooling: str = "mean"

    def __post_init__(self) -> None:
        check_type("height", self.height, int)
        check_type("width", self.width, int)
        check_in("pooling", self.pooling, ("mean", "max"))
        if min(self.height, self.width) < 1:
            raise ValueError(
                "A block has one input and one output at least, such as '4x1', but got "
                f"'{self.height}x{self.width}'."
            )

    def units(self, scores: Array) -> Array:
        """Returns the mean or largest score of each block."""
        positions, inputs, outputs = scores.shape
        padding = [(0, 0), (0, -inputs % self.height), (0, -outputs % self.width)]

        def blocks(values: Array, fill: float) -> Array:
            padded = np.pad(values, padding, constant_values=fill)
            down, across = padded.shape[1] // self.height, padded.shape[2] // self.width
            cut = padded.reshape(positions, down, self.height, across, self.width)
            return cut.transpose(0, 1, 3, 2, 4).reshape(-1, self.height * self.width)

        if self.pooling == "max":
            return blocks(scores, -math.inf).max(axis=1)
        count = blocks(np.ones_like(scores), 0).sum(axis=1)
        return blocks(scores, 0).sum(axis=1) / count

    def expand(self, kept: Mask, shape: tuple[int, ...]) -> Mask:
        """Returns the blocks spread over the kernel's shape."""
        positions, inputs, outputs = shape
        grid = kept.reshape(positions, -(-inputs // self.height), -(-outputs // self.width))
        spread = grid.repeat(self.height, axis=1).repeat(self.width, axis=2)
        return spread[:, :inputs, :outputs]


@PATTERNS.register("channel")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class Channel(Pattern):
    """All weights of an output together: a soft mask, the kernel keeps its shape.

    It shows what a loss of channels costs while they can still return. To make the network smaller,
    see `prune_channels`, which takes biases, batch norms and readers along.
    """

    def units(self, scores: Array) -> Array:
        """Returns the mean score of each output's weights."""
        return scores.mean(axis=(0, 1))

    def expand(self, kept: Mask, shape: tuple[int, ...]) -> Mask:
        """Returns the outputs spread over the kernel's shape."""
        return np.broadcast_to(kept, shape).copy()


@PATTERNS.family("n:m, such as '2:4'")
def _n_of_m(name: str) -> Pattern | None:
    found = re.fullmatch(r"(\d+):(\d+)", name)
    return NofM(int(found[1]), int(found[2])) if found else None


@PATTERNS.family("a block, such as '4x1'")
def _block(name: str) -> Pattern | None:
    found = re.fullmatch(r"(\d+)[x×](\d+)", name)  # noqa: RUF001
    return Block(int(found[1]), int(found[2])) if found else None


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


def keep_heaviest(scores: Array, sizes: Array, sparsity: float) -> Mask:
    """Returns True for the highest scores, as many as come nearest to a share of the weights.

    Args:
        scores: [units].
        sizes: [units], how many weights each has.
        sparsity: share of weights to drop, in [0, 1).

    >>> keep_heaviest(np.array([3.0, 2.0, 1.0]), np.array([1.0, 5.0, 2.0]), 0.25)
    array([ True,  True, False])
    """
    order = np.argsort(np.where(np.isnan(scores), -math.inf, -scores), kind="stable")
    kept_weights = np.cumsum(sizes[order])
    count = 1 + int(np.abs(kept_weights - (1 - sparsity) * sizes.sum()).argmin())
    kept: Mask = np.zeros(scores.size, bool)
    kept[order[:count]] = True
    return kept
