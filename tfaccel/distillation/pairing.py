"""Which layers of two networks to compare."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import keras

from tfaccel.core.checks import check_in, check_model, check_type
from tfaccel.core.graph import Graph, Node
from tfaccel.distillation.feature_losses import FeatureLoss

LossT = TypeVar("LossT", bound=FeatureLoss)

_BY = ("resolution", "stage")
# Positions that hold nothing learnt: what they surround is seen before or behind.
_BORDERS = (
    keras.layers.ZeroPadding1D,
    keras.layers.ZeroPadding2D,
    keras.layers.Cropping1D,
    keras.layers.Cropping2D,
)


def pair_layers(
    teacher: keras.Model,
    student: keras.Model,
    by: str = "resolution",
    stages: int | None = None,
) -> list[tuple[str, str]]:
    """Finds layers of two networks that are worth comparing.

    Looked at are layers that both `get_layer(name)` finds and give one tensor [batch, height,
    width, channels] or [batch, time, features], called once; a nested model is one layer. Inputs,
    padding, single positions and flat vectors are left out.

    Args:
        teacher: a built Functional or Sequential model.
        student: another.
        by: "resolution" pairs, for each that both networks have, the last layers that give it,
            before it shrinks. "stage" cuts each network into `stages` parts with as many layers in
            each and pairs the parts' last layers; a cut that would be inside a residual branch
            moves to the nearest layer through which all paths lead, by less than half a part.
        stages: how many, for "stage" alone.

    Returns:
        (teacher's layer, student's layer), from input to output.

    Raises:
        TypeError: a model is no Keras model, or subclassed.
        ValueError: a model is not built, there is no pair, or there are too many stages.

    >>> def net(*widths):
    ...     convolutions = [
    ...         keras.layers.Conv2D(width, 3, strides=2, padding="same", name=f"conv{place}")
    ...         for place, width in enumerate(widths)
    ...     ]
    ...     return keras.Sequential([keras.Input((32, 32, 3)), *convolutions])
    >>> pair_layers(net(8, 16, 32), net(4, 8))
    [('conv0', 'conv0'), ('conv1', 'conv1')]
    >>> pair_layers(net(8, 16, 32, 32), net(4, 8), by="stage", stages=2)
    [('conv1', 'conv0'), ('conv3', 'conv1')]
    """
    check_in("by", by, _BY)
    for model in (teacher, student):
        check_model(model, "pair_layers")
    if (by == "stage") != (stages is not None):
        raise ValueError(
            f'by={by!r} with stages={stages}: give stages=, how many, with by="stage", and with it '
            "alone."
        )
    if stages is None:
        return _by_resolution(teacher, student)
    check_type("stages", stages, int)
    if stages < 1:
        raise ValueError(f"stages must be 1 or more, but got {stages}.")
    ends = [_stage_ends(role, model, stages) for role, model in _roles(teacher, student)]
    return list(zip(*ends, strict=True))


def at_pairs(loss: LossT, pairs: Iterable[tuple[str, str]]) -> list[LossT]:
    """Returns a copy of a loss for each pair of layers.

    Args:
        loss: what compares two features, such as `HintLoss()`.
        pairs: (teacher's layer, student's layer), such as from `pair_layers`.

    Raises:
        TypeError: the loss is not one of features.

    >>> from tfaccel.distillation.attention_transfer import AttentionTransfer
    >>> losses = at_pairs(AttentionTransfer(), [("a", "b"), ("c", "d")])
    >>> [loss.student_layer_name for loss in losses]
    ['b', 'd']
    """
    check_type("loss", loss, FeatureLoss)
    return [
        dataclasses.replace(loss, teacher_layer_name=teacher, student_layer_name=student)
        for teacher, student in pairs
    ]


def _roles(teacher: keras.Model, student: keras.Model) -> tuple[tuple[str, keras.Model], ...]:
    return (("teacher", teacher), ("student", student))


def _by_resolution(teacher: keras.Model, student: keras.Model) -> list[tuple[str, str]]:
    sides: list[dict[Any, str]] = []
    for _, model in _roles(teacher, student):
        last: dict[Any, str] = {}
        for node in _candidates(Graph.read(model)):
            positions = node.outputs[0].shape[1:-1]
            if None not in positions:
                last[positions] = node.name
        sides.append(last)
    pairs = [(name, sides[1][size]) for size, name in sides[0].items() if size in sides[1]]
    if not pairs:
        found = [sorted(side, reverse=True) for side in sides]
        raise ValueError(
            f"No resolution is in both networks: the teacher {teacher.name!r} has {found[0]}, the "
            f"student {student.name!r} has {found[1]} (sizes that are None do not count). Pair "
            'by="stage", or name the layers.'
        )
    return pairs


def _stage_ends(role: str, model: keras.Model, stages: int) -> list[str]:
    graph = Graph.read(model)
    nodes = _candidates(graph)
    if len(nodes) < stages:
        raise ValueError(
            f"{stages} stages need as many layers of [batch, height, width, channels] or [batch, "
            f"time, features], but the {role} {model.name!r} has {len(nodes)}. Take fewer stages."
        )
    straits = _straits(graph)
    open_places = [place for place, node in enumerate(nodes) if id(node) in straits]
    ends = []
    for stage in range(stages):
        end = (stage + 1) * len(nodes) // stages - 1
        near = [place for place in open_places if 2 * stages * abs(place - end) < len(nodes)]
        apart = [abs(place - end) for place in near]
        ends.append(nodes[near[apart.index(min(apart))] if near else end].name)
    return ends


def _candidates(graph: Graph) -> list[Node]:
    """Returns the calls whose outputs are features, producers before consumers."""
    found = []
    for node in graph.nodes:
        if node.layer is None or node.is_input or isinstance(node.layer, _BORDERS):
            continue
        if len(node.outputs) != 1 or len(graph.calls(node.operation)) != 1:
            continue
        shape = node.outputs[0].shape
        if len(shape) in (3, 4) and any(size != 1 for size in shape[1:-1]):
            found.append(node)
    return found


def _straits(graph: Graph) -> set[int]:
    """Returns the ids of the calls whose output is all that later calls read of what was before."""
    last_use: dict[int, int] = {}
    for place, node in enumerate(graph.nodes):
        for tensor in node.inputs:
            last_use[id(tensor)] = place
    for tensor in graph.outputs:
        last_use[id(tensor)] = len(graph.nodes)
    narrow, reach = set(), -1
    for place, node in enumerate(graph.nodes):
        if reach <= place and len(node.outputs) == 1:
            narrow.add(id(node))
        reach = max(reach, *(last_use.get(id(tensor), -1) for tensor in node.outputs))
    return narrow
