"""Units of channels: which positions of which tensors stand or fall together."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]

CONSTANT = 0
"""The unit of all that is no channel: it is never removed."""


class Units:
    """Disjoint sets of channels, some of which must stay, with the reason."""

    def __init__(self) -> None:
        self._parents: Labels = np.zeros(1, np.int64)
        self._reasons: dict[int, str] = {CONSTANT: "not made by a layer"}

    def fresh(self, count: int) -> Labels:
        """Returns `count` units that nothing is united with yet."""
        new = np.arange(len(self._parents), len(self._parents) + count)
        self._parents = np.concatenate([self._parents, new])
        return new

    def roots(self, labels: Labels) -> Labels:
        """Returns for each unit the one that stands for all that it is united with."""
        found = self._parents[labels]
        while True:
            further = self._parents[found]
            if np.array_equal(further, found):
                return found
            found = further

    def unite(self, first: Labels, second: Labels) -> None:
        """Makes the units of two arrays of one shape stand or fall together, place by place."""
        pairs = np.stack([self.roots(first).ravel(), self.roots(second).ravel()], axis=1)
        for pair in np.unique(pairs, axis=0):
            low, high = sorted(int(root) for root in self.roots(pair))
            if low == high:
                continue
            self._parents[high] = low
            if high in self._reasons:
                reason = self._reasons.pop(high)
                self._reasons.setdefault(low, reason)

    def fix(self, labels: Labels, reason: str) -> None:
        """Says that units must stay; the first reason given is kept."""
        for root in np.unique(self.roots(labels)):
            self._reasons.setdefault(int(root), reason)

    def reason(self, root: int) -> str | None:
        """Returns why a unit must stay, or None if it may go."""
        return self._reasons.get(int(root))

    # Arrays of labels: one axis for each of a tensor's, of size 1 where the unit does not change

    def settle(self, labels: Labels) -> Labels:
        """Returns the labels with at most one axis along which they change.

        What remains of a tensor must be a tensor, so that positions can go only along one axis.
        Where units change along several (channels seen as groups times channels of a group), those
        along all but the longest are united.
        """
        labels = self._compress(self.roots(labels))
        varying = [axis for axis, size in enumerate(labels.shape) if size > 1]
        longest = max(varying, key=lambda axis: labels.shape[axis], default=None)
        for axis in varying:
            if axis != longest:
                first = np.take(labels, [0], axis=axis)
                self.unite(np.broadcast_to(first, labels.shape), labels)
                labels = self.roots(first)
        return self._compress(labels)

    @staticmethod
    def _compress(labels: Labels) -> Labels:
        for axis, size in enumerate(labels.shape):
            first = np.take(labels, [0], axis=axis)
            if size > 1 and (labels == first).all():
                labels = first
        return labels


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """A tensor as it is traced.

    Attributes:
        shape: with the batch axis first; None where unknown.
        dtype: name of the type.
        labels: units of its positions; as many axes, of size 1 where the unit does not change.
    """

    shape: tuple[int | None, ...]
    dtype: str
    labels: Labels

    @property
    def axis(self) -> int | None:
        """The axis along which units change, if there is one."""
        return next((axis for axis, size in enumerate(self.labels.shape) if size > 1), None)


def constant(ndim: int) -> Labels:
    """Returns labels of a tensor of which nothing can go."""
    return np.full((1,) * ndim, CONSTANT, np.int64)


def placed(labels: Labels, ndim: int, axis: int) -> Labels:
    """Returns flat labels as those of a tensor in which they lie along `axis`."""
    shape = [1] * ndim
    shape[axis] = labels.size
    return labels.reshape(shape)


def reshaped(value: Channels, shape: Sequence[int | None]) -> Labels | None:
    """Returns the labels of a tensor that is reshaped, or None if sizes are unknown.

    Args:
        value: the tensor before.
        shape: all of the new shape, the batch axis first.
    """
    if value.axis is None:
        return np.full((1,) * len(shape), value.labels.ravel()[0])
    before: list[Any] = [1, *value.shape[1:]]
    after: list[Any] = [1, *shape[1:]]
    if None in before or None in after:
        # Leading axes may be unknown where the last one is left as it is.
        last = len(before) - 1
        if value.axis == last and before[-1] == after[-1]:
            return placed(value.labels.ravel(), len(after), -1)
        return None
    if math.prod(before) != math.prod(after):
        return None
    return np.broadcast_to(value.labels, before).reshape(after)
