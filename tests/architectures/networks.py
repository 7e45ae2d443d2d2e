"""Every network at a size that is quick to build: 16 or 32 pixels, few channels, five classes."""

import keras
import numpy as np

from tfaccel.architectures import (
    NIN,
    VGG11,
    VGG13,
    VGG16,
    VGG19,
    GoogLeNet,
    MobileNetV1,
    MobileNetV2,
    MobileNetV3Large,
    MobileNetV3Small,
    ShuffleNetV1,
    ShuffleNetV2,
    SqueezeNet,
)

SHAPE = (16, 16, 3)
CLASSES = 5

NETWORKS = {
    "NIN": (NIN, 0.1, {}),
    "NIN ImageNet": (NIN, 0.05, {"variant": "imagenet", "batch_norm": True}),
    "VGG11": (VGG11, 0.125, {}),
    "VGG13": (VGG13, 0.125, {"hidden": (8, 16)}),
    "VGG16": (VGG16, 0.125, {"batch_norm": True}),
    "VGG19": (VGG19, 0.125, {"hidden": (8,)}),
    "GoogLeNet": (GoogLeNet, 0.125, {}),
    "GoogLeNet batch norm": (GoogLeNet, 0.125, {"batch_norm": True}),
    "SqueezeNet 1.0": (SqueezeNet, 0.25, {"version": "1.0"}),
    "SqueezeNet 1.1": (SqueezeNet, 0.25, {"bypass": True}),
    "MobileNetV1": (MobileNetV1, 0.125, {}),
    "MobileNetV2": (MobileNetV2, 0.25, {"last_channels": 32}),
    "MobileNetV3Small": (MobileNetV3Small, 0.25, {"last_channels": 32}),
    "MobileNetV3Large": (MobileNetV3Large, 0.25, {"last_channels": 32}),
    "ShuffleNetV1 g=1": (ShuffleNetV1, 0.25, {"groups": 1}),
    "ShuffleNetV1 g=8": (ShuffleNetV1, 0.25, {"groups": 8}),
    "ShuffleNetV2": (ShuffleNetV2, 0.25, {"last_channels": 32}),
}


def small(row: str, /, **arguments) -> keras.Model:
    """A network of the table, with weights and batch-norm statistics that are not neutral."""
    keras.utils.set_random_seed(0)
    build, width, own = NETWORKS[row]
    return unsettled(build(SHAPE, CLASSES, width, **{**own, **arguments}))


def unsettled(model: keras.Model) -> keras.Model:
    random = np.random.default_rng(0)
    for variable in model.variables:
        if variable.dtype == "float32" and len(variable.shape) == 1:
            low = 0.5 if variable.name in ("gamma", "moving_variance") else -0.1
            variable.assign(random.uniform(low, low + 1.0 if low > 0 else 0.1, variable.shape))
    return model
