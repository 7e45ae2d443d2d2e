"""Building blocks: functions on Keras tensors, to drop into any Functional model.

All tensors are [batch, height, width, channels]. Convolutions have no bias where batch
normalization follows; padding is "same"; every activation is a layer of its own, as quantization
wants it.
"""

from typing import Any

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
    groups: int = 1,
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
        groups: parts of the channels that do not see each other.
        activation: "relu", "relu6", another Keras activation by name, or None for a linear output.
        name: of the convolution; the other layers are `<name>_norm` and `<name>_<activation>`.
        epsilon: of batch normalization.
        momentum: of the running statistics of batch normalization.

    Returns:
        [batch, ceil(height / strides), ceil(width / strides), filters].
    """
    conv = layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding="same",
        groups=groups,
        use_bias=False,
        name=name,
    )
    return _normalize(conv(x), activation, name, epsilon, momentum)


def conv_activation(
    x: Any,
    filters: int,
    kernel_size: int = 3,
    *,
    strides: int = 1,
    activation: str | None = "relu",
    batch_norm: bool = False,
    name: str,
) -> Any:
    """Convolution with a bias, activation: what networks were made of before batch normalization.

    Args:
        x: [batch, height, width, channels].
        filters: output channels.
        kernel_size: side of the square kernel.
        strides: step of the kernel in both directions.
        activation: as in `conv_bn_activation`.
        batch_norm: puts batch normalization in place of the bias: `conv_bn_activation`.
        name: of the convolution; the other layers are `<name>_norm` and `<name>_<activation>`.

    Returns:
        [batch, ceil(height / strides), ceil(width / strides), filters].
    """
    if batch_norm:
        return conv_bn_activation(
            x, filters, kernel_size, strides=strides, activation=activation, name=name
        )
    conv = layers.Conv2D(filters, kernel_size, strides=strides, padding="same", name=name)
    return activate(conv(x), activation, name)


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
    squeeze: float | None = None,
    activation: str = "relu6",
    name: str,
    epsilon: float = 1e-3,
    momentum: float = 0.99,
) -> Any:
    """Inverted residual with a linear bottleneck (Sandler et al. 2018, table 1).

    1 x 1 expansion, depthwise convolution, linear 1 x 1 projection; the input is added where the
    stride is 1 and the number of channels stays. An expansion of 1 has no expanding convolution.
    With `squeeze` the expanded channels are gated before the projection (Howard et al. 2019,
    figure 4).

    Args:
        x: [batch, height, width, channels].
        filters: output channels.
        expansion: channels of the depthwise convolution per input channel.
        strides: 1 or 2.
        kernel_size: side of the depthwise kernel.
        squeeze: channels inside `squeeze_excite`, as a fraction of the expanded ones (rounded to a
            multiple of 8); None for no gate.
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
            y, round(expansion * channels), 1, activation=activation, name=f"{name}_expand", **norm
        )
    y = depthwise_bn_activation(
        y, kernel_size, strides=strides, activation=activation, name=f"{name}_depthwise", **norm
    )
    if squeeze is not None:
        inner = make_divisible(squeeze * y.shape[-1])
        y = squeeze_excite(y, inner, name=f"{name}_squeeze")
    y = conv_bn_activation(y, filters, 1, activation=None, name=f"{name}_project", **norm)
    if strides == 1 and channels == filters:
        y = layers.Add(name=f"{name}_add")([x, y])
    return y


def depthwise_separable(
    x: Any,
    filters: int,
    *,
    strides: int = 1,
    kernel_size: int = 3,
    activation: str = "relu6",
    name: str,
    epsilon: float = 1e-3,
    momentum: float = 0.99,
) -> Any:
    """Depthwise separable convolution (Howard et al. 2017, figure 3, right).

    A depthwise and a 1 x 1 convolution, each with batch normalization and activation: 1 / filters +
    1 / kernel_size^2 of a whole convolution's multiply-accumulates (eq. 5).

    Args:
        x: [batch, height, width, channels].
        filters: output channels.
        strides: 1 or 2.
        kernel_size: side of the depthwise kernel.
        activation: after both convolutions.
        name: beginning of the layers' names.
        epsilon: of batch normalization.
        momentum: of the running statistics of batch normalization.

    Returns:
        [batch, ceil(height / strides), ceil(width / strides), filters].
    """
    check_positive("filters", filters)
    norm: dict[str, Any] = {"epsilon": epsilon, "momentum": momentum, "activation": activation}
    x = depthwise_bn_activation(x, kernel_size, strides=strides, name=f"{name}_depthwise", **norm)
    return conv_bn_activation(x, filters, 1, name=f"{name}_pointwise", **norm)


def squeeze_excite(
    x: Any, channels: int, *, activation: str = "relu", gate: str = "hard_sigmoid", name: str
) -> Any:
    """Scales each channel by a gate that sees the whole image (Hu et al. 2018, figure 2).

    Global average pooling, a 1 x 1 convolution to `channels`, another one back, and a product.

    Args:
        x: [batch, height, width, channels].
        channels: between the two convolutions.
        activation: after the first.
        gate: after the second: "sigmoid" as published, "hard_sigmoid" as in MobileNetV3.
        name: beginning of the layers' names.

    Returns:
        The same shape as `x`.
    """
    check_positive("channels", channels)
    y = layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_average")(x)
    y = conv_activation(y, channels, 1, activation=activation, name=f"{name}_reduce")
    y = conv_activation(y, x.shape[-1], 1, activation=gate, name=f"{name}_expand")
    return layers.Multiply(name=f"{name}_scale")([x, y])


def _normalize(x: Any, activation: str | None, name: str, epsilon: float, momentum: float) -> Any:
    norm = layers.BatchNormalization(epsilon=epsilon, momentum=momentum, name=f"{name}_norm")
    return activate(norm(x), activation, name)


def activate(x: Any, activation: str | None, name: str) -> Any:
    """Applies an activation as a layer named `<name>_<activation>`; None leaves `x` as it is."""
    if activation is None:
        return x
    own_name = f"{name}_{activation}"
    if activation == "relu":
        return layers.ReLU(name=own_name)(x)
    if activation == "relu6":
        return layers.ReLU(max_value=6.0, name=own_name)(x)
    return layers.Activation(activation, name=own_name)(x)
