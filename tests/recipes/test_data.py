import numpy as np
import pytest
from sklearn.datasets import load_digits

from tfaccel.recipes.data import DataError, load_data
from tfaccel.recipes.schema import DataSettings


def rows(split):
    return {x.tobytes() for x in split.x}


def test_digits_are_split_without_loss_or_overlap():
    data = load_data("digits")
    digits = load_digits()

    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    images = np.sort(np.concatenate([s.x.sum((1, 2, 3)) for s in _splits(data)]))
    np.testing.assert_array_equal(images, np.sort(digits.images.sum((1, 2)) / 16))
    # The 1,797 scans hold no image twice, so no row may be in two splits.
    assert not rows(data.train) & rows(data.test)
    assert not rows(data.train) & rows(data.validation)
    assert not rows(data.validation) & rows(data.test)
    assert data.input_shape == (8, 8, 1)
    assert data.classes == 10
    assert data.train.x.dtype == np.float32
    assert data.train.x.min() == 0
    assert data.train.x.max() == 1


def test_splits_are_stratified():
    data = load_data("digits")
    total = np.bincount(load_digits().target)

    assert len(data.test) == round(0.2 * 1797)
    assert len(data.validation) == round(0.1 * (1797 - len(data.test)))
    np.testing.assert_allclose(np.bincount(data.test.y), 0.2 * total, atol=1)
    rest = total - np.bincount(data.test.y)
    np.testing.assert_allclose(np.bincount(data.validation.y), 0.1 * rest, atol=1)


def test_few_samples_of_many_classes_can_be_split(tmp_path):
    x = np.random.default_rng(0).random((30, 3)).astype(np.float32)
    np.savez(tmp_path / "own.npz", x_train=x, y_train=np.arange(30) % 10)

    data = load_data(str(tmp_path / "own.npz"))

    assert [len(split) for split in _splits(data)] == [22, 2, 6]


def test_the_seed_decides_the_split():
    first, again, other = load_data("digits"), load_data("digits"), load_data("digits", seed=1)

    assert first.digest == again.digest
    np.testing.assert_array_equal(first.train.x, again.train.x)
    assert first.digest != other.digest


def test_limit_cuts_every_split():
    data = load_data(DataSettings(name="digits", limit=50))

    assert [len(split) for split in _splits(data)] == [50, 50, 50]


def test_an_npz_file_with_its_own_test_split(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    y = np.arange(40) % 4
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y[:, None], x_test=x[:8], y_test=y[:8])

    data = load_data(DataSettings(name=str(tmp_path / "own.npz"), validation=0.2))

    assert [len(split) for split in _splits(data)] == [32, 8, 8]  # a fifth of each class of 10
    np.testing.assert_allclose(data.test.x, x[:8] / 255, rtol=1e-6)
    np.testing.assert_array_equal(data.test.y, y[:8])
    assert data.classes == 4


def test_an_npz_file_without_test_is_split(tmp_path):
    x = np.random.default_rng(0).random((40, 3)).astype(np.float32)
    np.savez(tmp_path / "own.npz", x_train=x, y_train=np.arange(40) % 2)

    data = load_data(str(tmp_path / "own.npz"))

    assert len(data.test) == 8  # a fifth of each class of 20
    assert len(data.validation) == 3  # a tenth of the 32 left
    assert rows(data.train) | rows(data.validation) | rows(data.test) == {r.tobytes() for r in x}


X = np.zeros((20, 4, 4, 1), np.float32)
Y = np.arange(20) % 2
BAD = {
    "empty": ({"x_train": X[:0], "y_train": Y[:0]}, "is empty"),
    "one-hot": ({"x_train": X, "y_train": np.eye(2)[Y]}, r"labels of shape \(20, 2\).*argmax"),
    "too few labels": ({"x_train": X, "y_train": Y[:19]}, r"labels of shape \(19,\) for 20"),
    "scalar labels": ({"x_train": X, "y_train": np.array(1)}, r"labels of shape \(\)"),
    "float labels": ({"x_train": X, "y_train": Y.astype(float)}, "labels of float64"),
    "negative labels": ({"x_train": X, "y_train": Y - 1}, "label -1"),
    "one class": ({"x_train": X, "y_train": 0 * Y}, "two classes"),
    "text": ({"x_train": X.astype(str), "y_train": Y}, "Expected numbers"),
    "not finite": ({"x_train": X + np.nan, "y_train": Y}, "not finite"),
    "missing": ({"x_train": X}, "y_train missing; it holds x_train"),
    "half a test split": ({"x_train": X, "y_train": Y, "x_test": X}, "belong together"),
    "other test shape": (
        {"x_train": X, "y_train": Y, "x_test": X[:, :3], "y_test": Y},
        "must be of one shape",
    ),
    "too few": ({"x_train": X[:2], "y_train": Y[:2]}, "too few"),
    "objects": ({"x_train": X.astype(object), "y_train": Y}, "plain arrays"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD.values(), ids=BAD)
def test_bad_data_is_one_clear_error(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)

    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path / "bad.npz"))


def test_bad_files_are_one_clear_error(tmp_path):
    whole = tmp_path / "whole.npz"
    np.savez(whole, x_train=X, y_train=Y)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole.read_bytes()[:-200])
    (tmp_path / "empty.npz").touch()
    (tmp_path / "folder.npz").mkdir()

    for name in ("cut.npz", "empty.npz", "folder.npz"):
        with pytest.raises(DataError, match=r"not a whole \.npz"):
            load_data(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        load_data(str(tmp_path / "none.npz"))


def _splits(data):
    return [data.train, data.validation, data.test]
