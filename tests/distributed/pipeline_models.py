"""Models and data that pipelines are tried on, here and in Horovod's ranks."""

import keras
import numpy as np
from keras import layers

SAMPLES = 42  # not a multiple of the batch, nor of the micro-batches
BATCH = 16


def skipping(seed=1):
    """Two inputs, two outputs, and tensors that skip stages; with losses of weights and outputs."""
    keras.utils.set_random_seed(seed)
    a, b = keras.Input((6,), name="a"), keras.Input((3,), name="b")
    x = layers.Dense(8, activation="tanh", name="first", kernel_regularizer="l2")(a)
    y = layers.Dense(8, activation="relu", name="second")(x)
    z = layers.Add(name="sum")([x, y])
    aside = layers.Dense(2, name="aside")(z)
    w = layers.Dense(8, activation="tanh", name="third", activity_regularizer="l2")(z)
    w = layers.Concatenate(name="join")([w, b, x])
    return keras.Model([a, b], [layers.Dense(3, name="out")(w), aside], name="skipping")


def data_of_skipping(samples=SAMPLES, seed=0):
    random = np.random.default_rng(seed)

    def array(width):
        return random.normal(size=(samples, width)).astype("float32")

    return [array(6), array(3)], [array(3), array(2)]


def compile_skipping(model, optimizer):
    model.compile(optimizer, ["mse", "mae"], metrics=[["mae"], ["mse"]])


def fit_skipping(model, optimizer, epochs=2, **options):
    """Trains a model or a pipeline; returns its history."""
    compile_skipping(model, optimizer)
    x, y = data_of_skipping()
    held_out = data_of_skipping(20, seed=1)
    return model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        validation_data=held_out,
        **options,
    ).history


def weights_of(model):
    return np.concatenate([np.asarray(w, np.float64).ravel() for w in model.get_weights()])


def difference(one, other):
    """Largest difference between weights of two models."""
    return float(np.abs(weights_of(one) - weights_of(other)).max())
