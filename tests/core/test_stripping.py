"""Whatever was put in comes out, and only that."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.core.transform_samples import Scaled, Shifted, all_weights
from tfaccel.core.stripping import bake_weights, strip
from tfaccel.core.transforms import transform_model


@keras.saving.register_keras_serializable("tfaccel_tests")
class Noop(layers.Layer):
    """A layer that is taken out by strip."""

    def call(self, inputs):
        return inputs

    def strip_layer(self):
        return None


@keras.saving.register_keras_serializable("tfaccel_tests")
class Doubler(layers.Layer):
    """A layer that is replaced by a plain one."""

    def call(self, inputs):
        return inputs * 2

    def strip_layer(self):
        return layers.Rescaling(2.0, name=self.name)


def model_with_ours():
    inner_in = keras.Input((3,), name="inner_in")
    inner = keras.Model(
        inner_in, Noop(name="noop_inner")(layers.Dense(3, name="a")(inner_in)), name="n"
    )
    inputs = keras.Input((3,), name="in")
    x = Noop(name="noop")(inner(inputs))
    x = Doubler(name="double")(x)
    return keras.Model(inputs, Noop(name="last")(layers.Dense(2, name="b")(x)), name="whole")


def classes_in(model):
    for layer in model.layers:
        yield type(layer)
        if isinstance(layer, keras.Model):
            yield from classes_in(layer)


def test_strip_leaves_plain_keras_and_the_same_outputs():
    model = transform_model(model_with_ours(), all_weights(Scaled))
    weights = [np.array(w) for w in model.get_weights()]
    stripped = strip(model)
    assert all(c.__module__.startswith("keras.") for c in classes_in(stripped))
    assert [x.name for x in stripped.layers] == ["in", "n", "double", "b"]
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    np.testing.assert_array_equal(np.asarray(stripped(x)), np.asarray(model(x)))
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_bake_keeps_other_layers_of_ours():
    baked = bake_weights(transform_model(model_with_ours(), all_weights(Scaled)))
    assert Noop in set(classes_in(baked))
    assert {c.__name__ for c in classes_in(baked)} & {"TransformedLayer"} == set()


def test_finalize_runs_in_stage_order():
    inputs = keras.Input((1,))
    model = keras.Model(inputs, layers.Dense(1, use_bias=False, name="d")(inputs))
    model.set_weights([np.array([[4.0]], "float32")])
    model = transform_model(model, lambda _: {"kernel": Shifted(1.0)})
    model = transform_model(model, lambda _: {"kernel": Scaled(0.5)})
    assert float(strip(model).get_weights()[0][0, 0]) == 4.0 * 0.5 + 1.0


def test_plain_model_comes_back_as_an_equal_copy():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Dense(2)(inputs))
    copy = strip(model)
    assert copy is not model
    np.testing.assert_array_equal(copy.get_weights()[0], model.get_weights()[0])


def test_sequential_stays_sequential():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="d"), Noop(name="n")])
    stripped = strip(transform_model(model, lambda x: all_weights(Scaled)(x) or None))
    assert isinstance(stripped, keras.Sequential)
    assert [x.name for x in stripped.layers] == ["d"]


def test_unbuilt_model_is_refused():
    with pytest.raises(ValueError, match="has no weights yet"):
        strip(keras.Sequential([layers.Dense(2)]))


def test_what_is_no_model_is_refused_in_strips_own_name():
    with pytest.raises(TypeError, match=r"strip\(\) needs a keras.Model, but got NoneType"):
        strip(None)
