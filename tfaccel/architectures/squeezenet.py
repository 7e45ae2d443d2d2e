"""SqueezeNet and its fire module."""

from typing import Any

import keras
from keras import layers

from tfaccel.architectures.blocks import conv_activation, make_divisible
from tfaccel.architectures.networks import check_network, end, total_stride
from tfaccel.core.checks import check_in, check_positive

# Iandola et al. 2016, table 1: channels of the squeeze and of each of the two expand layers.
_FIRES = (
    (16, 64),
    (16, 64),
    (32, 128),
    (32, 128),
    (48, 192),
    (48, 192),
    (64, 256),
    (64, 256),
)
# Channels and side of the first kernel, and the fire modules that a pooling stands before.
_VERSIONS = {"1.0": (96, 7, (2, 5, 9)), "1.1": (64, 3, (2, 4, 6))}


def fire(
    x: Any,
    squeeze: int,
    expand: int,
    *,
    activation: str = "relu",
    batch_norm: bool = False,
    name: str,
) -> Any:
    """Fire module (Iandola et al. 2016, figure 1): few channels in, many out.

    A 1 x 1 convolution to `squeeze` channels, then a 1 x 1 and a 3 x 3 convolution to `expand`
    channels each, concatenated.

    Args:
        x: [batch, height, width, channels].
        squeeze: channels of the first convolution.
        expand: channels of each of the two others.
        activation: after every convolution.
        batch_norm: puts batch normalization in place of the biases.
        name: beginning of the layers' names.

    Returns:
        [batch, height, width, 2 * expand].
    """
    check_positive("squeeze", squeeze)
    check_positive("expand", expand)
    how: dict[str, Any] = {"activation": activation, "batch_norm": batch_norm}
    x = conv_activation(x, squeeze, 1, name=f"{name}_squeeze", **how)
    one = conv_activation(x, expand, 1, name=f"{name}_expand_1x1", **how)
    three = conv_activation(x, expand, 3, name=f"{name}_expand_3x3", **how)
    return layers.Concatenate(name=f"{name}_concat")([one, three])


def SqueezeNet(  # noqa: N802  the paper's name
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    width: float = 1.0,
    *,
    version: str = "1.1",
    bypass: bool = False,
    output_stride: int | None = None,
    batch_norm: bool = False,
    dropout: float = 0.5,
    classifier_activation: str | None = None,
    name: str = "squeezenet",
) -> keras.Model:
    """Builds SqueezeNet (Iandola et al. 2016, "AlexNet-level accuracy with 50x fewer parameters").

    With 1,000 classes version 1.0, the paper's, has 1,248,424 parameters; 1.1, the authors' later
    one, 1,235,496 and well under half of the multiply-accumulates. The authors' code rectifies the
    class maps too; they are left linear here, so that the outputs are logits.

    Args:
        input_shape: (height, width, channels) of one image.
        classes: number of logits.
        width: multiplier of all channels but the classes, each rounded to a multiple of 8.
        version: "1.0" or "1.1".
        bypass: adds the input of every other fire module to its output (figure 2, middle).
        output_stride: 16 as published; 8 leaves out the stride of the stem, 4 the first max pooling
            too. By default 4 for images of up to 64 pixels, 16 for larger ones.
        batch_norm: puts batch normalization in place of the biases.
        dropout: share of features dropped before the last convolution, in training.
        classifier_activation: None for logits, "softmax" for probabilities.
        name: name of the model.

    Returns:
        A new model from [batch, height, width, channels] to logits [batch, classes].

    Raises:
        ValueError: an argument is out of range.
    """
    check_network(input_shape, classes, width, dropout)
    check_in("version", version, tuple(_VERSIONS))
    stride = total_stride(input_shape, output_stride, published=16)
    channels, side, pooled = _VERSIONS[version]
    inputs = keras.Input(input_shape, name="image")
    x = conv_activation(
        inputs,
        make_divisible(channels * width),
        side,
        strides=2 if stride == 16 else 1,
        batch_norm=batch_norm,
        name="stem",
    )
    for number, (squeeze, expand) in enumerate(_FIRES, start=2):
        if number in pooled and not (number == 2 and stride == 4):
            x = layers.MaxPooling2D(3, strides=2, padding="same", name=f"pool_{number}")(x)
        y = fire(
            x,
            make_divisible(squeeze * width),
            make_divisible(expand * width),
            batch_norm=batch_norm,
            name=f"fire_{number}",
        )
        # Fire 3, 5, 7 and 9 keep the number of channels.
        x = layers.Add(name=f"fire_{number}_add")([x, y]) if bypass and number % 2 else y
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    x = layers.Conv2D(classes, 1, name="class_maps")(x)
    outputs = end(layers.GlobalAveragePooling2D(name="logits")(x), classifier_activation)
    return keras.Model(inputs, outputs, name=name)
