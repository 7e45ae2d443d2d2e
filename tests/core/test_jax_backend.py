"""Core and transforms on JAX: run in a process of its own with KERAS_BACKEND=jax."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.core.transform_samples import Neutral, Scaled, all_weights
from tfaccel.core.artifacts import load_model
from tfaccel.core.stripping import strip
from tfaccel.core.transforms import transform_model

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="needs KERAS_BACKEND=jax (tools/test runs it so)"
)


def make_model(dropout=0.3):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Dropout(dropout, seed=2, name="dropout")(layers.ReLU(name="relu")(x))
    x = layers.Reshape((16, 4), name="rows")(x)
    x = layers.LSTM(3, activity_regularizer="l2", name="lstm")(x)
    return keras.Model(inputs, layers.Dense(2, name="out")(x))


def fit(model, epochs=2):
    random = np.random.default_rng(0)
    x = random.normal(size=(8, 6, 6, 3)).astype("float32")
    y = random.normal(size=(8, 2)).astype("float32")
    if not model.compiled:
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    return model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0).history["loss"]


def test_neutral_transforms_change_no_digit_of_training():
    plain, wrapped = make_model(), transform_model(make_model(), all_weights(Neutral))
    start = [np.array(w) for w in plain.get_weights()]
    assert fit(wrapped) == fit(plain)
    moved = 0
    for ours, theirs, before in zip(
        strip(wrapped).get_weights(), plain.get_weights(), start, strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
        moved += not np.array_equal(before, theirs)
    assert moved == len(start)


def test_saved_in_mid_training_goes_on_as_if_not_stopped(tmp_path):
    # Keras does not save the state of a dropout's seed, so there is none here.
    through = transform_model(make_model(dropout=0), all_weights(Scaled))
    halted = transform_model(make_model(dropout=0), all_weights(Scaled))
    losses = fit(through, 4)
    first = fit(halted, 2)
    halted.save(tmp_path / "halfway.keras")
    assert first + fit(load_model(tmp_path / "halfway.keras", compile=True), 2) == losses


def test_strip_bakes_the_transform():
    model = make_model()
    stripped = strip(transform_model(model, all_weights(Scaled)))
    kernel = np.asarray(model.get_layer("conv").kernel)
    np.testing.assert_array_equal(np.asarray(stripped.get_layer("conv").kernel), kernel * 0.5)
