"""Every kernel as stacked matrices [positions, inputs, outputs], whatever layer it belongs to.

Blocks and n:m groups are about the matrix product that a kernel takes part in, so they need to know
which axis is summed over. Its place differs: last but one in a convolution, last in a transposed
one, first in the query of an attention, the first two in its output.
"""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core import keras_private
from tfaccel.core.transforms import weight_keys

Array = npt.NDArray[Any]

_TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a kernel are summed over, and which are outputs; the rest are positions.

    >>> convolution = Layout((3, 3, 4, 8), inputs=(2,), outputs=(3,))
    >>> convolution.stacked(np.zeros((3, 3, 4, 8))).shape
    (9, 4, 8)
    """

    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def stacked(self, values: Array) -> Array:
        """Returns values of the kernel's shape as [positions, inputs, outputs]."""
        sizes = [self._size(axes) for axes in (self.inputs, self.outputs)]
        return np.transpose(values, self._order()).reshape(-1, *sizes)

    def unstacked(self, values: Array) -> Array:
        """Returns what `stacked` made in the kernel's shape again."""
        order = self._order()
        transposed = values.reshape([self.shape[axis] for axis in order])
        return np.transpose(transposed, np.argsort(order))

    def _order(self) -> tuple[int, ...]:
        rest = [axis for axis in range(len(self.shape)) if axis not in self.inputs + self.outputs]
        return (*rest, *self.inputs, *self.outputs)

    def _size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in axes)


def layout_of(layer: keras.layers.Layer, key: str) -> Layout:
    """Returns the layout of the weight that `key` names in a built layer."""
    variable = weight_keys(layer)[key]
    shape = tuple(variable.shape)
    rank = len(shape)
    if rank < 2:
        return Layout(shape, (), tuple(range(rank)))
    owner = _owner(layer, variable)
    if isinstance(owner, keras.layers.EinsumDense):
        return _of_einsum(owner, shape)
    if isinstance(owner, _TRANSPOSED):
        return Layout(shape, (rank - 1,), (rank - 2,))
    depthwise = isinstance(owner, _DEPTHWISE) or key.rsplit("/", 1)[-1] == "depthwise_kernel"
    if depthwise:
        return Layout(shape, tuple(range(rank - 2)), (rank - 2, rank - 1))
    return Layout(shape, (rank - 2,), (rank - 1,))


def _of_einsum(layer: keras.layers.EinsumDense, shape: tuple[int, ...]) -> Layout:
    operands, _, result = layer.equation.replace(" ", "").partition("->")
    letters = operands.split(",")[1].replace("...", "")
    outputs = tuple(axis for axis, letter in enumerate(letters) if letter in result)
    inputs = tuple(axis for axis in range(len(shape)) if axis not in outputs)
    return Layout(shape, inputs, outputs)


def _owner(layer: keras.layers.Layer, variable: keras.Variable) -> keras.layers.Layer:
    for inner in keras_private.sublayers(layer):
        if any(own is variable for own in keras_private.own_variables(inner)):
            return inner
    return layer
