"""Multiply-accumulates of products that name their axes."""

from collections.abc import Sequence
from math import prod
from typing import Any

Shape = tuple[int, ...]


def macs_of_einsum(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    """Returns how many products an einsum of two or more operands forms; 0 for one operand.

    Args:
        equation: such as "abc,cd->abd"; "..." stands for any number of axes.
        shapes: of the operands.

    >>> macs_of_einsum("abc,cd->abd", [(2, 3, 4), (4, 5)])
    120
    """
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    if len(terms) < 2:
        return 0
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        before, dots, after = term.partition("...")
        free = len(shape) - len(before) - len(after)
        # Axes under the dots are aligned at their ends; a size of 1 is repeated.
        labels = [*before, *(f"...{free - i}" for i in range(free if dots else 0)), *after]
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), int(size))
    return prod(sizes.values())


def macs_of_tensordot(axes: Any, left: Shape, output: Shape) -> int:
    """Returns the products of a tensordot; `axes` as in `keras.ops.tensordot`."""
    if isinstance(axes, int):
        contracted = left[len(left) - axes :]
    else:
        first = [axes[0]] if isinstance(axes[0], int) else axes[0]
        contracted = tuple(left[axis] for axis in first)
    return prod(output) * prod(contracted)
