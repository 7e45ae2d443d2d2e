"""GoogLeNet and its inception block."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import layers

from tfaccel.architectures.blocks import conv_activation, make_divisible
from tfaccel.architectures.networks import check_network, end, total_stride
from tfaccel.core.checks import check_positive

# Szegedy et al. 2015, table 1: channels of 1 x 1, 3 x 3 reduce, 3 x 3, 5 x 5 reduce, 5 x 5 and of
# the pooling's projection. A stage begins with max pooling.
_STAGES = {
    3: {"a": (64, 96, 128, 16, 32, 32), "b": (128, 128, 192, 32, 96, 64)},
    4: {
        "a": (192, 96, 208, 16, 48, 64),
        "b": (160, 112, 224, 24, 64, 64),
        "c": (128, 128, 256, 24, 64, 64),
        "d": (112, 144, 288, 32, 64, 64),
        "e": (256, 160, 320, 32, 128, 128),
    },
    5: {"a": (256, 160, 320, 32, 128, 128), "b": (384, 192, 384, 48, 128, 128)},
}
# Where the auxiliary classifiers look (section 5).
_AUXILIARY = {"4a": "auxiliary_1", "4d": "auxiliary_2"}


def inception(
    x: Any,
    channels: Sequence[int],
    *,
    activation: str = "relu",
    batch_norm: bool = False,
    name: str,
) -> Any:
    """Inception block with dimension reduction (Szegedy et al. 2015, figure 2 b).

    Four branches, concatenated: 1 x 1; 1 x 1 then 3 x 3; 1 x 1 then 5 x 5; 3 x 3 max pooling then
    1 x 1.

    Args:
        x: [batch, height, width, channels].
        channels: of 1 x 1, 3 x 3 reduction, 3 x 3, 5 x 5 reduction, 5 x 5, pooling's projection.
        activation: after every convolution.
        batch_norm: puts batch normalization in place of the biases.
        name: beginning of the layers' names.

    Returns:
        [batch, height, width, sum of the four branches' channels].

    Raises:
        ValueError: there are not six numbers of channels, all above 0.
    """
    if len(channels) != 6:
        raise ValueError(f"channels must be six numbers, one for each layer, but got {channels}.")
    for count in channels:
        check_positive("channels", count)
    how: dict[str, Any] = {"activation": activation, "batch_norm": batch_norm}
    one, reduce_3, three, reduce_5, five, projected = channels
    branches = [conv_activation(x, one, 1, name=f"{name}_1x1", **how)]
    for side, reduced, wide in ((3, reduce_3, three), (5, reduce_5, five)):
        y = conv_activation(x, reduced, 1, name=f"{name}_{side}x{side}_reduce", **how)
        branches.append(conv_activation(y, wide, side, name=f"{name}_{side}x{side}", **how))
    y = layers.MaxPooling2D(3, strides=1, padding="same", name=f"{name}_pool")(x)
    branches.append(conv_activation(y, projected, 1, name=f"{name}_pool_project", **how))
    return layers.Concatenate(name=f"{name}_concat")(branches)


def local_response_normalization(
    x: Any, *, radius: int = 2, bias: float = 1.0, alpha: float = 1e-4, beta: float = 0.75
) -> Any:
    """Divides each value by what its neighbours among the channels are (Krizhevsky et al. 2012).

    y = x / (bias + alpha / n * sum of x^2 over the n = 2 radius + 1 channels around)^beta, zeros
    beyond the ends (section 3.3 there, with alpha shared out over the window as Caffe does). Made
    of functional operations, so that the model needs no class of ours.

    Args:
        x: [batch, height, width, channels].
        radius: channels on either side.
        bias: added to the mean square, above 0.
        alpha: factor of the mean square.
        beta: exponent.

    Returns:
        The same shape as `x`.
    """
    check_positive("radius", radius)
    check_positive("bias", bias)
    channels, window = x.shape[-1], 2 * radius + 1
    squares = keras.ops.pad(keras.ops.square(x), [[0, 0], [0, 0], [0, 0], [radius, radius]])
    total = squares[..., :channels]
    for shift in range(1, window):
        total = total + squares[..., shift : shift + channels]
    return x * keras.ops.power(bias + (alpha / window) * total, -beta)


def GoogLeNet(  # noqa: N802  the paper's name
    input_shape: tuple[int, int, int] = (224, 224, 3),
    classes: int = 1000,
    width: float = 1.0,
    *,
    output_stride: int | None = None,
    auxiliary: bool = False,
    batch_norm: bool = False,
    local_response: bool = False,
    dropout: float = 0.4,
    classifier_activation: str | None = None,
    name: str = "googlenet",
) -> keras.Model:
    """Builds GoogLeNet, Inception v1 (Szegedy et al. 2015, "Going Deeper with Convolutions").

    At 224 x 224 with 1,000 classes: 6,998,552 parameters, 13,378,280 with the auxiliary heads.

    Args:
        input_shape: (height, width, channels) of one image.
        classes: number of logits.
        width: multiplier of all channels, each rounded to a multiple of 8.
        output_stride: 32 as published; 16 leaves out the stride of the stem, 8 the first max
            pooling too. By default 8 for images of up to 64 pixels, 32 for larger ones.
        auxiliary: gives the two auxiliary classifiers out as well. Train with loss weights 1, 0.3
            and 0.3 (section 5), then drop them: keras.Model(m.input, m.output["logits"]).
        batch_norm: puts batch normalization in place of the biases (Ioffe & Szegedy 2015).
        local_response: puts local response normalization where the published network has it. Left
            out by default: Simonyan & Zisserman (2015) found no gain, and no integer kernel has it.
        dropout: share of features dropped before the last layer, in training; the auxiliary heads
            drop 0.7, as published, unless this is 0.
        classifier_activation: None for logits, "softmax" for probabilities.
        name: name of the model.

    Returns:
        A new model from [batch, height, width, channels] to logits [batch, classes]; with
        `auxiliary` to a dict of three such: "logits", "auxiliary_1" and "auxiliary_2".

    Raises:
        ValueError: an argument is out of range.
    """
    check_network(input_shape, classes, width, dropout)
    stride = total_stride(input_shape, output_stride)

    def wide(count: int) -> int:
        return make_divisible(count * width)

    inputs = keras.Input(input_shape, name="image")
    x = conv_activation(
        inputs,
        wide(64),
        7,
        strides=2 if stride == 32 else 1,
        batch_norm=batch_norm,
        name="stem_1",
    )
    if stride > 8:
        x = layers.MaxPooling2D(3, strides=2, padding="same", name="stem_pool")(x)
    if local_response:
        x = local_response_normalization(x)
    x = conv_activation(x, wide(64), 1, batch_norm=batch_norm, name="stem_2_reduce")
    x = conv_activation(x, wide(192), 3, batch_norm=batch_norm, name="stem_2")
    if local_response:
        x = local_response_normalization(x)
    outputs = {}
    for stage, blocks in _STAGES.items():
        x = layers.MaxPooling2D(3, strides=2, padding="same", name=f"stage_{stage}_pool")(x)
        for letter, channels in blocks.items():
            block = f"{stage}{letter}"
            x = inception(
                x, [wide(c) for c in channels], batch_norm=batch_norm, name=f"inception_{block}"
            )
            if auxiliary and block in _AUXILIARY:
                head = _AUXILIARY[block]
                logits = _auxiliary_head(x, classes, wide, 0.7 if dropout else 0.0, head)
                outputs[head] = end(logits, classifier_activation, f"{head}_")
    x = layers.GlobalAveragePooling2D(name="average")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    logits = end(layers.Dense(classes, name="logits")(x), classifier_activation)
    return keras.Model(inputs, {"logits": logits, **outputs} if auxiliary else logits, name=name)


def _auxiliary_head(
    x: Any, classes: int, wide: Callable[[int], int], dropout: float, name: str
) -> Any:
    """Average pooling 5 x 5 / 3, 1 x 1 convolution, two dense layers (section 5)."""
    side = min(5, *x.shape[1:3])
    x = layers.AveragePooling2D(side, strides=3, name=f"{name}_average")(x)
    x = conv_activation(x, wide(128), 1, name=f"{name}_conv")
    x = layers.Flatten(name=f"{name}_flatten")(x)
    x = layers.Dense(wide(1024), name=f"{name}_hidden")(x)
    x = layers.ReLU(name=f"{name}_hidden_relu")(x)
    if dropout:
        x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
    return layers.Dense(classes, name=f"{name}_logits")(x)
