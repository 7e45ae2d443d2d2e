"""Building blocks: functions on Keras tensors, to drop into any Functional model.

All tensors are [batch, height, width, channels]. Convolutions have no bias, since batch
normalization follows; padding is "same"; every activation is a layer of its own, as quantization
wants it.
"""

from typing import Any

import keras
from keras import layers

from tfaccel.core.checks import check_in, check_positive


def make_divisible(value: float, divisor: int = 8, minimum: int | None = None) -> int:
    """Rounds a number of channels to a multiple of `divisor`, never down by more than 10 %.

    The rule of the MobileNet papers' own code: vector units like multiples of 8.

    Args:
        value: number of channels, not rounded.
        divisor: what the result is a multiple of.
        minimum: smallest result; by default `divisor`.

    >>> make_divisible(32 * 0.35), make_divisible(24 * 0.75)
    (16, 24)
    """
    check_positive("value", value)
    check_positive("divisor", divisor)
    rounded = max(minimum or divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


def conv_bn_activation(
    x: Any,
    filters: int,
    kernel_size: int = 3,
    *,
    strides: int = 1,
    activation: str | None = "relu6",
    name: str,
    epsilon: float = 1e-3,
    momentum: float = 0.99,
) -> Any:
    """Convolution, batch normalization, activation.

    Args:
        x: [batch, height, width, channels].
        filters: output channels.
        kernel_size: side of the square kernel.
        strides: step of the kernel in both directions.
        activation: "relu", "relu6", another Keras activation by name, or None for a linear output.
        name: of the convolution; the other layers are `<name>_norm` and `<name>_<activation>`.
        epsilon: of batch normalization.
        momentum: of the running statistics of batch normalization.

    Returns:
        [batch, ceil(height / strides), ceil(width / strides), filters].
    """
    conv = layers.Conv2D(
        filters, kernel_size, strides=strides, padding="same", use_bias=False, name=name
    )
    return _normalize(conv(x), activation, name, epsilon, momentum)


def depthwise_bn_activation(
    x: Any,
    kernel_size: int = 3,
    *,
    strides: int = 1,
    activation: str | None = "relu6",
    name: str,
    epsilon: float = 1e-3,
    momentum: float = 0.99,
) -> Any:
    """Depthwise convolution, batch normalization, activation.

    Args:
        x: [batch, height, width, channels].
        kernel_size: side of the square kernel.
        strides: step of the kernel in both directions.
        activation: as in `conv_bn_activation`.
        name: of the convolution; the other layers are `<name>_norm` and `<name>_<activation>`.
        epsilon: of batch normalization.
        momentum: of the running statistics of batch normalization.

    Returns:
        [batch, ceil(height / strides), ceil(width / strides), channels].
    """
    conv = layers.DepthwiseConv2D(
        kernel_size, strides=strides, padding="same", use_bias=False, name=name
    )
    return _normalize(conv(x), activation, name, epsilon, momentum)


def inverted_residual(
    x: Any,
    filters: int,
    *,
    expansion: float = 6,
    strides: int = 1,
    kernel_size: int = 3,
    activation: str = "relu6",
    name: str,
    epsilon: float = 1e-3,
    momentum: float = 0.99,
) -> Any:
    """Inverted residual with a linear bottleneck (Sandler et al. 2018, table 1).

    1 x 1 expansion, depthwise convolution, linear 1 x 1 projection; the input is added where the
    stride is 1 and the number of channels stays. An expansion of 1 has no expanding convolution.

    Args:
        x: [batch, height, width, channels].
        filters: output channels.
        expansion: channels of the depthwise convolution per input channel.
        strides: 1 or 2.
        kernel_size: side of the depthwise kernel.
        activation: after the expansion and after the depthwise convolution.
        name: beginning of the layers' names.
        epsilon: of batch normalization.
        momentum: of the running statistics of batch normalization.

    Returns:
        [batch, ceil(height / strides), ceil(width / strides), filters].
    """
    check_positive("filters", filters)
    check_positive("expansion", expansion)
    check_in("strides", strides, (1, 2))
    norm: dict[str, Any] = {"epsilon": epsilon, "momentum": momentum}
    channels = x.shape[-1]
    y = x
    if expansion != 1:
        y = conv_bn_activation(
            y, int(expansion * channels), 1, activation=activation, name=f"{name}_expand", **norm
        )
    y = depthwise_bn_activation(
        y, kernel_size, strides=strides, activation=activation, name=f"{name}_depthwise", **norm
    )
    y = conv_bn_activation(y, filters, 1, activation=None, name=f"{name}_project", **norm)
    if strides == 1 and channels == filters:
        y = layers.Add(name=f"{name}_add")([x, y])
    return y


def channel_shuffle(x: Any, groups: int = 2, *, name: str) -> Any:
    """Deals the channels of each group out in turn (Zhang et al. 2018, figure 1).

    Channel i of group g goes to place i * groups + g. Made of Reshape, Permute and Reshape, which
    any converter knows.

    Args:
        x: [batch, height, width, channels], height and width known.
        groups: must divide channels.
        name: beginning of the layers' names.

    Returns:
        The same shape as `x`.

    Raises:
        ValueError: `groups` does not divide the channels, or height or width is unknown.
    """
    height, width, channels = x.shape[1:]
    if height is None or width is None:
        raise ValueError(
            f"channel_shuffle() needs a known height and width, but got {tuple(x.shape)}. "
            "Give keras.Input the whole shape."
        )
    if channels % groups:
        raise ValueError(
            f"groups must divide the channels, but got {groups} groups of {channels} channels."
        )
    x = layers.Reshape((height * width, groups, channels // groups), name=f"{name}_split")(x)
    x = layers.Permute((1, 3, 2), name=f"{name}_permute")(x)
    return layers.Reshape((height, width, channels), name=f"{name}_join")(x)


def shuffle_unit(
    x: Any,
    filters: int,
    *,
    strides: int = 1,
    kernel_size: int = 3,
    activation: str = "relu",
    name: str,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
) -> Any:
    """ShuffleNetV2 unit (Ma et al. 2018, figure 3 c and d).

    With stride 1 half of the channels pass untouched, the other half go through a 1 x 1, a
    depthwise and another 1 x 1 convolution. With stride 2 both branches see all channels, and the
    first has a depthwise and a 1 x 1 convolution of its own. The branches are concatenated and
    shuffled. The split is the functional operation `keras.ops.split`.

    Args:
        x: [batch, height, width, channels].
        filters: output channels, even; equal to the input's with stride 1.
        strides: 1 or 2.
        kernel_size: side of the depthwise kernels.
        activation: after the 1 x 1 convolutions.
        name: beginning of the layers' names.
        epsilon: of batch normalization.
        momentum: of the running statistics of batch normalization.

    Returns:
        [batch, ceil(height / strides), ceil(width / strides), filters].

    Raises:
        ValueError: `filters` is odd, or differs from the input's channels with stride 1.
    """
    check_positive("filters", filters)
    check_in("strides", strides, (1, 2))
    if filters % 2:
        raise ValueError(f"filters must be even, one half for each branch, but got {filters}.")
    if strides == 1 and filters != x.shape[-1]:
        raise ValueError(
            f"With stride 1 a shuffle unit keeps its channels, but got {filters} filters for "
            f"{x.shape[-1]} channels. Use stride 2 to change them."
        )
    half = filters // 2
    norm: dict[str, Any] = {"epsilon": epsilon, "momentum": momentum}
    if strides == 1:
        shortcut, y = keras.ops.split(x, 2, axis=-1)
    else:
        shortcut = depthwise_bn_activation(
            x,
            kernel_size,
            strides=strides,
            activation=None,
            name=f"{name}_shortcut_depthwise",
            **norm,
        )
        shortcut = conv_bn_activation(
            shortcut, half, 1, activation=activation, name=f"{name}_shortcut_project", **norm
        )
        y = x
    y = conv_bn_activation(y, half, 1, activation=activation, name=f"{name}_expand", **norm)
    y = depthwise_bn_activation(
        y, kernel_size, strides=strides, activation=None, name=f"{name}_depthwise", **norm
    )
    y = conv_bn_activation(y, half, 1, activation=activation, name=f"{name}_project", **norm)
    y = layers.Concatenate(name=f"{name}_concat")([shortcut, y])
    return channel_shuffle(y, 2, name=f"{name}_shuffle")


def check_network(
    input_shape: tuple[int, int, int], classes: int, width: float, dropout: float
) -> None:
    """Checks the arguments that all networks share.

    Raises:
        TypeError: one is of the wrong type.
        ValueError: one is out of range, or the input shape is not (height, width, channels).
    """
    shape = tuple(input_shape)
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(
            f"input_shape must be (height, width, channels), all known, but got {input_shape!r}."
        )
    check_positive("classes", classes)
    check_positive("width", width)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a fraction in [0, 1), but got {dropout!r}.")


def total_stride(input_shape: tuple[int, int, int], output_stride: int | None) -> int:
    """Returns by how much a network shrinks the image: what is asked for, else what suits its size.

    The published strides (32 in all) are for ImageNet's 224 pixels. Up to 64 pixels the literature
    on CIFAR leaves the first two of them out (8 in all).

    Raises:
        ValueError: `output_stride` is not 8, 16, 32 or None.
    """
    if output_stride is None:
        return 8 if max(input_shape[:2]) <= 64 else 32
    check_in("output_stride", output_stride, (8, 16, 32))
    return output_stride


def classify(
    x: Any, classes: int, *, dropout: float = 0.0, classifier_activation: str | None = None
) -> Any:
    """Global average pooling, dropout if any, and one dense layer.

    Args:
        x: [batch, height, width, channels].
        classes: number of outputs.
        dropout: share of features dropped in training.
        classifier_activation: None for logits, else an activation by name.

    Returns:
        [batch, classes].
    """
    x = layers.GlobalAveragePooling2D(name="average")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    x = layers.Dense(classes, name="logits")(x)
    if classifier_activation is not None:
        x = layers.Activation(classifier_activation, name=classifier_activation)(x)
    return x


def _normalize(x: Any, activation: str | None, name: str, epsilon: float, momentum: float) -> Any:
    x = layers.BatchNormalization(epsilon=epsilon, momentum=momentum, name=f"{name}_norm")(x)
    if activation is None:
        return x
    own_name = f"{name}_{activation}"
    if activation == "relu":
        return layers.ReLU(name=own_name)(x)
    if activation == "relu6":
        return layers.ReLU(max_value=6.0, name=own_name)(x)
    return layers.Activation(activation, name=own_name)(x)
