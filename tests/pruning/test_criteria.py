"""What weights are worth."""

import keras
import numpy as np
import pytest

from tfaccel.pruning.criteria import CRITERIA, Magnitude, Random

WEIGHT = np.array([[-3.0, 1.0], [0.0, 2.0]], "float32")


def test_magnitude_is_the_absolute_value():
    assert Magnitude()(WEIGHT, 0).tolist() == [[3.0, 1.0], [0.0, 2.0]]


def test_random_depends_on_the_seed_and_not_on_the_weight():
    scores = Random()(WEIGHT, 5)
    np.testing.assert_array_equal(scores, Random()(-7 * WEIGHT, 5))
    assert (scores != Random()(WEIGHT, 6)).all()
    assert scores.shape == WEIGHT.shape


@pytest.mark.parametrize("name", CRITERIA.names())
def test_round_trips_through_its_config(name):
    criterion = CRITERIA.get(name)
    assert CRITERIA.get(keras.saving.serialize_keras_object(criterion)) == criterion


def test_unknown_criterion_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"magnitude, movement, random, snip.*Did you mean 'magnitude'"
    ):
        CRITERIA.get("magnitudes")
