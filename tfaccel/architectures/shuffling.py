"""Channel shuffle and the units of both ShuffleNets: functions on Keras tensors.

All tensors are [batch, height, width, channels].
"""

from typing import Any

import keras
from keras import layers

from tfaccel.architectures.blocks import activate, conv_bn_activation, depthwise_bn_activation
from tfaccel.core.checks import check_in, check_positive


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


def grouped_shuffle_unit(
    x: Any,
    filters: int,
    *,
    groups: int = 3,
    strides: int = 1,
    group_first: bool = True,
    kernel_size: int = 3,
    activation: str = "relu",
    name: str,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
) -> Any:
    """ShuffleNetV1 unit (Zhang et al. 2018, figure 2 b and c).

    A grouped 1 x 1 convolution to a quarter of the output's channels, channel shuffle, depthwise
    convolution, grouped 1 x 1 convolution. With stride 1 the input is added; with stride 2 its
    average over 3 x 3 pixels is concatenated.

    Args:
        x: [batch, height, width, channels].
        filters: output channels; equal to the input's with stride 1.
        groups: of both 1 x 1 convolutions.
        strides: 1 or 2.
        group_first: whether the first 1 x 1 convolution is grouped too; the paper leaves it whole
            where the input has few channels.
        kernel_size: side of the depthwise kernel.
        activation: after the first convolution and at the end.
        name: beginning of the layers' names.
        epsilon: of batch normalization.
        momentum: of the running statistics of batch normalization.

    Returns:
        [batch, ceil(height / strides), ceil(width / strides), filters].

    Raises:
        ValueError: `groups` does not divide the channels of a convolution, or `filters` does not
            suit the stride.
    """
    check_positive("filters", filters)
    check_positive("groups", groups)
    check_in("strides", strides, (1, 2))
    channels = x.shape[-1]
    if strides == 1 and filters != channels:
        raise ValueError(
            f"With stride 1 a shuffle unit keeps its channels, but got {filters} filters for "
            f"{channels} channels. Use stride 2 to change them."
        )
    if strides == 2 and filters <= channels:
        raise ValueError(
            f"With stride 2 the {channels} input channels are part of the output, so filters must "
            f"be above that, but got {filters}."
        )
    inner, added = filters // 4, filters if strides == 1 else filters - channels
    grouped = (inner, added, channels) if group_first else (inner, added)
    if any(count == 0 or count % groups for count in grouped):
        raise ValueError(
            f"groups must divide the channels of each 1 x 1 convolution, but got {groups} groups "
            f"of {', '.join(map(str, grouped))} channels in {name!r}."
        )
    norm: dict[str, Any] = {"epsilon": epsilon, "momentum": momentum}
    y = conv_bn_activation(
        x,
        inner,
        1,
        groups=groups if group_first else 1,
        activation=activation,
        name=f"{name}_reduce",
        **norm,
    )
    if groups > 1:
        y = channel_shuffle(y, groups, name=f"{name}_shuffle")
    y = depthwise_bn_activation(
        y, kernel_size, strides=strides, activation=None, name=f"{name}_depthwise", **norm
    )
    y = conv_bn_activation(
        y, added, 1, groups=groups, activation=None, name=f"{name}_expand", **norm
    )
    if strides == 1:
        y = layers.Add(name=f"{name}_add")([x, y])
    else:
        shortcut = layers.AveragePooling2D(3, 2, padding="same", name=f"{name}_average")(x)
        y = layers.Concatenate(name=f"{name}_concat")([shortcut, y])
    return activate(y, activation, name)
