"""Networks from before depthwise convolutions: NIN and VGG."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers

from tfaccel.architectures.blocks import conv_activation, make_divisible
from tfaccel.architectures.networks import check_network, end
from tfaccel.core.checks import check_in, check_positive

# Lin et al. 2014 and the authors' published networks: for each mlpconv block the side and the
# stride of its kernel and the channels of its layers, the last ones being the classes.
_MLPCONV: dict[str, tuple[tuple[int, int, tuple[int, ...]], ...]] = {
    "cifar": ((5, 1, (192, 160, 96)), (5, 1, (192, 192, 192)), (3, 1, (192, 192))),
    "imagenet": (
        (11, 4, (96, 96, 96)),
        (5, 1, (256, 256, 256)),
        (3, 1, (384, 384, 384)),
        (3, 1, (1024, 1024)),
    ),
}

# Simonyan & Zisserman 2015, table 1, columns A, B, D and E: 3 x 3 convolutions in each stage.
_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_STAGE_CHANNELS = (64, 128, 256, 512, 512)


def mlpconv(
    x: Any,
    filters: Sequence[int],
    kernel_size: int = 3,
    *,
    strides: int = 1,
    activation: str = "relu",
    batch_norm: bool = False,
    name: str,
) -> Any:
    """Convolution followed by 1 x 1 convolutions: a small network at every pixel (Lin et al. 2014).

    Args:
        x: [batch, height, width, channels].
        filters: output channels of each convolution; the first has the kernel, the rest are 1 x 1.
        kernel_size: side of the first kernel.
        strides: step of the first kernel in both directions.
        activation: after every convolution (section 3.1, eq. 2).
        batch_norm: puts batch normalization in place of the biases.
        name: beginning of the layers' names.

    Returns:
        [batch, ceil(height / strides), ceil(width / strides), filters[-1]].

    Raises:
        ValueError: `filters` is empty.
    """
    if not filters:
        raise ValueError(
            f"filters must name the channels of at least one layer, but got {filters}."
        )
    for place, channels in enumerate(filters):
        x = conv_activation(
            x,
            channels,
            1 if place else kernel_size,
            strides=1 if place else strides,
            activation=activation,
            batch_norm=batch_norm,
            name=f"{name}_{place}",
        )
    return x


def NIN(  # noqa: N802  the paper's name
    input_shape: tuple[int, int, int] = (32, 32, 3),
    classes: int = 10,
    width: float = 1.0,
    *,
    variant: str | None = None,
    batch_norm: bool = False,
    dropout: float = 0.5,
    classifier_activation: str | None = None,
    name: str = "nin",
) -> keras.Model:
    """Builds Network In Network (Lin et al. 2014).

    Mlpconv blocks, pooling and dropout between them, one feature map for each class, and global
    average pooling in place of dense layers. The CIFAR network has 966,986 parameters, the authors'
    larger one for ImageNet 7,595,176. The authors' code rectifies the class maps too; they are left
    linear here, so that the outputs are logits.

    Args:
        input_shape: (height, width, channels) of one image.
        classes: number of logits.
        width: multiplier of all channels but the classes, each rounded to a multiple of 8.
        variant: "cifar" (three blocks, shrinks the image to a quarter) or "imagenet" (four blocks,
            to 1/32). By default what suits the size: "cifar" for images of up to 64 pixels.
        batch_norm: puts batch normalization in place of the biases.
        dropout: share of features dropped between the blocks, in training.
        classifier_activation: None for logits, "softmax" for probabilities.
        name: name of the model.

    Returns:
        A new model from [batch, height, width, channels] to logits [batch, classes].

    Raises:
        ValueError: an argument is out of range.
    """
    check_network(input_shape, classes, width, dropout)
    if variant is None:
        variant = "cifar" if max(input_shape[:2]) <= 64 else "imagenet"
    check_in("variant", variant, tuple(_MLPCONV))
    cifar = variant == "cifar"
    *blocks, (kernel_size, strides, channels) = _MLPCONV[variant]
    inputs = x = keras.Input(input_shape, name="image")
    for block, (side, step, filters) in enumerate(blocks):
        x = mlpconv(
            x,
            [make_divisible(count * width) for count in filters],
            side,
            strides=step,
            batch_norm=batch_norm,
            name=f"block_{block}",
        )
        # The authors' CIFAR network averages in its second pooling, and drops after each; the one
        # for ImageNet drops once, before the last block.
        pool = layers.AveragePooling2D if cifar and block == 1 else layers.MaxPooling2D
        x = pool(3, strides=2, padding="same", name=f"pool_{block}")(x)
        if dropout and (cifar or block == len(blocks) - 1):
            x = layers.Dropout(dropout, name=f"dropout_{block}")(x)
    x = mlpconv(
        x,
        [make_divisible(count * width) for count in channels],
        kernel_size,
        strides=strides,
        batch_norm=batch_norm,
        name=f"block_{len(blocks)}",
    )
    x = layers.Conv2D(classes, 1, name="class_maps")(x)
    outputs = end(layers.GlobalAveragePooling2D(name="logits")(x), classifier_activation)
    return keras.Model(inputs, outputs, name=name)


def VGG11(  # noqa: N802
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    width: float = 1.0,
    *,
    hidden: Sequence[int] | None = None,
    batch_norm: bool = False,
    dropout: float = 0.5,
    classifier_activation: str | None = None,
    name: str = "vgg11",
) -> keras.Model:
    """Builds VGG-11 (Simonyan & Zisserman 2015, table 1, column A).

    At 224 x 224 with 1,000 classes: 132,863,336 parameters, 7.61 billion multiply-accumulates.

    Arguments, result and errors are those of `VGG16`.
    """
    check_network(input_shape, classes, width, dropout)
    head = (hidden, dropout, classifier_activation)
    return _vgg(11, input_shape, classes, width, batch_norm, head, name)


def VGG13(  # noqa: N802
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    width: float = 1.0,
    *,
    hidden: Sequence[int] | None = None,
    batch_norm: bool = False,
    dropout: float = 0.5,
    classifier_activation: str | None = None,
    name: str = "vgg13",
) -> keras.Model:
    """Builds VGG-13 (Simonyan & Zisserman 2015, table 1, column B).

    At 224 x 224 with 1,000 classes: 133,047,848 parameters, 11.31 billion multiply-accumulates.

    Arguments, result and errors are those of `VGG16`.
    """
    check_network(input_shape, classes, width, dropout)
    head = (hidden, dropout, classifier_activation)
    return _vgg(13, input_shape, classes, width, batch_norm, head, name)


def VGG16(  # noqa: N802  named as in keras.applications
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    width: float = 1.0,
    *,
    hidden: Sequence[int] | None = None,
    batch_norm: bool = False,
    dropout: float = 0.5,
    classifier_activation: str | None = None,
    name: str = "vgg16",
) -> keras.Model:
    """Builds VGG-16 (Simonyan & Zisserman 2015, table 1, column D).

    At 224 x 224 with 1,000 classes: 138,357,544 parameters, 15.47 billion multiply-accumulates.
    It computes what keras.applications.VGG16 does, whose weights fit in the same order.

    Args:
        input_shape: (height, width, channels) of one image.
        classes: number of logits.
        width: multiplier of all channels and of the default hidden units, each rounded to a
            multiple of 8.
        hidden: units of the dense layers before the last; by default (4096, 4096) for images of
            more than 64 pixels, (512,) for smaller ones (Li et al. 2017).
        batch_norm: puts batch normalization in place of the convolutions' biases.
        dropout: share of features dropped after each hidden layer, in training.
        classifier_activation: None for logits, "softmax" for probabilities.
        name: name of the model.

    Returns:
        A new model from [batch, height, width, channels] to logits [batch, classes].

    Raises:
        ValueError: an argument is out of range.
    """
    check_network(input_shape, classes, width, dropout)
    head = (hidden, dropout, classifier_activation)
    return _vgg(16, input_shape, classes, width, batch_norm, head, name)


def VGG19(  # noqa: N802  named as in keras.applications
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    width: float = 1.0,
    *,
    hidden: Sequence[int] | None = None,
    batch_norm: bool = False,
    dropout: float = 0.5,
    classifier_activation: str | None = None,
    name: str = "vgg19",
) -> keras.Model:
    """Builds VGG-19 (Simonyan & Zisserman 2015, table 1, column E).

    At 224 x 224 with 1,000 classes: 143,667,240 parameters, 19.63 billion multiply-accumulates.
    It computes what keras.applications.VGG19 does, whose weights fit in the same order.

    Arguments, result and errors are those of `VGG16`.
    """
    check_network(input_shape, classes, width, dropout)
    head = (hidden, dropout, classifier_activation)
    return _vgg(19, input_shape, classes, width, batch_norm, head, name)


def _vgg(
    depth: int,
    input_shape: tuple[int, int, int],
    classes: int,
    width: float,
    batch_norm: bool,
    head: tuple[Sequence[int] | None, float, str | None],
    name: str,
) -> keras.Model:
    hidden, dropout, classifier_activation = head
    if hidden is None:
        published = (512,) if max(input_shape[:2]) <= 64 else (4096, 4096)
        hidden = [make_divisible(units * width) for units in published]
    for units in hidden:
        check_positive("hidden", units)
    inputs = x = keras.Input(input_shape, name="image")
    stages = zip(_STAGES[depth], _STAGE_CHANNELS, strict=True)
    for stage, (repeats, channels) in enumerate(stages, start=1):
        for repeat in range(1, repeats + 1):
            x = conv_activation(
                x,
                make_divisible(channels * width),
                batch_norm=batch_norm,
                name=f"stage_{stage}_conv_{repeat}",
            )
        # "same" keeps small images from vanishing; sizes that 32 divides are pooled as published.
        x = layers.MaxPooling2D(2, strides=2, padding="same", name=f"stage_{stage}_pool")(x)
    x = layers.Flatten(name="flatten")(x)
    for place, units in enumerate(hidden, start=1):
        x = layers.Dense(units, name=f"hidden_{place}")(x)
        x = layers.ReLU(name=f"hidden_{place}_relu")(x)
        if dropout:
            x = layers.Dropout(dropout, name=f"dropout_{place}")(x)
    outputs = end(layers.Dense(classes, name="logits")(x), classifier_activation)
    return keras.Model(inputs, outputs, name=name)
