"""A schedule that stopped half-way must not pass for one that ended."""

import keras
import numpy as np
import pytest

import tfaccel
from tfaccel.pruning import PolynomialDecay, UpdatePruning, prune


def _trained(steps):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(16, name="d")])
    pruned = prune(model, PolynomialDecay(0.0, 0.75, 0, 20, frequency=5))
    pruned.compile("sgd", "mse")
    x = np.ones((4 * steps, 16), "float32")
    pruned.fit(x, x, batch_size=4, verbose=0, callbacks=[UpdatePruning()])
    return pruned


def test_half_a_schedule_is_a_warning_that_says_how_far_it_got():
    with pytest.warns(
        UserWarning, match=r"'d' was pruned to \d.*% at step \d+ .*75\.0% at step 20"
    ):
        tfaccel.strip(_trained(7))


def test_whole_schedule_is_silent():
    stripped = tfaccel.strip(_trained(25))  # a warning is an error in every test
    assert (np.asarray(stripped.get_layer("d").kernel) == 0).sum() == 192


def test_callback_forgotten_when_training_goes_on_is_noticed():
    pruned = _trained(7)
    pruned.compile("sgd", "mse")
    x = np.ones((200, 16), "float32")
    pruned.fit(x, x, batch_size=4, verbose=0)
    with pytest.warns(UserWarning, match="went on without UpdatePruning"):
        tfaccel.strip(pruned)
