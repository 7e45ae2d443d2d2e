import numpy as np
import pytest
import tensorflow as tf

from tfaccel.distributed import shard
from tfaccel.distributed.sharding import share


def test_alone_everything_is_ours():
    x, data = np.arange(5), tf.data.Dataset.range(5)
    np.testing.assert_array_equal(shard(x), x)
    assert shard(data) is data


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_arrays_are_dealt_out_once_and_evenly(size):
    data = {"x": np.arange(11), "y": (np.arange(11) * 2, np.arange(22).reshape(11, 2))}
    shares = [share(data, rank, size) for rank in range(size)]
    count = 11 // size
    assert {len(s["x"]) for s in shares} == {count}
    assert sorted(np.concatenate([s["x"] for s in shares])) == list(range(count * size))
    for part in shares:
        np.testing.assert_array_equal(part["y"][0], part["x"] * 2)
        np.testing.assert_array_equal(part["y"][1][:, 0], part["x"] * 2)


def pairs():
    return tf.data.Dataset.from_tensor_slices((np.arange(11), {"y": np.arange(11) * 2}))


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (pairs, 3),
        (lambda: pairs().filter(lambda x, _: x < 10), 3),  # its length is unknown
        (lambda: pairs().repeat().shard(1, 0).take(-1), None),  # endless
    ],
    ids=["known", "unknown", "endless"],
)
def test_data_sets_are_dealt_out_once_and_evenly(make, count):
    shares = [list(share(make(), rank, 3).take(3 if count is None else 99)) for rank in range(3)]
    for part in shares:
        assert len(part) == 3
        assert all(int(rest["y"]) == 2 * int(x) for x, rest in part)
    seen = [[int(x) for x, _ in part] for part in shares]
    assert seen == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize("make", [np.array, tf.data.Dataset.from_tensor_slices])
def test_single_values_and_batches_of_any_size(make):
    data = make(np.arange(7))
    assert [int(v) for v in share(data, 1, 2)] == [1, 3, 5]
    if make is not np.array:
        unknown = data.filter(lambda _: True).batch(3)  # 3, 3 and 1
        assert [v.numpy().tolist() for v in share(unknown, 0, 2)] == [[0, 1, 2]]


def test_too_few_samples_are_an_error():
    for data in (np.arange(2), tf.data.Dataset.range(2)):
        with pytest.raises(ValueError, match=r"2 samples \(or batches\) for 3 ranks"):
            share(data, 0, 3)
    with pytest.raises(ValueError, match=r"as many samples, but got \[2, 3\]"):
        share((np.arange(2), np.arange(3)), 0, 2)
