"""Layers with a kernel as products of matrices: what rounding and its corrections work on.

A layer of g groups is Y[g] = X[g] W[g] + b for each: X[g] is [samples, k], the patches of the input
that meet the kernel, and W[g] is [k, n]. A dense layer and a convolution have one group, a
depthwise convolution one for each channel.
"""

from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from tfaccel.rewriting.sampling import PatchSampler

Array = npt.NDArray[Any]

_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
AS_MATRICES = (layers.Dense, layers.Conv1D, layers.Conv2D, *_DEPTHWISE)


def groups_of(layer: Any) -> int:
    """Returns how many products of matrices a layer is."""
    if isinstance(layer, _DEPTHWISE):
        return int(layer.kernel.shape[-2])
    return int(getattr(layer, "groups", 1))


def to_matrices(layer: Any, kernel: Array) -> Array:
    """Returns a kernel, as the layer holds it, as [groups, k, n]."""
    if isinstance(layer, _DEPTHWISE):
        return np.moveaxis(kernel.reshape(-1, *kernel.shape[-2:]), 1, 0)
    groups = groups_of(layer)
    return np.moveaxis(kernel.reshape(-1, groups, kernel.shape[-1] // groups), 1, 0)


def to_kernel(layer: Any, matrices: Array) -> Array:
    """Returns [groups, k, n] as a kernel of the layer's shape: the inverse of `to_matrices`."""
    return np.ascontiguousarray(np.moveaxis(matrices, 0, 1)).reshape(tuple(layer.kernel.shape))


def bias_of(layer: Any) -> Array:
    """Returns the bias as [groups, 1, n], zeros if there is none."""
    groups = groups_of(layer)
    if not layer.use_bias:
        return np.zeros((groups, 1, 1), np.float32)
    return keras.ops.convert_to_numpy(layer.bias).reshape(groups, 1, -1)


def cut_patches(layer: Any, x: Any, count: int, seed: int) -> Array:
    """Returns patches of an input at random places, the same for the same seed.

    Args:
        layer: one of `AS_MATRICES`.
        x: the layer's input, batch first.
        count: at most so many.
        seed: of the places.

    Returns:
        [groups, patches, k], float32.
    """
    patches = (
        PatchSampler(layer, seed).cut(x, count).astype(np.float32)
    )  # [patches, taps, channels]
    if isinstance(layer, layers.Dense):
        return patches.reshape(1, len(patches), -1)
    groups = groups_of(layer)
    split = patches.reshape(*patches.shape[:2], groups, -1)
    return np.ascontiguousarray(split.transpose(2, 0, 1, 3)).reshape(groups, len(patches), -1)
