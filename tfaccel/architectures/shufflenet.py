"""ShuffleNets."""

from typing import Any

import keras
from keras import layers

from tfaccel.architectures.blocks import (
    check_network,
    classify,
    conv_bn_activation,
    shuffle_unit,
    total_stride,
)

# Ma et al. 2018, table 5: channels of stages 2, 3 and 4 and of the last convolution, by width.
_CHANNELS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
_REPEATS = (4, 8, 4)
_STEM_CHANNELS = 24


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
    norm: dict[str, Any] = {"epsilon": 1e-5, "momentum": 0.9}
    inputs = keras.Input(input_shape, name="image")
    x = conv_bn_activation(
        inputs,
        _STEM_CHANNELS,
        3,
        strides=2 if stride == 32 else 1,
        activation="relu",
        name="stem",
        **norm,
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
                **norm,
            )
    x = conv_bn_activation(x, last_channels or last, 1, activation="relu", name="last", **norm)
    outputs = classify(x, classes, dropout=dropout, classifier_activation=classifier_activation)
    return keras.Model(inputs, outputs, name=name)


def _channels(width: float) -> tuple[int, ...]:
    if width in _CHANNELS:
        return _CHANNELS[width]
    *stages, last = _CHANNELS[1.0]
    return (*(max(2, round(channels * width / 2) * 2) for channels in stages), last)
