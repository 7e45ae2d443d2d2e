"""A canary for each private Keras name that tfaccel needs."""

import inspect

import keras
import numpy as np
import pytest

from tfaccel.core import keras_private


class _Unhurried(keras.optimizers.SGD):
    """Remembers what Keras calls, in order."""

    def __init__(self, **options):
        super().__init__(0.1, **options)
        self.calls = []

    def _clip_gradients(self, grads):
        self.calls.append("clip")
        return super()._clip_gradients(grads)

    def _apply_weight_decay(self, variables):
        self.calls.append("decay")
        super()._apply_weight_decay(variables)


def test_optimizers_still_clip_through_the_hook():
    variables = [keras.Variable([1.0, 2.0]), keras.Variable([3.0])]
    optimizer = _Unhurried(clipvalue=0.5)
    seen = []

    def hook(grads):
        seen.extend(grads)
        return original(grads)

    original = keras_private.replace_clip_gradients(optimizer, hook)
    assert list(inspect.signature(original).parameters) == ["grads"]
    optimizer.apply([np.array([4.0, 4.0], "float32"), np.array([8.0], "float32")], variables)
    # Once, with all gradients as they came, before clipping and weight decay.
    assert [np.asarray(grad).tolist() for grad in seen] == [[4.0, 4.0], [8.0]]
    assert optimizer.calls == ["clip", "decay"]
    np.testing.assert_allclose(variables[0], [0.95, 1.95], rtol=1e-6)
    trained = keras_private.trained_variables(optimizer)
    assert [a is b for a, b in zip(trained, variables, strict=True)] == [True, True]


def test_accumulating_optimizers_clip_the_mean_once():
    variable = keras.Variable([1.0])
    optimizer = _Unhurried(gradient_accumulation_steps=2)
    seen = []
    keras_private.replace_clip_gradients(optimizer, lambda grads: seen.extend(grads) or grads)
    for value in (2.0, 6.0):
        optimizer.apply([np.array([value], "float32")], [variable])
    assert [float(grad[0]) for grad in seen] == [4.0]


def test_loss_scale_optimizer_builds_its_inner_one_first_and_asks_check_finite():
    inner = keras.optimizers.SGD(0.1)
    outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    found, asked = [], []
    build, check = inner.build, outer.check_finite

    def building(variables):
        found.append(keras_private.loss_scale_optimizer_that_builds(inner))
        assert not asked
        build(variables)

    def checking(grads):
        asked.append(list(grads))
        return check(grads)

    inner.build, outer.check_finite = building, checking
    seen = []
    keras_private.replace_clip_gradients(inner, lambda grads: seen.extend(grads) or grads)
    outer.apply([np.array([8.0], "float32")], [keras.Variable([1.0])])
    assert found == [outer]
    assert len(asked) == 1
    assert float(seen[0][0]) == 2.0  # unscaled
    assert keras_private.loss_scale_optimizer_that_builds(inner) is None


def test_keras_wraps_optimizers_in_a_loss_scale_optimizer_by_itself():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.dtype_policy = keras.DTypePolicy("mixed_float16")
    inner = keras.optimizers.SGD()
    model.compile(inner, "mse")
    assert model.optimizer.inner_optimizer is inner


@pytest.mark.parametrize("compiled", [True, False])
def test_tracing_for_xla_is_seen(compiled):
    import tensorflow as tf

    seen = []

    @tf.function(jit_compile=compiled)
    def step(x):
        seen.append(keras_private.is_compiled_by_xla())
        return tf.function(inner)(x)

    def inner(x):
        seen.append(keras_private.is_compiled_by_xla())
        return x

    step.get_concrete_function(tf.constant(1.0))
    assert seen == [compiled, compiled]
    assert not keras_private.is_compiled_by_xla()
