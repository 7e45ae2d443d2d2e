"""Initializations and k-means against definitions, scipy and exhaustive search."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfaccel.quantization.centroids import (
    INITIALIZATIONS,
    initial_centroids,
    nearest_centroids,
)


def normal(size, seed=0):
    return np.random.default_rng(seed).normal(size=size).astype("float32")


def squared_error(values, centroids):
    return float((np.abs(values[:, None] - centroids).min(axis=1) ** 2).sum())


def optimal_error(values, count):
    """The least squared error of any clustering, by dynamic programming over sorted values."""
    values = np.sort(values.astype(float))
    size = len(values)
    cost = np.full((size + 1, size + 1), np.inf)
    for i in range(size):
        for j in range(i + 1, size + 1):
            part = values[i:j]
            cost[i, j] = ((part - part.mean()) ** 2).sum()
    best = np.where(np.arange(size + 1) == 0, 0.0, np.inf)
    for _ in range(count):
        best = np.array([min(best[i] + cost[i, j] for i in range(size)) for j in range(size + 1)])
    return best[-1]


# Initializations, before k-means


def test_linear_centroids_are_evenly_spaced_between_the_ends():
    found = initial_centroids(np.array([3.0, -1.0, 0.5]), 5, "linear", refine=False)
    np.testing.assert_allclose(found, [-1, 0, 1, 2, 3])


def test_density_centroids_have_equally_many_values_between_them():
    values = np.random.default_rng(0).exponential(size=10000)
    found = initial_centroids(values, 10, "density", refine=False)
    bins = np.histogram(values, np.concatenate([[-np.inf], found, [np.inf]]))[0]
    np.testing.assert_allclose(bins, [500, *[1000] * 9, 500], atol=2)


def test_random_centroids_are_drawn_between_the_ends():
    found = initial_centroids(normal(1000), 500, "random", refine=False, seed=1)
    low, high = normal(1000).min(), normal(1000).max()
    assert low <= found.min() < low + 0.2
    assert high - 0.2 < found.max() <= high


def test_kmeans_plus_plus_draws_by_the_square_of_the_distance():
    # From 0, 1 and 3: once 0 is drawn, 3 follows with odds of 9 to 1; after 1, of 4 to 1 (0).
    values = np.array([0.0, 1.0, 3.0])
    pairs = [
        tuple(initial_centroids(values, 2, "kmeans++", refine=False, seed=seed))
        for seed in range(4000)
    ]
    shares = [pairs.count(pair) / 4000 for pair in ((0, 1), (0, 3), (1, 3))]
    expected = np.array([1 / 10 + 1 / 5, 9 / 10 + 9 / 13, 4 / 5 + 4 / 13]) / 3
    np.testing.assert_allclose(shares, expected, atol=0.03)  # 4 standard deviations


def test_kmeans_plus_plus_finds_groups_far_apart():
    values = np.concatenate([center + 0.01 * normal(50) for center in (-9.0, 1.0, 2.0, 7.0)])
    found = initial_centroids(values, 4, "kmeans++", seed=3)
    np.testing.assert_allclose(found, [-9, 1, 2, 7], atol=0.01)


# k-means


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_every_refined_centroid_is_the_mean_of_its_values(initialization):
    values = normal(400).astype(float)
    found = initial_centroids(values, 12, initialization, seed=2)
    nearest = np.abs(values[:, None] - found).argmin(axis=1)
    for place in np.unique(nearest):
        np.testing.assert_allclose(found[place], values[nearest == place].mean(), atol=1e-12)


def test_no_refinement_beats_the_optimum_and_the_best_seed_reaches_it():
    values = normal(40, seed=4)
    errors = [squared_error(values, initial_centroids(values, 4, seed=s)) for s in range(20)]
    assert min(errors) == pytest.approx(optimal_error(values, 4), rel=1e-6)
    assert max(errors) >= min(errors)


def test_scipys_kmeans_from_the_same_start_ends_at_the_same_centroids():
    from scipy.cluster.vq import kmeans2

    values = normal(300, seed=5).astype(float)
    start = initial_centroids(values, 6, "density", refine=False)
    theirs, _ = kmeans2(values[:, None], start[:, None], iter=300, minit="matrix")
    found = initial_centroids(values, 6, "density")
    np.testing.assert_allclose(found, np.sort(theirs.ravel()), atol=1e-9)


# A centroid at zero


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
@pytest.mark.parametrize("refine", [False, True])
def test_zero_is_held_and_the_rest_is_shared_out_by_sign(initialization, refine):
    values = np.concatenate([np.zeros(500), -1 - np.abs(normal(30)), 1 + np.abs(normal(60))])
    found = initial_centroids(values, 10, initialization, zero=True, refine=refine)
    assert len(found) == 10
    assert (found == 0).sum() == 1
    assert ((found < 0).sum(), (found > 0).sum()) == (3, 6)


def test_values_of_one_sign_and_none_at_all():
    assert (initial_centroids(np.arange(9.0), 4, zero=True) >= 0).all()
    np.testing.assert_array_equal(initial_centroids(np.zeros(5), 3, zero=True), np.zeros(3))


@settings(max_examples=50)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30),
    clusters=st.integers(2, 12),
    initialization=st.sampled_from(tuple(INITIALIZATIONS)),
    zero=st.booleans(),
)
def test_centroids_are_as_many_ascending_and_within_the_values(
    values, clusters, initialization, zero
):
    found = initial_centroids(np.array(values), clusters, initialization, zero=zero, seed=7)
    assert len(found) == clusters
    assert (np.diff(found) >= 0).all()
    low, high = (min(values), max(values)) if not zero else (min(*values, 0), max(*values, 0))
    assert found.min() >= low - 1e-9
    assert found.max() <= high + 1e-9
    assert not zero or 0 in found


def test_as_many_centroids_as_distinct_values_are_those():
    values = np.repeat([-2.0, 0.5, 3.0], 20)
    assert squared_error(values, initial_centroids(values, 3, "kmeans++")) == 0
    assert squared_error(values, initial_centroids(values, 8, "kmeans++")) == 0


def test_seeds_repeat():
    first, again, other = (
        initial_centroids(normal(99), 5, seed=seed, refine=False) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_large_kernels_are_seeded_by_a_sample():
    found = initial_centroids(normal(200_000), 16)
    assert squared_error(normal(20_000), found) / 20_000 < 0.02  # optimal is 0.0115, Max 1960


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="'linear', 'density', 'random', 'kmeans"):
        initial_centroids(normal(9), 2, "forgy")
    with pytest.raises(ValueError, match="needs finite weights"):
        initial_centroids(np.array([1.0, np.nan]), 2)


# The nearest one


@settings(max_examples=25)
@given(
    number=st.integers(1, 3),
    clusters=st.sampled_from((2, 3, 5, 16, 66, 90)),
    size=st.integers(1, 60),
    seed=st.integers(0, 2**31 - 1),
)
def test_nearest_is_what_comparing_with_all_finds(number, clusters, size, seed):
    random = np.random.default_rng(seed)
    # Multiples of 1/8, so that ties occur and every difference is exact.
    values = (random.integers(-40, 40, (number, size)) / 8).astype("float32")
    tables = (random.integers(-40, 40, (number, clusters)) / 8).astype("float32")
    to_tensor = keras.ops.convert_to_tensor
    places = np.asarray(nearest_centroids(to_tensor(values), to_tensor(tables)))
    assert ((places // clusters) == np.arange(number)[:, None]).all()
    distances = np.abs(values - tables.ravel()[places])
    all_distances = np.abs(values[:, :, None] - tables[:, None, :])
    np.testing.assert_array_equal(distances, all_distances.min(axis=2))
    tied = (all_distances == all_distances.min(axis=2, keepdims=True)).sum(axis=2) > 1
    lower = np.where(all_distances == distances[:, :, None], tables[:, None, :], np.inf).min(axis=2)
    np.testing.assert_array_equal(tables.ravel()[places][tied], lower[tied])
