"""Networks that differ in their channel counts alone: what MetaPruning searches among."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfaccel.core.checks import check_positive


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class MobileNetSpace:
    """All channel counts of a MobileNetV1-like network: a stem and depthwise-separable blocks.

    Args:
        input_shape: (height, width, channels) of one image.
        classes: number of logits.
        stem: most channels of the first convolution, 3x3.
        stem_stride: its stride.
        blocks: most channels and the stride of each block.
        multiple_of: counts are multiples of it, as kernels like.
        least: smallest share of a layer's channels; the paper has 0.1.

    Raises:
        ValueError: a number that is not positive, or channels that are no multiple.
    """

    input_shape: tuple[int, int, int] = (32, 32, 3)
    classes: int = 10
    stem: int = 16
    stem_stride: int = 1
    blocks: tuple[tuple[int, int], ...] = (
        (32, 1),
        (64, 2),
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
    )
    multiple_of: int = 4
    least: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_shape", tuple(self.input_shape))
        object.__setattr__(self, "blocks", tuple(tuple(block) for block in self.blocks))
        for name in ("classes", "stem_stride", "multiple_of", "least"):
            check_positive(name, getattr(self, name))
        for count in self.whole:
            if count < 1 or count % self.multiple_of:
                raise ValueError(
                    f"Channels of a MobileNetSpace must be multiples of multiple_of="
                    f"{self.multiple_of}, but got {count}."
                )

    @property
    def whole(self) -> tuple[int, ...]:
        """The largest counts: stem, then blocks."""
        return (self.stem, *(filters for filters, _ in self.blocks))

    @property
    def choices(self) -> list[list[int]]:
        """For each layer the counts that it may have."""
        step = self.multiple_of
        return [list(range(self.lowest(count), count + 1, step)) for count in self.whole]

    def lowest(self, count: int) -> int:
        """Returns the smallest count of a layer with `count` channels at most."""
        return max(1, int(np.ceil(self.least * count / self.multiple_of))) * self.multiple_of

    def scaled(self, width: float) -> tuple[int, ...]:
        """Returns the counts of uniform width scaling, rounded to the multiple."""
        step = self.multiple_of
        return tuple(max(step, int(count * width / step + 0.5) * step) for count in self.whole)

    def macs(self, channels: Sequence[int]) -> int:
        """Returns the multiply-accumulates of one image."""
        height, width, last = self.input_shape
        height, width = -(-height // self.stem_stride), -(-width // self.stem_stride)
        total = 9 * height * width * last * channels[0]
        last = channels[0]
        for count, (_, stride) in zip(channels[1:], self.blocks, strict=True):
            height, width = -(-height // stride), -(-width // stride)
            total += height * width * last * (9 + count)
            last = count
        return total + last * self.classes

    def build(self, channels: Sequence[int]) -> keras.Model:
        """Returns a new plain model with so many channels, from images to logits.

        Raises:
            ValueError: not one count for the stem and each block.
        """
        check_channels(self, channels)
        inputs = keras.Input(self.input_shape, name="image")
        x = keras.layers.Conv2D(
            channels[0], 3, strides=self.stem_stride, padding="same", use_bias=False, name="stem"
        )(inputs)
        x = _normalized(x, "stem")
        for place, (count, (_, stride)) in enumerate(
            zip(channels[1:], self.blocks, strict=True), start=1
        ):
            x = keras.layers.DepthwiseConv2D(
                3, strides=stride, padding="same", use_bias=False, name=f"block{place}_depthwise"
            )(x)
            x = _normalized(x, f"block{place}_depthwise")
            x = keras.layers.Conv2D(count, 1, use_bias=False, name=f"block{place}_pointwise")(x)
            x = _normalized(x, f"block{place}_pointwise")
        x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
        logits = keras.layers.Dense(self.classes, name="logits")(x)
        return keras.Model(inputs, logits, name="mobilenet")

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MobileNetSpace":
        """Returns the space that `get_config` described."""
        return cls(**config)


def _normalized(x: Any, name: str) -> Any:
    x = keras.layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(x)
    return keras.layers.ReLU(name=f"{name}_relu")(x)


def check_channels(space: MobileNetSpace, channels: Sequence[int]) -> None:
    """Raises ValueError unless there is a count for the stem and each block, none too large."""
    if len(channels) != len(space.whole) or min(channels) < 1:
        raise ValueError(
            f"channels must be {len(space.whole)} counts, of the stem and of each block, each 1 or "
            f"more, such as {space.whole}, but got {tuple(channels)!r}."
        )
    if any(count > most for count, most in zip(channels, space.whole, strict=True)):
        raise ValueError(
            f"channels must not exceed those of the space, {space.whole}, but got "
            f"{tuple(channels)!r}."
        )
