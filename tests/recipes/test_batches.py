import numpy as np
import pytest

from tfaccel.recipes.batches import Batches, augmented
from tfaccel.recipes.data import Split
from tfaccel.recipes.schema import AugmentSettings

PLAIN = AugmentSettings()


def numbered(samples):
    x = np.arange(samples, dtype=np.float32).reshape(-1, 1, 1, 1)
    return Split(x, np.arange(samples))


def epoch(batches):
    return [batches[i][1].tolist() for i in range(len(batches))]


def test_every_sample_once_and_the_last_batch_filled():
    batches = Batches(numbered(10), 4, 0, PLAIN)
    seen = [label for batch in epoch(batches) for label in batch]

    assert len(batches) == 3
    assert sorted(seen[:10]) == list(range(10))
    assert seen[10:] == seen[:2]


def test_a_batch_larger_than_the_data_wraps_around():
    (batch,) = epoch(Batches(numbered(3), 8, 0, PLAIN))

    assert sorted(batch[:3]) == [0, 1, 2]
    assert batch == (batch[:3] * 3)[:8]


def test_samples_and_labels_stay_together():
    batches = Batches(numbered(10), 4, 0, PLAIN)

    for index in range(len(batches)):
        x, y = batches[index]
        np.testing.assert_array_equal(x.ravel(), y)


def test_order_follows_seed_and_epoch():
    first, same, other = (Batches(numbered(32), 8, seed, PLAIN) for seed in (0, 0, 1))
    start = epoch(first)

    assert start == epoch(same) != epoch(other)
    first.on_epoch_end()
    assert epoch(first) != start
    same.on_epoch_end()
    assert epoch(first) == epoch(same)


@pytest.mark.parametrize("size", [2, 4])
def test_workers_share_the_batches_of_one_process(size):
    how = AugmentSettings(shift=1, mirror=True)
    split = Split(np.random.default_rng(0).random((16, 5, 5, 2), np.float32), np.arange(16))
    alone = Batches(split, 8, 3, how)
    workers = [Batches(split, 8, 3, how, rank, size) for rank in range(size)]

    for index in range(2):
        x, y = alone[index]
        parts = [worker[index] for worker in workers]
        assert all(len(part[1]) == 8 // size for part in parts)
        for rank, (part_x, part_y) in enumerate(parts):
            np.testing.assert_array_equal(part_x, x[rank::size])
            np.testing.assert_array_equal(part_y, y[rank::size])


def test_shifts_move_a_pixel_by_hand():
    # One lit pixel in the middle of 5 x 5 can land on nine places, all of them.
    x = np.zeros((500, 5, 5, 1), np.float32)
    x[:, 2, 2] = 1

    moved = augmented(x, AugmentSettings(shift=1), np.random.default_rng(0))

    assert moved.shape == x.shape
    assert {tuple(place[1:3]) for place in np.argwhere(moved)} == {
        (row, column) for row in (1, 2, 3) for column in (1, 2, 3)
    }
    np.testing.assert_array_equal(moved.sum((1, 2, 3)), 1)


def test_shifts_bring_zeros_in():
    moved = augmented(
        np.ones((200, 4, 4, 1), np.float32), AugmentSettings(shift=1), np.random.default_rng(0)
    )

    # 16 pixels stay lit, or 12 after one move, or 9 after two.
    assert set(moved.sum((1, 2, 3)).astype(int)) == {16, 12, 9}


def test_mirroring_is_left_for_right_half_the_time():
    x = np.random.default_rng(1).random((400, 3, 4, 2), np.float32)

    mirrored = augmented(x, AugmentSettings(mirror=True), np.random.default_rng(0))

    turned = np.array([np.array_equal(a, b[:, ::-1]) for a, b in zip(mirrored, x, strict=True)])
    kept = np.array([np.array_equal(a, b) for a, b in zip(mirrored, x, strict=True)])
    assert (turned ^ kept).all()
    assert 150 < turned.sum() < 250
