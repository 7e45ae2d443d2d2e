"""Small models and runs that the pruning tests share."""

import keras
import numpy as np
from keras import layers


def image_model():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(6, 3, name="first")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    x = layers.Conv2D(12, 2, activation="relu", name="second")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(5, name="logits")(x), name="image")


def dense_model():
    keras.utils.set_random_seed(2)
    return keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(16, activation="relu", name="hidden"),
            layers.Dense(4, name="out"),
        ],
        name="dense",
    )


def dense_data(size=96):
    random = np.random.default_rng(0)
    x = random.normal(size=(size, 12)).astype("float32")
    return x, (x[:, :4] * 2 + random.normal(scale=0.1, size=(size, 4))).astype("float32")


def masks_of(model):
    """All masks of a model, flat."""
    return np.concatenate(
        [
            keras.ops.convert_to_numpy(transform.state["mask"]).ravel()
            for layer in model.layers
            for _, transform in getattr(layer, "transforms", [])
        ]
    )


def zeros_of(model):
    """Share of zeros that the masks make."""
    return 1 - masks_of(model).mean()


class Watch(keras.callbacks.Callback):
    """Notes the masks after every batch."""

    def __init__(self, model=None):
        super().__init__()
        self.pruned = model
        self.masks = []

    def on_train_batch_end(self, batch, logs=None):
        self.masks.append(masks_of(self.pruned or self.model))

    @property
    def zeros(self):
        return [1 - masks.mean() for masks in self.masks]
