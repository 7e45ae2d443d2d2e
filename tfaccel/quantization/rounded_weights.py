"""The grid of a weight: rounding by the extremes of its slices."""

import dataclasses
from typing import Any, ClassVar

import keras

from tfaccel.core.checks import check_in, check_positive, check_type
from tfaccel.core.transforms import QUANTIZE, WeightTransform
from tfaccel.quantization.schemes import LOW_BITS


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(eq=False)
class FakeQuantizeWeights(WeightTransform):
    """Rounds a weight to a grid, one step for each slice along `axes`.

    A symmetric grid has the integers -q to q, q = 2^(bits-1) - 1, and the step max |w| / q. One
    that is not has 2^bits levels from min(w, 0) to max(w, 0), moved so that zero is a level. There
    is no state: since the step is linear in w, rounding commutes with the factor that batch-norm
    folding puts on a channel, so the folded kernel lies on the grid that the runtime reads from it.
    Zeros stay zeros.

    Args:
        axes: the axes that have a step of their own: output channels, or () for one step in all.
        bits: 2 to 8.
        symmetric: whether zero is the middle of the grid.
        block: for kernels [inputs, outputs], how many inputs in a row have a step of their own,
            which is rounded to bfloat16; by default all have one.

    Raises:
        ValueError: a number is out of range.
    """

    stage: ClassVar[int] = QUANTIZE

    axes: tuple[int, ...] = (-1,)
    bits: int = 8
    symmetric: bool = True
    block: int | None = None

    def __post_init__(self) -> None:
        check_in("bits", self.bits, LOW_BITS)
        check_type("symmetric", self.symmetric, bool)
        if self.block is not None:
            check_positive("block", self.block)
        self.axes = tuple(self.axes)

    @property
    def levels(self) -> tuple[int, int]:
        """The smallest and the largest integer of the grid; moved by its zero, if asymmetric."""
        if self.symmetric:
            return 1 - 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    def scale(self, weight: Any) -> Any:
        """Returns the step of the grid, in a shape that goes with the weight's."""
        return self._spread(weight, self._grid(self._blocks(weight))[0])

    def integers(self, weight: Any) -> Any:
        """Returns the whole numbers q, as floats, that stand for the weight: q * scale."""
        blocks = self._blocks(weight)
        step, zero = self._grid(blocks)
        rounded = keras.ops.round(blocks / step)
        shift = 0.0 if zero is None else zero
        if zero is not None or self.block is not None:
            rounded = keras.ops.clip(rounded + shift, *self.levels) - shift
        return keras.ops.reshape(rounded, weight.shape)

    def __call__(self, weight: Any, training: bool | None = None) -> Any:  # noqa: ARG002
        """Returns the rounded weight; the gradient passes straight through."""
        return weight + keras.ops.stop_gradient(self.finalize(weight) - weight)

    def finalize(self, weight: Any) -> Any:
        """Returns the rounded weight, exactly on the grid."""
        return self.integers(weight) * self.scale(weight)

    def _blocks(self, weight: Any) -> Any:
        """Returns the weight in a shape in which each step belongs to a slice."""
        if self.block is None:
            return weight
        inputs, outputs = check_blocks(weight.shape, self.block)
        return keras.ops.reshape(weight, (inputs // self.block, self.block, outputs))

    def _summed(self, rank: int) -> tuple[int, ...]:
        """Returns the axes of what `_blocks` gives that have one step together."""
        if self.block is not None:
            return (1,)
        kept = {axis % rank for axis in self.axes}
        return tuple(axis for axis in range(rank) if axis not in kept)

    def _grid(self, blocks: Any) -> tuple[Any, Any]:
        """Returns step and zero point; the zero point of a symmetric grid is None."""
        ops, axes = keras.ops, self._summed(len(blocks.shape))
        least, most = self.levels
        if self.symmetric:
            largest = ops.max(ops.abs(blocks), axis=axes, keepdims=True)
            return self._stored(_never_zero(largest) / most), None
        low = ops.minimum(ops.min(blocks, axis=axes, keepdims=True), 0.0)
        high = ops.maximum(ops.max(blocks, axis=axes, keepdims=True), 0.0)
        step = _never_zero(high - low) / (most - least)
        return step, ops.round(-low / step)

    def _stored(self, step: Any) -> Any:
        """Returns a step as the file holds it, where blocks have 8 bits of mantissa for theirs."""
        if self.block is None:
            return step
        return keras.ops.cast(keras.ops.cast(step, "bfloat16"), step.dtype)

    def _spread(self, weight: Any, step: Any) -> Any:
        if self.block is None:
            return step
        return keras.ops.reshape(keras.ops.repeat(step, self.block, axis=1), weight.shape)


def _never_zero(extent: Any) -> Any:
    """Returns what a step is made of; where all weights are zero, any number does."""
    return keras.ops.where(extent > 0, extent, keras.ops.ones_like(extent))


def check_blocks(shape: tuple[int | None, ...], block: int) -> tuple[int, int]:
    """Returns the inputs and outputs of a kernel whose inputs are cut into blocks.

    Raises:
        ValueError: the kernel is none of a dense layer, or its inputs are no multiple of the block.
    """
    sizes = [int(n or 0) for n in shape]
    if len(sizes) != 2 or sizes[0] % block:
        raise ValueError(
            f"Blocks of {block} weights are for kernels [inputs, outputs] with as many inputs or a "
            f"multiple of that, but got a kernel of shape {sizes}."
        )
    return sizes[0], sizes[1]
