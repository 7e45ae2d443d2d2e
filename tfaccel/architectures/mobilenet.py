"""MobileNets."""

from typing import Any

import keras

from tfaccel.architectures.blocks import (
    check_network,
    classify,
    conv_bn_activation,
    inverted_residual,
    make_divisible,
    total_stride,
)

# Sandler et al. 2018, table 2: expansion, channels, repeats, stride of the first repeat.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def MobileNetV2(  # noqa: N802  named as in keras.applications
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    width: float = 1.0,
    *,
    output_stride: int | None = None,
    last_channels: int | None = None,
    dropout: float = 0.0,
    classifier_activation: str | None = None,
    name: str = "mobilenet_v2",
) -> keras.Model:
    """Builds MobileNetV2 (Sandler et al. 2018, "Inverted Residuals and Linear Bottlenecks").

    At 224 x 224 with 1,000 classes and width 1: 3,538,984 parameters, batch-norm statistics among
    them, and 300 million multiply-accumulates. With `output_stride=32` it computes what
    keras.applications.MobileNetV2 does, whose weights fit in the same order.

    Args:
        input_shape: (height, width, channels) of one image.
        classes: number of logits.
        width: multiplier of all channels, each rounded to a multiple of 8. The last convolution is
            not made narrower than 1,280.
        output_stride: 32 as published; 16 leaves out the stride of the stem, 8 that of the second
            stage too. By default 8 for images of up to 64 pixels, 32 for larger ones.
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
    norm: dict[str, Any] = {"epsilon": 1e-3, "momentum": 0.999}
    inputs = keras.Input(input_shape, name="image")
    x = conv_bn_activation(
        inputs,
        make_divisible(32 * width),
        3,
        strides=2 if stride == 32 else 1,
        name="stem",
        **norm,
    )
    block = 0
    for stage, (expansion, channels, repeats, first_stride) in enumerate(_STAGES):
        for repeat in range(repeats):
            early = stage == 1 and stride == 8
            x = inverted_residual(
                x,
                make_divisible(channels * width),
                expansion=expansion,
                strides=first_stride if repeat == 0 and not early else 1,
                name=f"block_{block}",
                **norm,
            )
            block += 1
    if last_channels is None:
        last_channels = make_divisible(1280 * max(1.0, width))
    x = conv_bn_activation(x, last_channels, 1, name="last", **norm)
    outputs = classify(x, classes, dropout=dropout, classifier_activation=classifier_activation)
    return keras.Model(inputs, outputs, name=name)
