"""The networks that a recipe can name."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from tfaccel.core.checks import check_fraction, check_positive
from tfaccel.recipes.schema import RecipeError


def cnn(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    filters: Sequence[int] = (32, 64, 128),
    dropout: float = 0.3,
    name: str = "cnn",
) -> keras.Model:
    """Builds a plain convolutional network: the teacher of the main job.

    For each entry of `filters` two 3 x 3 convolutions with batch normalization and ReLU; the
    resolution is halved between entries. Global average pooling and one dense layer end it.

    Args:
        input_shape: [height, width, channels] of one image.
        classes: number of logits.
        filters: channels of each resolution.
        dropout: share of features dropped before the last layer, in training.
        name: name of the model.

    Returns:
        A model from [batch, height, width, channels] to logits [batch, classes].
    """
    check_positive("classes", classes)
    check_fraction("dropout", dropout)
    if not filters:
        raise ValueError("filters must name one number of channels at least, but is empty.")
    inputs = keras.Input(input_shape, name="image")
    x = inputs
    for level, channels in enumerate(filters, start=1):
        check_positive("filters", channels)
        if level > 1 and min(x.shape[1:3]) > 1:
            x = keras.layers.MaxPooling2D(name=f"pool_{level}")(x)
        for step in "ab":
            x = keras.layers.Conv2D(
                channels, 3, padding="same", use_bias=False, name=f"conv_{level}{step}"
            )(x)
            x = keras.layers.BatchNormalization(momentum=0.9, name=f"norm_{level}{step}")(x)
            x = keras.layers.ReLU(name=f"relu_{level}{step}")(x)
    x = keras.layers.GlobalAveragePooling2D(name="average")(x)
    x = keras.layers.Dropout(dropout, name="dropout")(x)
    return keras.Model(inputs, keras.layers.Dense(classes, name="logits")(x), name=name)


def mobile(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    stem: int = 16,
    blocks: Sequence[Sequence[int]] = ((1, 16, 1), (4, 24, 2), (4, 24, 1), (4, 40, 2), (4, 40, 1)),
    last: int = 128,
    dropout: float = 0.0,
    name: str = "mobile",
) -> keras.Model:
    """Builds a short network of MobileNetV2's inverted residuals, for images of a few pixels.

    The published networks shrink an image 8 times at least, to a single pixel where it has 8; here
    every block says its own stride. Batch-norm statistics follow a short training (momentum 0.9).

    Args:
        input_shape: [height, width, channels] of one image.
        classes: number of logits.
        stem: channels of the first convolution.
        blocks: (expansion, channels, stride) of each inverted residual.
        last: channels of the last 1 x 1 convolution.
        dropout: share of features dropped before the last layer, in training.
        name: name of the model.

    Returns:
        A model from [batch, height, width, channels] to logits [batch, classes].
    """
    from tfaccel.architectures import conv_bn_activation, inverted_residual

    check_positive("classes", classes)
    check_fraction("dropout", dropout)
    inputs = keras.Input(input_shape, name="image")
    x = conv_bn_activation(inputs, stem, name="stem", momentum=0.9)
    for number, (expansion, channels, strides) in enumerate(blocks):
        x = inverted_residual(
            x,
            channels,
            expansion=expansion,
            strides=strides,
            name=f"block_{number}",
            momentum=0.9,
        )
    x = conv_bn_activation(x, last, 1, name="last", momentum=0.9)
    x = keras.layers.GlobalAveragePooling2D(name="average")(x)
    if dropout:
        x = keras.layers.Dropout(dropout, name="dropout")(x)
    return keras.Model(inputs, keras.layers.Dense(classes, name="logits")(x), name=name)


def build_network(
    architecture: str, arguments: Mapping[str, Any], input_shape: tuple[int, ...], classes: int
) -> keras.Model:
    """Builds a network by the name that a recipe gives it.

    Raises:
        RecipeError: the network has no such argument, or refuses its value.
    """
    build = _builder(architecture)
    known = [key for key in inspect.signature(build).parameters if key not in _OURS]
    for key in arguments:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise RecipeError(
                f"{architecture} takes no argument {key!r} in a recipe.{hint} "
                f"It takes: {', '.join(known)}."
            )
    try:
        return build(input_shape, classes, **arguments)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{architecture} with {dict(arguments)} on samples of shape {list(input_shape)} "
            f"cannot be built: {error}"
        ) from error


# What the recipe decides by itself; and a recipe trains one head only.
_OURS = ("input_shape", "classes", "auxiliary")


def _builder(architecture: str) -> Callable[..., keras.Model]:
    own: dict[str, Callable[..., keras.Model]] = {"cnn": cnn, "mobile": mobile}
    if architecture in own:
        return own[architecture]
    import tfaccel.architectures

    return getattr(tfaccel.architectures, architecture)
