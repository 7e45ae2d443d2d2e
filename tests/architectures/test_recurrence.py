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


@pytest.mark.parametrize("jit", [False, True])
def test_gradients_equal_those_of_a_loop(jit):
    import tensorflow as tf

    random = np.random.default_rng(0)
    forget, update = (tf.constant(random.uniform(size=(2, 37, 3)), tf.float32) for _ in range(2))
    initial = tf.constant(random.normal(size=(2, 3)), tf.float32)
    weights = tf.constant(random.normal(size=(2, 37, 3)), tf.float32)

    def one_by_one(f, u, state):
        states = []
        for step in range(37):
            state = f[:, step] * state + u[:, step]
            states.append(state)
        return tf.stack(states, 1)

    def gradients(function):
        @tf.function(jit_compile=jit)
        def run():
            with tf.GradientTape() as tape:
                tape.watch((forget, update, initial))
                loss = tf.reduce_sum(weights * function(forget, update, initial))
            return tape.gradient(loss, (forget, update, initial))

        return run()

    for ours, theirs in zip(gradients(linear_recurrence), gradients(one_by_one), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_last_step_that_counts():
    x = np.arange(24, dtype="float32").reshape(3, 4, 2)
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(last_step(x, mask), [x[0, 1], x[1, 3], [0, 0]])
    np.testing.assert_array_equal(last_step(x, None), x[:, -1])
