"""Exactly so many are kept, and they are the largest."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tfaccel.pruning.patterns import PATTERNS, Element, keep_count, keep_largest


@given(size=st.integers(1, 400), sparsity=st.floats(0, 0.995), seed=st.integers(0, 2**31 - 1))
def test_sparsity_is_exact_to_one_weight(size, sparsity, seed):
    weights = np.abs(np.random.default_rng(seed).normal(size=size)).astype("float32")
    zeros = (~keep_largest(weights, sparsity)).sum()
    assert zeros < size
    if zeros < size - 1:
        assert abs(zeros - sparsity * size) <= 0.5 + 1e-4
    else:
        assert zeros <= sparsity * size + 0.5 + 1e-4


@given(
    scores=arrays("float32", st.integers(1, 60), elements=st.sampled_from([0.0, 0.5, 1.0, 2.0])),
    sparsity=st.floats(0, 0.995),
)
def test_ties_do_not_spoil_the_count(scores, sparsity):
    kept = keep_largest(scores, sparsity)
    assert kept.sum() == keep_count(scores.size, sparsity)
    # A stable sort from the largest down says the same.
    expected = np.zeros(scores.size, bool)
    expected[np.argsort(-scores, kind="stable")[: kept.sum()]] = True
    np.testing.assert_array_equal(kept, expected)


@given(sparsities=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)), seed=st.integers(0, 999))
def test_more_sparsity_only_adds_zeros(sparsities, seed):
    scores = np.random.default_rng(seed).random(150)
    loose, tight = (keep_largest(scores, s) for s in sorted(sparsities))
    assert not (tight & ~loose).any()


def test_count_by_hand():
    assert keep_count(100, 0.8) == 20
    assert keep_count(5, 0.5) == 2  # 2.5 goes to the even number
    assert keep_count(7, 0.5) == 4  # 3.5 too
    assert keep_count(10, 0.0) == 10
    assert keep_count(10, 0.99) == 1  # never none


def test_not_a_number_stays_visible():
    assert keep_largest(np.array([np.nan, 3.0, 1.0, 2.0]), 0.5).tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_kernels_ranked_together_share_the_zeros():
    large, small = np.full((2, 3), 9.0), np.array([[1.0, 2.0], [3.0, 1.0]])
    first, second = Element().masks([large, small], 0.3)
    assert first.shape == (2, 3)
    assert first.all()
    assert second.tolist() == [[False, False], [True, False]]  # the best of a kernel is kept


def test_unknown_pattern_names_the_known_ones():
    with pytest.raises(ValueError, match="element"):
        PATTERNS.get("elements")
