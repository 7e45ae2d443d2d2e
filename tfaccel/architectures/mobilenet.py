"""MobileNets."""

from collections.abc import Sequence
from typing import Any

import keras

from tfaccel.architectures.blocks import (
    conv_bn_activation,
    depthwise_separable,
    inverted_residual,
    make_divisible,
)
from tfaccel.architectures.networks import check_network, classify, total_stride

# Howard et al. 2017, table 1: filters and stride of each depthwise separable convolution.
_SEPARABLE = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
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

# Howard et al. 2019, tables 2 and 1: kernel, expanded channels, output channels, whether they are
# squeezed, whether the activation is hard swish (else ReLU), stride.
_SMALL = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)
_LARGE = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
_NORM: dict[str, Any] = {"epsilon": 1e-3, "momentum": 0.999}


def MobileNetV1(  # noqa: N802  named in the manner of keras.applications
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    width: float = 1.0,
    *,
    output_stride: int | None = None,
    dropout: float = 0.0,
    classifier_activation: str | None = None,
    name: str = "mobilenet_v1",
) -> keras.Model:
    """Builds MobileNet (Howard et al. 2017, "Efficient Convolutional Neural Networks").

    At 224 x 224 with 1,000 classes widths 1, 0.75, 0.5 and 0.25 have 569, 325, 149 and 41 million
    multiply-accumulates; width 1 has 4,253,864 parameters, batch-norm statistics among them. The
    paper's resolution multiplier is `input_shape`. With `output_stride=32` it computes what
    keras.applications.MobileNet does.

    Args:
        input_shape: (height, width, channels) of one image.
        classes: number of logits.
        width: multiplier of all channels, each rounded to a multiple of 8.
        output_stride: 32 as published; 16 leaves out the stride of the stem, 8 that of the second
            block too. By default 8 for images of up to 64 pixels, 32 for larger ones.
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
    inputs = keras.Input(input_shape, name="image")
    x = conv_bn_activation(
        inputs, make_divisible(32 * width), strides=2 if stride == 32 else 1, name="stem"
    )
    for block, (filters, block_stride) in enumerate(_SEPARABLE):
        early = block == 1 and stride == 8
        x = depthwise_separable(
            x,
            make_divisible(filters * width),
            strides=1 if early else block_stride,
            name=f"block_{block}",
        )
    outputs = classify(x, classes, dropout=dropout, classifier_activation=classifier_activation)
    return keras.Model(inputs, outputs, name=name)


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
    inputs = keras.Input(input_shape, name="image")
    x = conv_bn_activation(
        inputs,
        make_divisible(32 * width),
        3,
        strides=2 if stride == 32 else 1,
        name="stem",
        **_NORM,
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
                **_NORM,
            )
            block += 1
    if last_channels is None:
        last_channels = make_divisible(1280 * max(1.0, width))
    x = conv_bn_activation(x, last_channels, 1, name="last", **_NORM)
    outputs = classify(x, classes, dropout=dropout, classifier_activation=classifier_activation)
    return keras.Model(inputs, outputs, name=name)


def MobileNetV3Small(  # noqa: N802  named as in keras.applications
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    width: float = 1.0,
    *,
    output_stride: int | None = None,
    last_channels: int | None = None,
    dropout: float = 0.0,
    classifier_activation: str | None = None,
    name: str = "mobilenet_v3_small",
) -> keras.Model:
    """Builds MobileNetV3-Small (Howard et al. 2019, "Searching for MobileNetV3", table 2).

    At 224 x 224 with 1,000 classes and width 1: 56 million multiply-accumulates (the paper's
    figure). With `output_stride=32` it computes what keras.applications.MobileNetV3Small does
    without its rescaling: give it images in [-1, 1].

    Args:
        input_shape: (height, width, channels) of one image.
        classes: number of logits.
        width: multiplier of all channels, each rounded to a multiple of 8, but for the stem's 16.
            The hidden layer at the end is not made narrower than published.
        output_stride: 32 as published; 16 leaves out the stride of the stem, 8 that of the first
            block too. By default 8 for images of up to 64 pixels, 32 for larger ones.
        last_channels: units of the hidden layer at the end; by default the paper's 1,024.
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
    x, inputs = _third(_SMALL, input_shape, width, stride)
    hidden = last_channels or make_divisible(1024 * max(1.0, width))
    return _end_third(x, inputs, classes, hidden, dropout, classifier_activation, name)


def MobileNetV3Large(  # noqa: N802  named as in keras.applications
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    width: float = 1.0,
    *,
    output_stride: int | None = None,
    last_channels: int | None = None,
    dropout: float = 0.0,
    classifier_activation: str | None = None,
    name: str = "mobilenet_v3_large",
) -> keras.Model:
    """Builds MobileNetV3-Large (Howard et al. 2019, "Searching for MobileNetV3", table 1).

    At 224 x 224 with 1,000 classes and width 1: 219 million multiply-accumulates (the paper's
    figure). With `output_stride=32` it computes what keras.applications.MobileNetV3Large does
    without its rescaling: give it images in [-1, 1].

    Arguments, result and errors are those of `MobileNetV3Small`; `last_channels` is 1,280 in the
    paper, and `output_stride=8` leaves out the stride of the second block.
    """
    check_network(input_shape, classes, width, dropout)
    stride = total_stride(input_shape, output_stride)
    x, inputs = _third(_LARGE, input_shape, width, stride)
    hidden = last_channels or make_divisible(1280 * max(1.0, width))
    return _end_third(x, inputs, classes, hidden, dropout, classifier_activation, name)


def _third(
    rows: Sequence[tuple[int, int, int, bool, bool, int]],
    input_shape: tuple[int, int, int],
    width: float,
    stride: int,
) -> tuple[Any, Any]:
    """Returns the features of a MobileNetV3 and its input."""
    inputs = keras.Input(input_shape, name="image")
    x = conv_bn_activation(
        inputs,
        16,
        strides=2 if stride == 32 else 1,
        activation="hard_swish",
        name="stem",
        **_NORM,
    )
    first_stride = next(block for block, row in enumerate(rows) if row[-1] == 2)
    base = 16
    for block, (kernel, expanded, filters, squeezed, hard, block_stride) in enumerate(rows):
        # The expansion is the published one relative to the published channels: at other widths
        # each is rounded for itself, as the authors' code does.
        channels = x.shape[-1]
        wide = make_divisible(channels * (expanded / base)) if block else channels
        x = inverted_residual(
            x,
            make_divisible(filters * width),
            expansion=wide / channels,
            strides=1 if block == first_stride and stride == 8 else block_stride,
            kernel_size=kernel,
            squeeze=0.25 if squeezed else None,
            activation="hard_swish" if hard else "relu",
            name=f"block_{block}",
            **_NORM,
        )
        base = filters
    x = conv_bn_activation(
        x, make_divisible(6 * x.shape[-1]), 1, activation="hard_swish", name="last", **_NORM
    )
    return x, inputs


def _end_third(
    x: Any,
    inputs: Any,
    classes: int,
    hidden: int,
    dropout: float,
    classifier_activation: str | None,
    name: str,
) -> keras.Model:
    outputs = classify(
        x,
        classes,
        hidden=hidden,
        hidden_activation="hard_swish",
        dropout=dropout,
        classifier_activation=classifier_activation,
    )
    return keras.Model(inputs, outputs, name=name)
