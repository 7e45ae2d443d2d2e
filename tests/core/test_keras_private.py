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


def test_optimizers_still_apply_through_one_method_with_the_variables_that_have_gradients():
    variables = [keras.Variable([1.0]), keras.Variable([2.0]), keras.Variable([3.0])]
    optimizer, applied = keras.optimizers.SGD(), []
    keras_private.watch_applied_variables(optimizer, applied)
    gradient = np.ones(1, "float32")
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([gradient, None, gradient], variables)
    assert [variable.path for variable in applied] == [variables[0].path, variables[2].path]


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


def small():
    inputs = keras.Input((4,))
    x = keras.layers.Dropout(0.5, seed=1, name="dropout")(keras.layers.Dense(3, name="d")(inputs))
    return keras.Model(inputs, x * 2.0)


def test_call_nodes_come_in_order_and_hold_arguments_and_outputs():
    nodes = keras_private.call_nodes(small())
    assert [node.operation.name for node in nodes][1:3] == ["d", "dropout"]
    assert [node.is_input for node in nodes] == [True, False, False, False]
    assert nodes[1].arguments.args == (nodes[0].outputs[0],)
    assert nodes[3].arguments.args[1] == 2.0


def test_graph_of_a_sequential_model_is_known_once_it_is_built():
    model = keras.Sequential([keras.layers.Dense(2)])
    assert not keras_private.has_graph(model)
    model.build((None, 3))
    assert keras_private.has_graph(model)
    assert keras_private.functional_of(model).input.shape == (None, 3)
    assert not keras_private.has_graph(None)


def test_sublayers_and_seeds():
    model = small()
    names = [layer.name for layer in keras_private.sublayers(model)]
    assert names[0] == model.name
    assert {"d", "dropout"} <= set(names)
    (state,) = keras_private.seed_states(model)
    before = np.asarray(state).copy()
    model(np.ones((1, 4)), training=True)
    assert not np.array_equal(np.asarray(state), before)


def test_wrapper_binds_arguments_as_the_inner_layer_does():
    class Around(keras.layers.Wrapper):
        def call(self, *args, training=None, **kwargs):
            self.seen = training
            return self.layer(*args, **kwargs)

        def compute_output_spec(self, *args, **kwargs):
            return self.layer.compute_output_spec(*args, **kwargs)

    inner = keras.layers.MultiHeadAttention(1, 2)
    x = np.ones((1, 3, 2), "float32")
    inner(x, x)
    around = Around(inner)
    around.built = True
    with pytest.raises(ValueError, match="cannot mix tensors and non-tensors"):
        around(x, value=x, use_causal_mask=True)
    keras_private.adopt_call_signature(around, inner)
    around(x, value=x, use_causal_mask=True, training=True)
    assert around.seen is True
    assert keras_private.takes_training(inner)
    assert not keras_private.takes_training(keras.layers.ReLU())


def test_functional_constructors_are_told_apart():
    class Same(keras.Model):
        pass

    class Other(keras.Model):
        def __init__(self, units):
            super().__init__()

    assert keras_private.has_functional_constructor(Same)
    assert not keras_private.has_functional_constructor(Other)


def test_functional_constructor_with_arguments_that_keras_forgets_is_none():
    class More(keras.Model):
        def __init__(self, *args, more=1, **kwargs):
            super().__init__(*args, **kwargs)

    assert not keras_private.has_functional_constructor(More)


def test_own_flag_is_set_without_those_of_inner_layers():
    model = small()
    keras_private.set_own_trainable(model, False)
    assert not model.trainable
    assert model.trainable_variables == []
    assert model.get_layer("d").trainable
    assert model.get_layer("d").kernel.trainable


def test_layers_that_say_how_they_are_built_are_told_from_others():
    class Taught(keras.layers.Layer):
        def build_from_config(self, config):
            self.build(config["shape"])

    class Telling(keras.layers.Layer):
        def get_build_config(self):
            return {}

    assert keras_private.says_how_it_is_built(Taught())
    assert keras_private.says_how_it_is_built(Telling())
    assert not keras_private.says_how_it_is_built(keras.layers.Dense(2))


def test_lambdas_are_deserialized_in_the_trusted_scope_only():
    config = keras.saving.serialize_keras_object(keras.layers.Lambda(lambda x: x))
    with pytest.raises((ValueError, TypeError), match=r"lambda|deserializ"):
        keras.saving.deserialize_keras_object(config)
    with keras_private.trusted_deserialization():
        assert keras.saving.deserialize_keras_object(config).function(3) == 3


def test_own_variables_and_children_cover_all_weights():
    layer = keras.layers.Bidirectional(keras.layers.LSTM(2))
    layer.build((None, 3, 4))
    assert keras_private.own_variables(layer) == []
    inner = keras_private.children(layer)
    assert any(child is layer.forward_layer for child in inner)
    assert any(child is layer.backward_layer for child in inner)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="d")])
    assert [child.name for child in keras_private.children(model)] == ["d"]
    kernel, bias = keras_private.own_variables(model.layers[0])
    assert (kernel.name, bias.name) == ("kernel", "bias")


@pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`")
def test_sequential_still_builds_by_the_first_layers_input_shape():
    dense = keras.layers.Dense(2, input_shape=(3,))
    assert keras_private.input_shape_argument(dense) == (3,)
    assert keras_private.input_shape_argument(keras.layers.Dense(2)) is None
    plain = keras.layers.Dense(2)
    keras_private.set_input_shape_argument(plain, (3,))
    assert keras.Sequential([plain]).input_shape == (None, 3)


def test_batch_normalization_still_asks_for_moments_once_in_training():
    layer, asked = keras.layers.BatchNormalization(momentum=0.0), []

    def hook(inputs, mask):
        asked.append((inputs.shape, mask))
        mean, variance = original(inputs, mask)
        return mean + 1.0, variance

    original = keras_private.replace_moments(layer, hook)
    x = np.arange(8, dtype="float32").reshape(4, 2)
    layer(x, training=True)
    layer(x, training=False)
    assert asked == [((4, 2), None)]
    np.testing.assert_allclose(layer.moving_mean, x.mean(axis=0) + 1.0)
