import keras
import numpy as np
import pytest

from tfaccel.architectures.recomputation import (
    Repeatable,
    call_options,
    decide,
    in_turn,
    remembering,
    repeating,
)


def test_decisions_are_repeated_in_order():
    numbers = iter(range(10))
    assert decide(lambda: next(numbers)) == 0  # on its own, just made
    with remembering() as decisions:
        made = [decide(lambda: next(numbers)) for _ in range(2)]
        with remembering() as inner:  # a repetition within, which is remembered on its own
            decide(lambda: next(numbers))
    assert (made, decisions, inner) == ([1, 2], [1, 2], [3])
    with repeating(decisions):
        assert [decide(lambda: next(numbers)) for _ in range(2)] == [1, 2]
    assert decide(lambda: next(numbers)) == 4


def test_decisions_end_with_their_scope_after_an_error():
    with pytest.raises(KeyError), remembering():
        raise KeyError
    with pytest.raises(KeyError), repeating([1]):
        raise KeyError
    assert decide(lambda: 5) == 5


def test_a_repetition_draws_the_same_and_changes_nothing():
    layer = keras.Sequential([keras.layers.BatchNormalization(), keras.layers.Dropout(0.5, seed=1)])
    layer.build((None, 50))
    call = Repeatable(layer, True, None)
    x = np.random.default_rng(0).normal(size=(8, 50)).astype("float32")
    before = [np.array(v) for v in layer.variables]
    weights = [keras.ops.copy(v) for v in call.trainable]
    states = [np.array(v) for v in call.states]
    y, after = call.first(keras.ops.convert_to_tensor(x), weights, states)
    ones = keras.ops.ones((8, 50))
    again, gradient, _ = call.gradients(keras.ops.convert_to_tensor(x), weights, ones)
    np.testing.assert_array_equal(y, again)
    assert 0.3 < np.mean(np.asarray(y) == 0) < 0.7
    assert gradient.shape == x.shape
    for variable, value in zip(layer.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    changed = [not np.array_equal(a, b) for a, b in zip(after, call.states, strict=True)]
    assert changed == [True] * 3  # mean, variance, seed


def test_a_loss_of_its_own_is_refused():
    layer = keras.layers.Dense(3, activity_regularizer="l2", name="noisy")
    layer.build((None, 3))
    call = Repeatable(layer, True, None)
    weights = [keras.ops.copy(v) for v in call.trainable]
    with pytest.raises(ValueError, match="'noisy' adds a loss"):
        call.first(keras.ops.ones((2, 3)), weights, [])


def test_a_mask_goes_where_it_is_used():
    mask = object()
    attention = keras.layers.LSTM(2)
    assert call_options(attention, True, mask) == {"training": True, "mask": mask}
    assert call_options(attention, True, None) == {"training": True}
    assert call_options(keras.layers.Dense(2), False, mask) == {"training": False}
    assert call_options(keras.layers.LayerNormalization(), False, mask) == {"training": False}


@pytest.mark.parametrize("compiled", [False, True])
def test_in_turn_changes_nothing_but_the_order(compiled):
    values = [np.array([1.0, np.inf], "float32"), np.array([[3.0]], "float32")]
    after = [np.array([np.inf, 2.0], "float32")]
    for ours, given in zip(in_turn(values, after, compiled=compiled), values, strict=True):
        np.testing.assert_array_equal(ours, given)
    if compiled:
        (spoilt,) = in_turn(values[:1], [np.array([np.nan], "float32")], compiled=True)
        assert np.isnan(np.asarray(spoilt)).any()  # not hidden
