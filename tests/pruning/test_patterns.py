"""Exactly so many are kept, and they are the largest."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tfaccel.pruning.patterns import (
    PATTERNS,
    Block,
    Channel,
    Element,
    NofM,
    keep_count,
    keep_heaviest,
    keep_largest,
)


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


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 13), st.integers(1, 9))


def scores_of(shape, seed):
    return np.random.default_rng(seed).random(shape).astype("float32")


def test_names_of_patterns():
    assert PATTERNS.get("element") == Element()
    assert PATTERNS.get("2:4") == NofM(2, 4)
    assert PATTERNS.get("4x1") == PATTERNS.get("4×1") == Block(4, 1)  # noqa: RUF001
    assert PATTERNS.get("channel") == Channel()
    for wrong in ("4:4", "0:4", "0x4"):
        with pytest.raises(ValueError, match=wrong):
            PATTERNS.get(wrong)
    with pytest.raises(ValueError, match=r"no pattern '2of4'.*n:m, such as '2:4'.*'4x1'"):
        PATTERNS.get("2of4")
    with pytest.raises(ValueError, match=r"must be one of 'mean', 'max'"):
        Block(1, 4, "sum")


@pytest.mark.parametrize(
    "pattern", [Element(), NofM(2, 4), Block(4, 1, "max"), Channel()], ids=repr
)
def test_round_trips_through_its_config(pattern):
    assert PATTERNS.get(keras.saving.serialize_keras_object(pattern)) == pattern


@given(shape=SHAPES, n=st.integers(1, 4), more=st.integers(1, 4), seed=st.integers(0, 999))
def test_every_group_keeps_its_n_largest(shape, n, more, seed):
    pattern, scores = NofM(n, n + more), scores_of(shape, seed)
    (mask,) = pattern.masks([scores], 1 - n / pattern.m)
    for start in range(0, shape[1], pattern.m):
        group = scores[:, start : start + pattern.m]
        kept = mask[:, start : start + pattern.m]
        best = np.sort(group, axis=1)[:, ::-1][:, :n]
        assert (kept.sum(axis=1) == min(n, group.shape[1])).all()
        chosen = np.sort(np.where(kept, group, -1), axis=1)[:, ::-1][:, : best.shape[1]]
        np.testing.assert_array_equal(chosen, best)


@given(shape=SHAPES, share=st.floats(0, 1), seed=st.integers(0, 999))
def test_n_of_m_is_approached_by_the_weights_it_drops(shape, share, seed):
    scores = scores_of(shape, seed)
    (whole,) = NofM(2, 4).masks([scores], 0.5)
    (part,) = NofM(2, 4).masks([scores], 0.5 * share)
    assert (part | ~whole).all()  # what the pattern keeps is kept on the way
    wanted = scores.size - keep_count(scores.size, 0.5 * share)
    assert (~part).sum() == min(wanted, (~whole).sum())
    dropped, left = scores[~part], scores[part & ~whole]
    assert dropped.size == 0 or left.size == 0 or dropped.max() <= left.min()


def test_two_of_four_by_hand():
    scores = np.array([[[1], [4], [3], [2], [9], [7]]], "float32")  # six inputs, one output
    (mask,) = NofM(2, 4).masks([scores], 0.5)
    assert mask.ravel().tolist() == [False, True, True, False, True, True]
    with pytest.raises(ValueError, match=r"'2:4' makes 0.5 .* ends at 0.8"):
        NofM(2, 4).check(0.8)


@given(
    shape=SHAPES,
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    pooling=st.sampled_from(["mean", "max"]),
    sparsity=st.floats(0, 0.95),
    seed=st.integers(0, 999),
)
def test_blocks_stand_and_fall_whole(shape, height, width, pooling, sparsity, seed):
    scores = scores_of(shape, seed)
    (mask,) = Block(height, width, pooling).masks([scores], sparsity)
    pooled = {True: [], False: []}
    for position in range(shape[0]):
        for row in range(0, shape[1], height):
            for column in range(0, shape[2], width):
                place = np.s_[position, row : row + height, column : column + width]
                assert mask[place].all() or not mask[place].any()
                pooled[bool(mask[place].all())].append(getattr(np, pooling)(scores[place]))
    count = len(pooled[True]) + len(pooled[False])
    assert len(pooled[True]) == keep_count(count, sparsity)
    assert not pooled[False] or max(pooled[False]) <= min(pooled[True]) + 1e-6


@given(shape=SHAPES, sparsity=st.floats(0, 0.95), seed=st.integers(0, 999))
def test_channels_stand_and_fall_whole(shape, sparsity, seed):
    scores = scores_of(shape, seed)
    (mask,) = Channel().masks([scores], sparsity)
    kept = mask.all(axis=(0, 1))
    np.testing.assert_array_equal(kept, mask.any(axis=(0, 1)))
    assert kept.sum() == keep_count(shape[2], sparsity)
    means = scores.astype(np.float64).mean(axis=(0, 1))
    assert kept.all() or means[kept].min() >= means[~kept].max() - 1e-6


def test_channels_ranked_together_count_as_many_weights_as_they_have():
    wide = np.arange(1, 5, dtype=float) * np.ones((1, 30, 1))  # 4 channels of 30 weights
    narrow = np.array([5.0, 0.5, 0.4, 0.3]) * np.ones((1, 10, 1))  # 4 channels of 10
    first, second = Channel().masks([wide, narrow], 60 / 160)
    # By score the three weak narrow ones (30 weights), then the weakest wide one (30).
    assert first[0, 0].tolist() == [False, True, True, True]
    assert second[0, 0].tolist() == [True, False, False, False]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    sparsity=st.floats(0, 0.99),
    seed=st.integers(0, 999),
)
def test_the_share_of_weights_is_as_near_as_whole_units_allow(sizes, sparsity, seed):
    scores = np.random.default_rng(seed).random(len(sizes))
    sizes = np.array(sizes)
    kept = keep_heaviest(scores, sizes, sparsity)
    order = np.argsort(-scores)
    wanted = (1 - sparsity) * sizes.sum()
    options = [abs(sizes[order[:count]].sum() - wanted) for count in range(1, len(sizes) + 1)]
    assert abs(sizes[kept].sum() - wanted) <= min(options) + 1e-9
