"""The largest of many values, found by a threshold that a sample gives (Lin et al. 2018, sec. 5).

A full top-k of 5 million values takes longer than the step that it would speed up.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# Enough that the rank of the threshold within the sample is known to some 10 %.
_SAMPLES_ABOVE = 100
_SAMPLED_SHARE = 0.01
_MOST = 1.3  # times the number wanted; above it the largest of those found are taken
_FEWEST = 0.7
_TRIES = 8
_PART = 1 << 16  # elements that stay in a core's cache from one operation to the next
_TINY = np.finfo(np.float32).tiny


def select_largest(values: Array, count: int, seed: int = 0) -> Array:
    """Finds about the `count` largest magnitudes: between 0.7 and 1.3 times as many.

    The threshold is the matching magnitude of a sample: every s-th value, at least 1 % of all. If
    too many lie above it, the `count` largest of these are taken (the hierarchical selection of
    the paper); if too few do, it is lowered. A value that is not a number counts as large, so that
    it is seen. Zeros are never chosen, even if fewer remain.

    Args:
        values: [elements] float32.
        count: how many are wanted, at least 1.
        seed: which values are sampled.

    Returns:
        Their places, ascending.
    """
    size = len(values)
    threshold = _sampled_threshold(values, count, seed)
    found = places_above(values, threshold)
    for _ in range(_TRIES):
        if len(found) >= _FEWEST * min(count, size) or threshold <= _TINY:
            break
        threshold = max(threshold / 2, _TINY)
        found = places_above(values, threshold)
    if len(found) > _MOST * count:
        # NaN is sorted last, as if it were the largest.
        order = np.argpartition(np.abs(values[found]), len(found) - count)
        found = np.sort(found[order[len(found) - count :]])
    return found


def select_top(values: Array, count: int) -> Array:
    """Finds the `count` largest magnitudes exactly, which takes much longer; zeros are left out.

    Args:
        values: [elements] float32.
        count: how many.

    Returns:
        Their places, ascending.
    """
    magnitudes = np.abs(values)
    if count < len(values):
        cut = len(values) - count
        found = np.sort(np.argpartition(magnitudes, cut)[cut:])
    else:
        found = np.arange(len(values))
    return found[magnitudes[found] != 0]


def places_above(values: Array, threshold: float) -> Array:
    """Returns the places of magnitudes that are not below a threshold; [places] int64."""
    magnitudes = np.empty(min(_PART, len(values)), np.float32)
    below = np.empty(len(magnitudes), bool)
    found = []
    limit = np.float32(max(threshold, _TINY))
    for start in range(0, len(values), _PART):
        part = values[start : start + _PART]
        here = np.abs(part, out=magnitudes[: len(part)])
        # Not "at least": NaN is neither.
        mask = np.less(here, limit, out=below[: len(part)])
        found.append(np.flatnonzero(np.logical_not(mask, out=mask)) + start)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _sampled_threshold(values: Array, count: int, seed: int) -> float:
    size = len(values)
    if count >= size:
        return float(_TINY)
    wanted = max(_SAMPLED_SHARE * size, _SAMPLES_ABOVE * size / count)
    stride = max(1, int(size / wanted))
    stride -= stride > 1 and stride % 2 == 0  # rows of a matrix mostly have an even length
    sample = np.abs(values[seed % stride :: stride])
    above = min(len(sample), max(1, round(count * len(sample) / size)))
    return float(np.partition(sample, len(sample) - above)[len(sample) - above])
