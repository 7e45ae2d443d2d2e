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


def convolutional(name="convolutional", image="image", stem="_conv_stem"):
    """MobileNet-like: stem, inverted residual with depthwise convolution, pooling, logits."""
    inputs = keras.Input((12, 12, 3), name=image)
    x = layers.Conv2D(8, 3, 2, padding="same", use_bias=False, name=stem)(inputs)
    x = layers.ReLU(6.0, name="stem_relu")(layers.BatchNormalization(name="stem_norm")(x))
    y = layers.Conv2D(24, 1, use_bias=False, name="expand")(x)
    y = layers.ReLU(6.0, name="expand_relu")(layers.BatchNormalization(name="expand_norm")(y))
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")(y)
    y = layers.ReLU(6.0, name="depthwise_relu")(layers.BatchNormalization(name="depthwise_norm")(y))
    y = layers.Conv2D(8, 1, use_bias=False, name="project")(y)
    x = layers.Add(name="sum")([x, layers.BatchNormalization(name="project_norm")(y)])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return randomized(keras.Model(inputs, layers.Dense(5, name="logits")(x), name=name))


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


def large():
    """Mostly weights: its file's size is that of its 66,570 numbers."""
    return randomized(
        keras.Sequential(
            [
                keras.Input((256,), name="x"),
                layers.Dense(250, activation="relu", name="hidden"),
                layers.Dense(9, name="logits"),
            ],
            name="large",
        )
    )
