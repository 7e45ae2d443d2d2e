import numpy as np
import pytest

from tests.architectures import lsh_oracle
from tfaccel.architectures.hashing import (
    bucket_factors,
    hash_columns,
    hash_vectors,
    restore_rows,
    sort_by_bucket,
    sort_rows,
)


@pytest.mark.parametrize("factors", [(2,), (8,), (4, 6)])
def test_hashes_as_the_paper_does(factors):
    random = np.random.default_rng(0)
    vectors = random.normal(size=(2, 50, 5)).astype("float32")
    columns = hash_columns(factors)
    rotations = random.normal(size=(5, 3, columns)).astype("float32")
    buckets = np.asarray(hash_vectors(vectors, rotations, factors))
    assert buckets.shape == (2, 3, 50)
    for round_ in range(3):
        expected, begin = 0, 0
        for factor in factors:
            rotation = rotations[:, round_, begin : begin + factor // 2]
            expected = expected * factor + lsh_oracle.hash_vectors(vectors, rotation)
            begin += factor // 2
        np.testing.assert_array_equal(buckets[:, round_], expected)
        assert len(np.unique(expected)) > np.prod(factors) / 2


def test_near_vectors_share_a_bucket_and_far_ones_do_not():
    random = np.random.default_rng(0)
    x = random.normal(size=(1, 200, 16)).astype("float32")
    rotations = random.normal(size=(16, 50, 4)).astype("float32")

    def same(y):
        pairs = (hash_vectors(v, rotations, (8,)) for v in (x, y))
        return float(np.mean(np.equal(*map(np.asarray, pairs))))

    assert same(3.0 * x) == 1.0  # length does not matter
    near = same(x + 0.2 * random.normal(size=x.shape).astype("float32"))
    assert near > 0.75
    assert same(random.normal(size=x.shape).astype("float32")) == pytest.approx(1 / 8, abs=0.05)
    assert same(-x) == 0.0


@pytest.mark.parametrize("time", [1, 64, 65, 1000, 4096, 4097, 16384, 65536])
def test_a_chunk_has_twice_the_positions_of_an_average_bucket(time):
    factors = bucket_factors(time, 64)
    if time <= 64:
        assert factors == (1,)
        return
    assert all(factor % 2 == 0 for factor in factors)
    assert 2 * time / 64 <= np.prod(factors) <= 1.2 * (2 * time / 64) + 2
    assert hash_columns(factors) <= 64 or time > 16384


def test_sorts_by_bucket_and_position():
    buckets = np.array([[[2, 0, 2, 1, 0]]], "int32")
    order, places, sorted_buckets = (np.asarray(x) for x in sort_by_bucket(buckets, 5))
    assert order.tolist() == [[[1, 4, 3, 0, 2]]]
    assert places.tolist() == [[[3, 0, 4, 2, 1]]]
    assert sorted_buckets.tolist() == [[[0, 0, 1, 2, 2]]]


def test_moves_vectors_there_and_back_with_their_gradients():
    import tensorflow as tf

    random = np.random.default_rng(0)
    buckets = random.integers(0, 3, (2, 3, 7)).astype("int32")
    order, places, _ = sort_by_bucket(buckets, 7)
    x = tf.constant(random.normal(size=(2, 7, 4)))
    weight = random.normal(size=(2, 3, 7, 4))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        moved = sort_rows(x, order, places)
        loss = tf.reduce_sum(moved * weight)
    plain = np.asarray(order)
    there = np.take_along_axis(np.asarray(x)[:, None], plain[..., None], axis=2)
    np.testing.assert_array_equal(moved, there)
    # Each round's gradient goes back to where its vector came from.
    expected = np.zeros((2, 7, 4))
    for row, round_, place in np.ndindex(2, 3, 7):
        expected[row, plain[row, round_, place]] += weight[row, round_, place]
    np.testing.assert_allclose(tape.gradient(loss, x), expected)
    with tf.GradientTape() as tape:
        tape.watch(moved)
        back = restore_rows(moved, order, places)
        loss = tf.reduce_sum(back * weight)
    np.testing.assert_array_equal(back, np.repeat(np.asarray(x)[:, None], 3, axis=1))
    turned = np.take_along_axis(weight, plain[..., None], axis=2)
    np.testing.assert_array_equal(tape.gradient(loss, moved), turned)
