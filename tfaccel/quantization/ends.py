"""The layers at the ends of a network, which are often left more bits than those between."""

from collections.abc import Callable
from typing import Any

import keras

from tfaccel.core.transforms import TransformedLayer
from tfaccel.core.walking import Visit, walk_shapes


def layers_at_ends(
    model: keras.Model, has_kernel: Callable[[Any], bool]
) -> tuple[set[int], set[int]]:
    """Returns the ids of the layers with kernels that no other is in front of, and behind.

    A network of several inputs or heads has several. Of a transformed layer it is the one inside.

    Args:
        model: a model with a graph; layers of nested models count where they are called.
        has_kernel: whether a layer counts.
    """
    visits = list(walk_shapes(model, model.inputs))
    kernels = [_counted(visit, has_kernel) for visit in visits]
    first: set[int] = set()
    behind: set[int] = set()  # values that a kernel has made, or that come of such
    for visit, kernel in zip(visits, kernels, strict=True):
        seen = any(id(value) in behind for value in visit.inputs)
        if kernel is not None and not seen:
            first.add(id(kernel))
        if kernel is not None or seen:
            behind.update(map(id, visit.outputs))
    last: set[int] = set()
    before: set[int] = set()  # values that a kernel reads, or that such are made of
    for visit, kernel in zip(reversed(visits), reversed(kernels), strict=True):
        seen = any(id(value) in before for value in visit.outputs)
        if kernel is not None and not seen:
            last.add(id(kernel))
        if kernel is not None or seen:
            before.update(map(id, visit.inputs))
    return first, last


def _counted(visit: Visit, has_kernel: Callable[[Any], bool]) -> Any:
    layer = visit.node.layer
    inner = layer.layer if isinstance(layer, TransformedLayer) else layer
    return inner if inner is not None and has_kernel(inner) else None
