"""The data sets of small images and the networks that the benchmarks share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

import tfaccel

Data = tuple[Any, Any, Any, Any]


def resnet20(shape: tuple[int, int, int], classes: int, width: float = 1.0) -> keras.Model:
    """Builds ResNet-20 (He et al. 2016, section 4.2), projections where the shape changes."""
    stages = [int(filters * width) for filters in (16, 32, 64)]

    def convolve(x: Any, filters: int, window: int, strides: int = 1) -> Any:
        x = layers.Conv2D(filters, window, strides=strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9)(x)

    inputs = keras.Input(shape)
    x = layers.ReLU()(convolve(inputs, stages[0], 3))
    for stage, filters in enumerate(stages):
        for block in range(3):
            strides = 2 if stage > 0 and block == 0 else 1
            y = layers.ReLU()(convolve(x, filters, 3, strides))
            y = convolve(y, filters, 3)
            shortcut = convolve(x, filters, 1, strides) if strides > 1 else x
            x = layers.ReLU()(layers.Add()([y, shortcut]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes)(x), name="resnet20")


def mobilenet_v2(
    shape: tuple[int, int, int], classes: int, width: float = 0.5, output_stride: int = 16
) -> keras.Model:
    """Builds MobileNetV2, by default at width 0.5, with a head of 320 channels for small images."""
    model = tfaccel.architectures.MobileNetV2(
        shape, classes, width=width, output_stride=output_stride, last_channels=320
    )
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.9  # few steps: the paper's statistics would lag behind
    return model


NETWORKS: dict[str, Callable[..., keras.Model]] = {
    "resnet20": resnet20,
    "mobilenet_v2": mobilenet_v2,
}


def read_data(name: str, file: Path | None, images: int) -> Data:
    """Returns x_train, y_train, x_test, y_test, x from -1 to 1 with a channel axis."""
    if name == "cifar10" and file is not None:
        with np.load(file) as packed:
            parts = [packed[key] for key in ("x_train", "y_train", "x_test", "y_test")]
    else:
        (a, b), (c, d) = getattr(keras.datasets, name).load_data()
        parts = [a, b, c, d]
    x, y, x_test, y_test = parts
    x, x_test = ((part.reshape(*part.shape[:3], -1) / 127.5 - 1) for part in (x, x_test))
    chosen = np.random.default_rng(0).permutation(len(x))[:images]
    return x[chosen].astype("float32"), y[chosen].ravel(), x_test.astype("float32"), y_test.ravel()
