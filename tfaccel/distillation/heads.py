"""Which head belongs to which loss, and for which shapes it was made."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tfaccel.distillation.extraction import pick


def shapes_for_heads(
    losses: Sequence[Any], teacher_shapes: Mapping[str, Any], student_shapes: Mapping[str, Any]
) -> list[Any]:
    """Returns for each loss the shapes (teacher's, student's) that it sees, None without a head."""
    return [
        plain([pick(teacher_shapes, loss, "teacher"), pick(student_shapes, loss, "student")])
        if hasattr(loss, "make_head")
        else None
        for loss in losses
    ]


def make_heads(
    losses: Sequence[Any], shapes: Sequence[Any]
) -> tuple[list[keras.layers.Layer], list[int | None]]:
    """Makes what losses learn, one head for each or for each `head_name` that they share.

    Returns:
        The heads, and for each loss the place of its head among them.
    """
    heads: list[keras.layers.Layer] = []
    places: list[int | None] = []
    by_name: dict[str, int | None] = {}
    for loss, sides in zip(losses, shapes, strict=True):
        name = getattr(loss, "head_name", None)
        if name is not None and name in by_name:
            places.append(by_name[name])
            continue
        head = None if sides is None else loss.make_head(*map(as_shape, sides))
        places.append(None if head is None else len(heads))
        if head is not None:
            heads.append(head)
        if name is not None:
            by_name[name] = places[-1]
    return heads, places


def plain(shapes: Any) -> Any:
    """Returns shapes as JSON holds them: tuples are lists."""
    if isinstance(shapes, (list, tuple)):
        return [plain(each) for each in shapes]
    if isinstance(shapes, Mapping):
        return {name: plain(each) for name, each in shapes.items()}
    return shapes


def as_shape(shape: Any) -> Any:
    """Returns a shape, or a structure of shapes, as tuples again."""
    if isinstance(shape, Mapping):
        return {name: as_shape(each) for name, each in shape.items()}
    if isinstance(shape, (list, tuple)):
        return tuple(as_shape(each) for each in shape)
    return shape
