"""ShuffleNets."""

from typing import Any

import keras
from keras import layers

from tfaccel.architectures.blocks import conv_bn_activation
from tfaccel.architectures.networks import check_network, classify, total_stride
from tfaccel.architectures.shuffling import grouped_shuffle_unit, shuffle_unit
from tfaccel.core.checks import check_in

# Zhang et al. 2018, table 1: channels of stage 2 by number of groups; each next stage doubles them.
_GROUPED_CHANNELS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}

# Ma et al. 2018, table 5: channels of stages 2, 3 and 4 and of the last convolution, by width.
_CHANNELS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
_REPEATS = (4, 8, 4)
_STEM_CHANNELS = 24
_NORM: dict[str, Any] = {"epsilon": 1e-5, "momentum": 0.9}


def ShuffleNetV1(  # noqa: N802  named in the manner of keras.applications
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    width: float = 1.0,
    *,
    groups: int = 3,
    output_stride: int | None = None,
    dropout: float = 0.0,
    classifier_activation: str | None = None,
    name: str = "shufflenet_v1",
) -> keras.Model:
    """Builds ShuffleNet (Zhang et al. 2018, "An Extremely Efficient Convolutional Neural Network").

    At 224 x 224 with 1,000 classes and width 1 the groups 1, 2, 3, 4 and 8 have 143, 140, 137, 133
    and 137 million multiply-accumulates (the paper's figures): more groups buy more channels.

    Args:
        input_shape: (height, width, channels) of one image.
        classes: number of logits.
        width: multiplier of all channels ("ShuffleNet s x"), rounded to what the groups divide.
        groups: of the 1 x 1 convolutions: 1, 2, 3, 4 or 8.
        output_stride: 32 as published; 16 leaves out the stride of the stem, 8 the max pooling too.
            By default 8 for images of up to 64 pixels, 32 for larger ones.
        dropout: share of features dropped before the last layer, in training.
        classifier_activation: None for logits, "softmax" for probabilities.
        name: name of the model.

    Returns:
        A new model from [batch, height, width, channels] to logits [batch, classes].

    Raises:
        ValueError: an argument is out of range.
    """
    check_network(input_shape, classes, width, dropout)
    check_in("groups", groups, tuple(_GROUPED_CHANNELS))
    stride = total_stride(input_shape, output_stride)
    inputs = keras.Input(input_shape, name="image")
    x = conv_bn_activation(
        inputs,
        # Stage 2 concatenates these with what its grouped convolution gives.
        _rounded(_STEM_CHANNELS * width, groups),
        strides=2 if stride == 32 else 1,
        activation="relu",
        name="stem",
        **_NORM,
    )
    if stride > 8:
        x = layers.MaxPooling2D(3, strides=2, padding="same", name="stem_pool")(x)
    for stage, repeats in enumerate(_REPEATS, start=2):
        channels = _rounded(_GROUPED_CHANNELS[groups] * 2 ** (stage - 2) * width, 4 * groups)
        for repeat in range(repeats):
            x = grouped_shuffle_unit(
                x,
                channels,
                groups=groups,
                strides=2 if repeat == 0 else 1,
                group_first=stage > 2 or repeat > 0,
                name=f"stage_{stage}_unit_{repeat}",
                **_NORM,
            )
    outputs = classify(x, classes, dropout=dropout, classifier_activation=classifier_activation)
    return keras.Model(inputs, outputs, name=name)


def ShuffleNetV2(  # noqa: N802  named in the manner of keras.applications
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    width: float = 1.0,
    *,
    output_stride: int | None = None,
    last_channels: int | None = None,
    dropout: float = 0.0,
    classifier_activation: str | None = None,
    name: str = "shufflenet_v2",
) -> keras.Model:
    """Builds ShuffleNetV2 (Ma et al. 2018, "Practical Guidelines for Efficient CNN Architecture").

    At 224 x 224 with 1,000 classes, widths 0.5, 1, 1.5 and 2 have 1,366,792, 2,278,604, 3,503,624
    and 7,393,996 trainable parameters and 41, 146, 299 and 591 million multiply-accumulates (the
    paper's figures; the convolutions and the dense layer come to 1 % less).

    Args:
        input_shape: (height, width, channels) of one image.
        classes: number of logits.
        width: 0.5, 1, 1.5 or 2 as published. Another width scales the channels of width 1, each
            rounded to an even number.
        output_stride: 32 as published; 16 leaves out the stride of the stem, 8 the max pooling too.
            By default 8 for images of up to 64 pixels, 32 for larger ones.
        last_channels: channels of the last convolution; by default the paper's.
        dropout: share of features dropped before the last layer, in training.
        classifier_activation: None for logits, "softmax" for probabilities.
        name: name of the model.

    Returns:
        A new model from [batch, height, width, channels] to logits [batch, classes].

    Raises:
        ValueError: an argument is out of range.
    """
    check_network(input_shape, classes, width, dropout)
    stride = total_stride(input_shape, output_stride)
    *stages, last = _channels(width)
    inputs = keras.Input(input_shape, name="image")
    x = conv_bn_activation(
        inputs,
        _STEM_CHANNELS,
        3,
        strides=2 if stride == 32 else 1,
        activation="relu",
        name="stem",
        **_NORM,
    )
    if stride > 8:
        x = layers.MaxPooling2D(3, strides=2, padding="same", name="stem_pool")(x)
    for stage, (channels, repeats) in enumerate(zip(stages, _REPEATS, strict=True), start=2):
        for repeat in range(repeats):
            x = shuffle_unit(
                x,
                channels,
                strides=2 if repeat == 0 else 1,
                name=f"stage_{stage}_unit_{repeat}",
                **_NORM,
            )
    x = conv_bn_activation(x, last_channels or last, 1, activation="relu", name="last", **_NORM)
    outputs = classify(x, classes, dropout=dropout, classifier_activation=classifier_activation)
    return keras.Model(inputs, outputs, name=name)


def _channels(width: float) -> tuple[int, ...]:
    if width in _CHANNELS:
        return _CHANNELS[width]
    *stages, last = _CHANNELS[1.0]
    return (*(max(2, round(channels * width / 2) * 2) for channels in stages), last)


def _rounded(value: float, divisor: int) -> int:
    return max(1, round(value / divisor)) * divisor
