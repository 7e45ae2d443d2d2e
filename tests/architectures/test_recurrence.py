"""The parallel scan against a loop, forwards and backwards."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfaccel.architectures.recurrence import last_step, linear_recurrence


def loop(forget, update, initial=None):
    state = np.zeros_like(update[:, 0]) if initial is None else initial
    states = []
    for step in range(update.shape[1]):
        state = forget[:, step] * state + update[:, step]
        states.append(state)
    return np.stack(states, 1)


@settings(deadline=None, max_examples=60)
@given(
    steps=st.integers(1, 300),
    seed=st.integers(0, 2**20),
    initial=st.booleans(),
    edges=st.booleans(),
)
def test_equals_a_loop(steps, seed, initial, edges):
    random = np.random.default_rng(seed)
    forget = random.uniform(size=(2, steps, 3)).astype("float32")
    if edges:  # gates that are wholly open or shut
        forget = np.round(forget)
    update = random.normal(size=(2, steps, 3)).astype("float32")
    start = random.normal(size=(2, 3)).astype("float32") if initial else None
    found = linear_recurrence(*map(keras.ops.convert_to_tensor, (forget, update)), start)
    np.testing.assert_allclose(found, loop(forget, update, start), rtol=1e-4, atol=1e-5)


def test_long_memories_neither_vanish_nor_overflow():
    steps = 3000
    forget = np.full((1, steps, 1), 1e-3, "float32")  # products underflow, and must do no harm
    forget[:, steps // 2 :] = 1.0
    update = np.zeros((1, steps, 1), "float32")
    update[:, steps // 2] = 5.0
    found = np.asarray(linear_recurrence(*map(keras.ops.convert_to_tensor, (forget, update))))
    assert found[0, -1, 0] == 5.0
    assert found[0, steps // 2 - 1, 0] == 0.0


def one_by_one(forget, update, state):
    import tensorflow as tf

    states = []
    for step in range(update.shape[1]):
        state = forget[:, step] * state + update[:, step]
        states.append(state)
    return tf.stack(states, 1)


def problem(steps, *, edges=False):
    import tensorflow as tf

    random = np.random.default_rng(steps)
    forget = random.uniform(size=(2, steps, 3))
    forget = np.round(forget) if edges else forget  # wholly open or shut
    rest = [random.normal(size=shape) for shape in ((2, steps, 3), (2, 3), (2, steps, 3))]
    return [tf.constant(x, tf.float32) for x in (forget, *rest)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("opened", [False, True], ids=["known", "open"])
def test_gradients_equal_those_of_a_loop(jit, opened):
    import tensorflow as tf

    def gradients(function):
        def run(forget, update, initial, weights):
            variables = forget, update, initial
            with tf.GradientTape() as tape:
                tape.watch(variables)
                states = function(*variables)
                loss = tf.reduce_sum(weights * states)
            return states, *tape.gradient(loss, variables, unconnected_gradients="zero")

        return run

    sequence, state = tf.TensorSpec((2, None, 3)), tf.TensorSpec((2, 3))
    signature = [sequence, sequence, state, sequence] if opened else None
    ours = tf.function(gradients(linear_recurrence), input_signature=signature, jit_compile=jit)
    theirs = gradients(one_by_one)
    for steps in (1, 16, 37):
        for edges in (False, True):
            given = problem(steps, edges=edges)
            for found, expected in zip(ours(*given), theirs(*given), strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_gradients():
    import tensorflow as tf

    *variables, weights = problem(20)

    def second(function):
        with tf.GradientTape() as outer:
            outer.watch(variables)
            with tf.GradientTape() as inner:
                inner.watch(variables)
                loss = tf.reduce_sum(weights * function(*variables) ** 2)
            size = sum(tf.reduce_sum(g**2) for g in inner.gradient(loss, variables))
        return outer.gradient(size, variables)

    for ours, theirs in zip(second(linear_recurrence), second(one_by_one), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 17, 256, 257, 4100])
def test_an_open_number_of_steps_equals_a_loop(steps):
    import tensorflow as tf

    spec = tf.TensorSpec((None, None, 3))
    scan = tf.function(linear_recurrence, input_signature=[spec, spec])
    forget, update, *_ = problem(steps)
    found = scan(forget, update)
    np.testing.assert_allclose(
        found, loop(*map(np.asarray, (forget, update))), rtol=1e-4, atol=1e-5
    )


def test_last_step_that_counts():
    x = np.arange(24, dtype="float32").reshape(3, 4, 2)
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(last_step(x, mask), [x[0, 1], x[1, 3], [0, 0]])
    np.testing.assert_array_equal(last_step(x, None), x[:, -1])
