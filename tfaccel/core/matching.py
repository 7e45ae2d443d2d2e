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
    """
    if not pattern or isinstance(pattern[0], Optional):
        raise ValueError(f"A pattern begins with a step that must be there, but got {pattern!r}.")
    taken: set[int] = set()
    found = []
    for node in graph.nodes:
        chain = _match_from(graph, node, pattern) if id(node) not in taken else None
        if chain is not None and not any(id(n) in taken for n in chain if n):
            taken.update(id(n) for n in chain if n)
            found.append(chain)
    return found


def _match_from(
    graph: Graph, first: Node, pattern: Sequence[Matcher | Optional]
) -> tuple[Node | None, ...] | None:
    if not _fits(first, pattern[0]):
        return None
    chain: list[Node | None] = [first]
    last = first
    for step in pattern[1:]:
        following = _only_reader(graph, last)
        if following is not None and _fits(following, step):
            chain.append(following)
            last = following
        elif isinstance(step, Optional):
            chain.append(None)
        else:
            return None
    return tuple(chain)


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
