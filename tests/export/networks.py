"""Small networks of every form that is exported, with weights that are not zero anywhere."""

import keras
import numpy as np
from keras import layers


def randomized(model, seed=0):
    """Gives every weight a value: batch norm and biases of a new model would hide mistakes."""
    random = np.random.default_rng(seed)
    model.set_weights(
        [
            random.uniform(0.5, 1.5, w.shape) if w.ndim == 1 else random.normal(0, 0.3, w.shape)
            for w in model.get_weights()
        ]
    )
    return model


def samples(count, *shape, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype("float32")


def plain(name="plain"):
    """Two convolutions and a dense layer: shallow enough to agree to one step in int8."""
    return randomized(
        keras.Sequential(
            [
                keras.Input((12, 12, 3), name="image"),
                layers.Conv2D(8, 3, strides=2, activation="relu", name="first"),
                layers.Conv2D(8, 3, activation="relu", name="second"),
                layers.Flatten(name="flatten"),
                layers.Dense(5, name="logits"),
            ],
            name=name,
        )
    )


def several():
    """Two inputs and two outputs, none in alphabetical order."""
    left, right = keras.Input((4,), name="z_left"), keras.Input((3,), name="a_right")
    x = layers.Concatenate(name="both")([left, right])
    outputs = [layers.Dense(2, name="z_out")(x), layers.Dense(6, name="a_out")(left)]
    return randomized(keras.Model([left, right], outputs, name="several"))


def keyed():
    """Inputs and outputs in dicts; the outputs' keys are not their layers' names."""
    left, right = keras.Input((4,), name="left"), keras.Input((3,), name="right")
    x = layers.Concatenate(name="both")([left, right])
    outputs = {"value": layers.Dense(1, name="x")(x), "classes": layers.Dense(6, name="y")(x)}
    return randomized(keras.Model({"right": right, "left": left}, outputs, name="keyed"))


def nested():
    """A model inside a model, called twice."""
    entry = keras.Input((8, 8, 4), name="entry")
    body = layers.Conv2D(4, 3, padding="same", name="conv")(entry)
    body = keras.Model(entry, layers.BatchNormalization(name="norm")(body), name="body")
    inputs = keras.Input((8, 8, 4), name="image")
    x = layers.Flatten(name="flatten")(body(layers.ReLU(name="relu")(body(inputs))))
    return randomized(keras.Model(inputs, layers.Dense(3, name="logits")(x), name="nested"))


def recurrent(layer, **options):
    return keras.Sequential(
        [keras.Input((6, 4), name="steps"), layer(5, name="memory", **options), layers.Dense(3)],
        name="recurrent",
    )


def embedding():
    return randomized(
        keras.Sequential(
            [
                keras.Input((7,), dtype="int32", name="words"),
                layers.Embedding(50, 8, name="table"),
                layers.GlobalAveragePooling1D(name="pool"),
                layers.Dense(3, name="logits"),
            ],
            name="embedding",
        )
    )


def attention():
    inputs = keras.Input((6, 8), name="tokens")
    x = layers.LayerNormalization(name="norm")(inputs)
    x = inputs + layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.Dense(8, activation="gelu", name="dense")(x)
    return randomized(keras.Model(inputs, layers.Flatten(name="flatten")(x), name="attention"))
