"""Patterns of calls: convolution, then batch norm, then activation.

match(graph, [layers.Conv2D, layers.BatchNormalization, optional(layers.ReLU)])
"""

import dataclasses
from collections.abc import Callable, Sequence

from tfaccel.core.graph import Graph, Node

Matcher = type | tuple[type, ...] | Callable[[Node], bool]


@dataclasses.dataclass(frozen=True)
class Optional:
    """A step of a pattern that may be missing; made by `optional`."""

    matcher: Matcher


def optional(matcher: Matcher) -> Optional:
    """Marks a step of a pattern as one that may be missing: its place in the match is then None."""
    return Optional(matcher)


def match(graph: Graph, pattern: Sequence[Matcher | Optional]) -> list[tuple[Node | None, ...]]:
    """Finds chains of calls, each the only reader of the one before.

    Every tensor inside a chain is read once and is no output of the model, so that a chain can be
    replaced as a whole. Chains do not overlap; an earlier call wins.

    Args:
        graph: where to look.
        pattern: a layer or operation class, several, or a predicate on `Node` for each step; the
            first must not be optional.

    Returns:
        For each chain one node per step, None for an optional step that is missing.

    Raises:
        ValueError: the pattern is empty or begins with an optional step.
        TypeError: a step is neither class nor predicate.
    """
    if not pattern or isinstance(pattern[0], Optional):
        raise ValueError(f"A pattern begins with a step that must be there, but got {pattern!r}.")
    for step in pattern:
        matcher = step.matcher if isinstance(step, Optional) else step
        if not (callable(matcher) or isinstance(matcher, tuple)):
            raise TypeError(f"A step is a class, several, or a predicate, but got {matcher!r}.")
    taken: set[int] = set()
    found: list[tuple[Node | None, ...]] = []
    for node in graph.nodes:
        if id(node) in taken or not _fits(node, pattern[0]):
            continue
        tail = _complete(graph, node, pattern[1:])
        if tail is not None and not any(id(n) in taken for n in tail if n):
            taken.update(id(n) for n in (node, *tail) if n)
            found.append((node, *tail))
    return found


def _complete(
    graph: Graph, last: Node, steps: Sequence[Matcher | Optional]
) -> tuple[Node | None, ...] | None:
    """Returns what follows `last`, one entry for each step, or None if it does not fit."""
    if not steps:
        return ()
    step, rest = steps[0], steps[1:]
    following = _only_reader(graph, last)
    if following is not None and _fits(following, step):
        tail = _complete(graph, following, rest)
        if tail is not None:
            return (following, *tail)
    # Or the step is missing, even where it would fit: a later one may want that node.
    tail = _complete(graph, last, rest) if isinstance(step, Optional) else None
    return None if tail is None else (None, *tail)


def _only_reader(graph: Graph, node: Node) -> Node | None:
    if len(node.outputs) != 1 or graph.is_output(node.outputs[0]):
        return None
    readers = graph.consumers(node.outputs[0])
    return readers[0] if len(readers) == 1 else None


def _fits(node: Node, step: Matcher | Optional) -> bool:
    matcher = step.matcher if isinstance(step, Optional) else step
    if isinstance(matcher, (type, tuple)):
        return isinstance(node.operation, matcher)
    return bool(matcher(node))
