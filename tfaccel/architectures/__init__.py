"""Light networks, and the blocks and layers that they are made of.

Convolutional ones are plain Keras layers altogether; those for sequences have layers of their own.
"""

from tfaccel.architectures.attention_parts import (
    AttentionMix,
    AttentionScores,
    FirstToken,
    PositionEmbedding,
    TokenMask,
)
from tfaccel.architectures.bert import BERT
from tfaccel.architectures.blocks import (
    conv_activation,
    conv_bn_activation,
    depthwise_bn_activation,
    depthwise_separable,
    inverted_residual,
    make_divisible,
    squeeze_excite,
)
from tfaccel.architectures.chunked_feed_forward import ChunkedFeedForward
from tfaccel.architectures.classic import NIN, VGG11, VGG13, VGG16, VGG19, mlpconv
from tfaccel.architectures.inception import GoogLeNet, inception, local_response_normalization
from tfaccel.architectures.lsh_attention import LSHSelfAttention
from tfaccel.architectures.mobilenet import (
    MobileNetV1,
    MobileNetV2,
    MobileNetV3Large,
    MobileNetV3Small,
)
from tfaccel.architectures.recurrence import linear_recurrence
from tfaccel.architectures.recurrent import QRNN, SRU
from tfaccel.architectures.reformer import AxialPositionEmbedding, NormalizedLayer, Reformer
from tfaccel.architectures.reversible import ReversibleBlocks
from tfaccel.architectures.shufflenet import ShuffleNetV1, ShuffleNetV2
from tfaccel.architectures.shuffling import channel_shuffle, grouped_shuffle_unit, shuffle_unit
from tfaccel.architectures.sliced import SlicedRNN
from tfaccel.architectures.squeezenet import SqueezeNet, fire

__all__ = [
    "BERT",
    "NIN",
    "QRNN",
    "SRU",
    "VGG11",
    "VGG13",
    "VGG16",
    "VGG19",
    "AttentionMix",
    "AttentionScores",
    "AxialPositionEmbedding",
    "ChunkedFeedForward",
    "FirstToken",
    "GoogLeNet",
    "LSHSelfAttention",
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV3Large",
    "MobileNetV3Small",
    "NormalizedLayer",
    "PositionEmbedding",
    "Reformer",
    "ReversibleBlocks",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "SlicedRNN",
    "SqueezeNet",
    "TokenMask",
    "channel_shuffle",
    "conv_activation",
    "conv_bn_activation",
    "depthwise_bn_activation",
    "depthwise_separable",
    "fire",
    "grouped_shuffle_unit",
    "inception",
    "inverted_residual",
    "linear_recurrence",
    "local_response_normalization",
    "make_divisible",
    "mlpconv",
    "shuffle_unit",
    "squeeze_excite",
]
