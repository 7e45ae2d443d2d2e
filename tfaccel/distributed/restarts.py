"""What has to begin anew on all ranks alike when an elastic job changes its workers.

A new worker counts its optimizers, updates and data sets from the beginning; those that were there
before have to count as it does, or their operations' names would not meet.
"""

import weakref
from typing import Any, Protocol

_generation = 0
_counts: dict[str, int] = {}


class Restartable(Protocol):
    """Something that counts what this process has done."""

    def restart(self) -> None:
        """Begins to count anew."""


_restartables: "weakref.WeakSet[Any]" = weakref.WeakSet()


def generation() -> int:
    """How often the workers of this job have changed since this process began."""
    return _generation


def numbered(kind: str) -> int:
    """Returns the number of the next thing of a kind, from 0; the same on all ranks."""
    number = _counts.get(kind, 0)
    _counts[kind] = number + 1
    return number


def watch(thing: Restartable) -> None:
    """Has a thing restarted with all others, as long as somebody holds it."""
    _restartables.add(thing)


def mark() -> dict[str, int]:
    """Returns how far things are numbered, for `restart`."""
    return dict(_counts)


def restart(marked: dict[str, int]) -> None:
    """Begins anew, with numbers as they were at the mark."""
    global _generation  # noqa: PLW0603
    _generation += 1
    _counts.clear()
    _counts.update(marked)
    for thing in list(_restartables):
        thing.restart()
