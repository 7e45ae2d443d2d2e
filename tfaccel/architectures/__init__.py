"""Light networks and the blocks that they are made of, in plain Keras layers."""

from tfaccel.architectures.blocks import (
    channel_shuffle,
    conv_bn_activation,
    depthwise_bn_activation,
    inverted_residual,
    make_divisible,
    shuffle_unit,
)
from tfaccel.architectures.mobilenet import MobileNetV2
from tfaccel.architectures.shufflenet import ShuffleNetV2

__all__ = [
    "MobileNetV2",
    "ShuffleNetV2",
    "channel_shuffle",
    "conv_bn_activation",
    "depthwise_bn_activation",
    "inverted_residual",
    "make_divisible",
    "shuffle_unit",
]
