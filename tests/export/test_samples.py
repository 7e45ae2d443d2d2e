"""Samples in all the forms that users have them in."""

import numpy as np
import pytest

from tests.export import networks
from tests.export.networks import samples
from tfaccel.export.samples import MOST_SAMPLES, gather_samples

X = samples(10, 12, 12, 3)
Y = np.arange(10)
LEFT, RIGHT = samples(10, 4), samples(10, 3, seed=2)


def dataset(*parts):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(parts if len(parts) > 1 else parts[0]).batch(4)


ONE = {
    "array": X,
    "float64": X.astype("float64"),
    "dict": {"image": X},
    "list_of_batches": [X[:4], X[4:]],
    "labelled_batches": [(X[:4], Y[:4]), (X[4:], Y[4:])],
    "generator": (X[i : i + 5] for i in (0, 5)),
    "dataset": dataset(X),
    "labelled_dataset": dataset(X, Y),
    "weighted_dataset": dataset(X, Y, Y),
    "dataset_of_dicts": dataset({"image": X}, Y),
}
TWO = {
    "list": [LEFT, RIGHT],
    "tuple": (LEFT, RIGHT),
    "dict": {"a_right": RIGHT, "z_left": LEFT, "more": Y},
    "dataset": dataset(LEFT, RIGHT),
    "labelled_dataset": dataset((LEFT, RIGHT), Y),
    "dataset_of_dicts": dataset({"a_right": RIGHT, "z_left": LEFT}, Y),
    "batches": ([LEFT[i : i + 5], RIGHT[i : i + 5]] for i in (0, 5)),
}


@pytest.mark.parametrize("data", ONE.values(), ids=ONE)
def test_one_input(data):
    (found,) = gather_samples(networks.plain(), data, "data")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, X)


@pytest.mark.parametrize("data", TWO.values(), ids=TWO)
def test_two_inputs(data):
    left, right = gather_samples(networks.several(), data, "data")
    np.testing.assert_array_equal(left, LEFT)
    np.testing.assert_array_equal(right, RIGHT)


def test_an_endless_source_is_read_no_further_than_needed():
    drawn = []

    def forever():
        while True:
            drawn.append(1)
            yield X

    (found,) = gather_samples(networks.plain(), forever(), "data")
    assert len(found) == MOST_SAMPLES
    assert len(drawn) == -(-MOST_SAMPLES // 10)


BAD = {
    "nothing": ([], r"takes \['any', 12, 12, 3\], but got nothing"),
    "empty": (X[:0], "must hold samples, 1 at least, but got 0"),
    "one_sample_without_batch": (X[0], r"but got \[12, 12, 3\]"),
    "list_of_samples": (list(X), r"but got \[120, 12, 3\]"),
    "uneven_batches": ([X, X[:, 1:]], "what cannot be read as such"),
    "arrays_and_labels": ((X, Y), "but got"),
    "missing_name": ({"picture": X}, r"has \['picture'\], but lacks the inputs \['image'\]"),
    "number": (3, r"but got \[\]"),
    "nan": (np.full_like(X, np.nan), "holds a NaN or an infinity for input 'image'"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_bad_data(data, message):
    with pytest.raises(ValueError, match=message) as caught:
        gather_samples(networks.plain(), data, "verify_data")
    assert "verify_data" in str(caught.value)


def test_inputs_of_unequal_length():
    with pytest.raises(ValueError, match=r"different numbers of samples for the inputs: \[9, 10\]"):
        gather_samples(networks.several(), [LEFT, RIGHT[1:]], "data")
