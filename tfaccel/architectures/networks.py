"""What the networks share: the check of their arguments, their strides and their last layers."""

from typing import Any

from keras import layers

from tfaccel.core.checks import check_fraction, check_in, check_positive


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
    check_fraction("dropout", dropout)


def total_stride(
    input_shape: tuple[int, int, int], output_stride: int | None, published: int = 32
) -> int:
    """Returns by how much a network shrinks the image: what is asked for, else what suits its size.

    The published strides (mostly 32 in all) are for ImageNet's 224 pixels. Up to 64 pixels the
    literature on CIFAR leaves the first two of them out (8 in all).

    Raises:
        ValueError: `output_stride` is neither None nor `published`, a half or a quarter of it.
    """
    if output_stride is None:
        return published // 4 if max(input_shape[:2]) <= 64 else published
    check_in("output_stride", output_stride, (published // 4, published // 2, published))
    return output_stride


def classify(
    x: Any,
    classes: int,
    *,
    hidden: int | None = None,
    hidden_activation: str = "relu",
    dropout: float = 0.0,
    classifier_activation: str | None = None,
) -> Any:
    """Global average pooling, a hidden layer and dropout if any, and one dense layer.

    Args:
        x: [batch, height, width, channels].
        classes: number of outputs.
        hidden: units of a dense layer before the last; None for none.
        hidden_activation: of that layer.
        dropout: share of features dropped in training.
        classifier_activation: None for logits, else an activation by name.

    Returns:
        [batch, classes].
    """
    x = layers.GlobalAveragePooling2D(name="average")(x)
    if hidden is not None:
        x = layers.Dense(hidden, name="hidden")(x)
        x = layers.Activation(hidden_activation, name=f"hidden_{hidden_activation}")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    x = layers.Dense(classes, name="logits")(x)
    return end(x, classifier_activation)


def end(logits: Any, classifier_activation: str | None, prefix: str = "") -> Any:
    """Returns the logits, or what `classifier_activation` makes of them in a layer named so."""
    if classifier_activation is None:
        return logits
    name = f"{prefix}{classifier_activation}"
    return layers.Activation(classifier_activation, name=name)(logits)
