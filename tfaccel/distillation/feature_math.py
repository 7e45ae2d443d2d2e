"""Arithmetic that several feature losses share: resolutions made equal, rows of unit length."""

import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from tfaccel.core.checks import check_in

RESIZES = ("average", "bilinear")

# A square norm below it counts as 0: its reciprocal would leave float32.
_TINY = 1e-30


def equal_positions(teacher: Any, student: Any, resize: str = "average") -> tuple[Any, Any]:
    """Returns both features at the smaller of both sizes along each axis of positions.

    "average" takes the mean of the positions that each new one covers, wholly or in part (adaptive
    average pooling: of n positions to m, the i-th is the mean of ⌊i n / m⌋ up to ⌈(i + 1) n / m⌉);
    "bilinear" interpolates, smoothed against aliasing. An axis whose sizes are unknown while
    tracing is taken to be equal in both.

    Args:
        teacher: [batch, ..., channels] float32; the axes between are positions (rows and columns,
            or time).
        student: as many axes; other channels.
        resize: "average" or "bilinear".

    Raises:
        ValueError: the numbers of axes differ, or one size is known and the other is not.
    """
    check_in("resize", resize, RESIZES)
    check_same_rank(teacher.shape, student.shape)
    sizes: list[int | None] = []
    for ours, theirs in zip(student.shape[1:-1], teacher.shape[1:-1], strict=True):
        if (ours is None) != (theirs is None):
            raise ValueError(
                "To make resolutions equal both have to be known, but the teacher's feature is "
                f"{tuple(teacher.shape)} and the student's {tuple(student.shape)}. Give both "
                "models a fixed input shape."
            )
        sizes.append(None if ours is None or theirs is None else min(ours, theirs))
    return _resized(teacher, sizes, resize), _resized(student, sizes, resize)


def check_same_rank(teacher_shape: Any, student_shape: Any) -> None:
    """Raises ValueError unless two features have the same number of axes, and two at least."""
    for role, shape in (("teacher", teacher_shape), ("student", student_shape)):
        if isinstance(shape, Mapping) or not all(
            size is None or hasattr(size, "__index__") for size in shape
        ):
            raise ValueError(f"The {role}'s feature must be one tensor, but has the shape {shape}.")
    if len(teacher_shape) != len(student_shape) or len(student_shape) < 2:
        raise ValueError(
            "The features need the same number of axes, two or more, but the teacher's is "
            f"{tuple(teacher_shape)} and the student's {tuple(student_shape)}. Name other layers, "
            "such as those that pair_layers() finds."
        )


def _resized(feature: Any, sizes: list[int | None], resize: str) -> Any:
    ops = keras.ops
    given = tuple(feature.shape[1:-1])
    if given == tuple(sizes):
        return feature
    if resize == "average":
        for axis, (size, wanted) in enumerate(zip(given, sizes, strict=True), start=1):
            if size is not None and wanted is not None and size != wanted:
                # A matrix product does it for any two sizes, on every backend, under XLA.
                pooling = ops.convert_to_tensor(pooling_matrix(size, wanted))
                pooled = ops.tensordot(feature, pooling, axes=[[axis], [1]])
                feature = ops.moveaxis(pooled, -1, axis)
        return feature
    if len(given) not in (1, 2) or None in sizes:
        raise ValueError(
            f"Bilinear resizing needs one or two known axes of positions, but got {given}. "
            'Take resize="average".'
        )
    as_image = ops.expand_dims(feature, 2) if len(given) == 1 else feature
    target = (sizes[0], 1) if len(given) == 1 else tuple(sizes)
    image = ops.image.resize(
        as_image,
        target,
        interpolation="bilinear",
        antialias=True,
        data_format="channels_last",
    )
    return ops.squeeze(image, axis=2) if len(given) == 1 else image


def pooling_matrix(size: int, wanted: int) -> np.ndarray:
    """Returns the [wanted, size] matrix that averages `size` positions into `wanted`.

    >>> pooling_matrix(4, 2)
    array([[0.5, 0.5, 0. , 0. ],
           [0. , 0. , 0.5, 0.5]], dtype=float32)
    """
    matrix = np.zeros((wanted, size), "float32")
    for row in range(wanted):
        start, stop = row * size // wanted, -(-(row + 1) * size // wanted)
        matrix[row, start:stop] = 1 / (stop - start)
    return matrix


def flattened(feature: Any) -> Any:
    """Returns [batch, values] of a feature [batch, ...], float32."""
    ops = keras.ops
    feature = ops.cast(feature, "float32")
    values = feature.shape[1:]
    if None not in values:
        return ops.reshape(feature, (-1, math.prod(values)))
    return ops.reshape(feature, (ops.shape(feature)[0], -1))


def unit_rows(x: Any) -> Any:
    """Returns vectors along the last axis divided by their length; zeros stay zeros.

    A row of zeros has no direction and gets no gradient, instead of an infinite one.
    """
    ops = keras.ops
    square = ops.sum(ops.square(x), axis=-1, keepdims=True)
    some = square > _TINY
    return ops.where(some, x * ops.rsqrt(ops.where(some, square, 1.0)), 0.0)
