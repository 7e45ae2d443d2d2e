"""Centroids of a kernel's values: where they begin, and which is nearest.

An initialization spreads centroids over the values; Lloyd's k-means then moves each to the mean of
the values that are nearest to it, until none changes (Han et al. 2016, Deep Compression, section
3). With a centroid held at zero, the rest are shared out to negative and positive values by their
numbers.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.checks import check_in

Array = npt.NDArray[Any]

# D^2 sampling looks at each value once per centroid; the rest of a large kernel says nothing new.
_SEEDING_VALUES = 2**16
_LLOYD_ROUNDS = 300
# Up to so many boundaries, comparing with each is faster than searching.
_MOST_COMPARISONS = 64


def linear(values: Array, count: int, random: np.random.Generator) -> Array:  # noqa: ARG001
    """Returns `count` centroids evenly spaced from the smallest of `values` to the largest."""
    return np.linspace(values[0], values[-1], count)


def density(values: Array, count: int, random: np.random.Generator) -> Array:  # noqa: ARG001
    """Returns the quantiles (j + 1/2) / count of `values`: each gets equally many of them."""
    return np.quantile(values, (np.arange(count) + 0.5) / count)


def uniform(values: Array, count: int, random: np.random.Generator) -> Array:
    """Returns `count` centroids drawn uniformly between the smallest and largest of `values`."""
    return random.uniform(values[0], values[-1], count)


def kmeans_plus_plus(values: Array, count: int, random: np.random.Generator) -> Array:
    """Returns `count` of the values, drawn by the square of the distance to those drawn before.

    References:
        Arthur & Vassilvitskii 2007, k-means++: The Advantages of Careful Seeding.
    """
    if len(values) > _SEEDING_VALUES:
        values = random.choice(values, _SEEDING_VALUES, replace=False)
    drawn = [values[random.integers(len(values))]]
    squares = (values - drawn[0]) ** 2
    while len(drawn) < count:
        bounds = np.cumsum(squares)
        if bounds[-1] == 0:  # fewer distinct values than centroids
            return np.array(drawn + [drawn[-1]] * (count - len(drawn)))
        place = np.searchsorted(bounds, random.random() * bounds[-1], side="right")
        drawn.append(values[min(place, len(values) - 1)])
        squares = np.minimum(squares, (values - drawn[-1]) ** 2)
    return np.array(drawn)


INITIALIZATIONS: dict[str, Callable[[Array, int, np.random.Generator], Array]] = {
    "linear": linear,
    "density": density,
    "random": uniform,
    "kmeans++": kmeans_plus_plus,
}


def initial_centroids(
    weights: Array,
    clusters: int,
    initialization: str = "kmeans++",
    *,
    zero: bool = False,
    refine: bool = True,
    seed: int = 0,
) -> Array:
    """Returns the centroids of a kernel's values.

    Args:
        weights: of any shape, finite.
        clusters: how many centroids, at least 1; at least 2 with `zero`.
        initialization: "linear", "density", "random" or "kmeans++".
        zero: whether one centroid is zero and stays there. Zeros among the weights are then left
            out.
        refine: whether Lloyd's k-means follows.
        seed: of "random" and "kmeans++".

    Returns:
        [clusters] float64, ascending, zero among them if it is held.

    Raises:
        ValueError: the initialization is not known, or weights are not finite.

    >>> initial_centroids(np.array([0.0, 1.0, 4.0, 5.0]), 2, "linear")
    array([0.5, 4.5])
    """
    check_in("initialization", initialization, tuple(INITIALIZATIONS))
    values = np.sort(np.asarray(weights, np.float64).ravel())
    if not np.isfinite(values).all():
        raise ValueError(
            "Clustering needs finite weights, but some are infinite or not a number. Begin with a "
            "model whose training did not diverge."
        )
    random = np.random.default_rng(seed)
    spread = INITIALIZATIONS[initialization]
    if not zero:
        centroids = np.sort(spread(values, clusters, random)) if len(values) else np.zeros(clusters)
        return _lloyd(values, centroids) if refine and len(values) else centroids
    negative, positive = values[values < 0], values[values > 0]
    values = np.concatenate([negative, positive])
    if not len(values):
        return np.zeros(clusters)
    below = round((clusters - 1) * len(negative) / len(values))
    parts = [
        spread(side, number, random)
        for side, number in ((negative, below), (positive, clusters - 1 - below))
        if number > 0
    ]
    centroids = np.sort(np.concatenate([*parts, [0.0]]))
    return _lloyd(values, centroids, held=below) if refine else centroids


def nearest_centroids(values: Any, tables: Any) -> Any:
    """Returns where the nearest centroid of each value stands in the tables, one after another.

    A value halfway between two belongs to the lower one.

    Args:
        values: [tables, n].
        tables: [tables, clusters], in any order.

    Returns:
        [tables, n] int32, table * clusters + place in it.
    """
    ops = keras.ops
    number, clusters = tables.shape
    starts = ops.expand_dims(ops.arange(number, dtype="int32") * clusters, 1)
    order = ops.reshape(ops.cast(ops.argsort(tables, axis=1), "int32") + starts, (-1,))
    ranked = ops.reshape(ops.take(ops.reshape(tables, (-1,)), order), (number, clusters))
    middles = (ranked[:, 1:] + ranked[:, :-1]) / 2
    if clusters - 1 <= _MOST_COMPARISONS:
        ranks = ops.cast(values > middles[:, :1], "int8")
        for place in range(1, clusters - 1):
            ranks = ranks + ops.cast(values > middles[:, place : place + 1], "int8")
        ranks = ops.cast(ranks, "int32")
    else:
        ranks = _search(values, middles)
    return ops.take(order, ranks + starts)


def _lloyd(values: Array, centroids: Array, held: int | None = None) -> Array:
    """Moves ascending centroids, but the one at place `held`, to the means of what is nearest.

    A centroid that is nearest to no value stays where it is.
    """
    totals = np.concatenate([[0.0], np.cumsum(values)])
    for _ in range(_LLOYD_ROUNDS):
        ends = np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2, side="right")
        bounds = np.concatenate([[0], ends, [len(values)]])
        numbers = np.diff(bounds)
        means = np.diff(totals[bounds]) / np.maximum(numbers, 1)
        moved = np.where(numbers > 0, means, centroids)
        if held is not None:
            moved[held] = 0.0
        # Differences of totals are exact to the last digits only, which must not change the order.
        moved = np.sort(moved)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _search(values: Any, middles: Any) -> Any:
    """Returns how many of a row's ascending `middles` are below each value, by halving."""
    ops = keras.ops
    number, length = middles.shape
    step = 1 << (int(length).bit_length() - 1)
    width = 2 * step
    # Beyond the last stands what no value exceeds.
    padded = ops.pad(middles, ((0, 0), (0, width - length)), constant_values=float("inf"))
    flat = ops.reshape(padded, (-1,))
    starts = ops.expand_dims(ops.arange(number, dtype="int32") * width, 1)
    ranks = ops.zeros_like(values, dtype="int32")
    while step:
        there = ops.take(flat, ranks + starts + (step - 1)) < values
        ranks = ranks + ops.cast(there, "int32") * step
        step //= 2
    return ranks
