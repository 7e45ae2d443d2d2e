"""Checks of arguments that several modules of the room share."""

from typing import Any


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Returns an int from `least`; raises TypeError or ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be an int from {least}, but got {value!r} ({type(value).__name__})."
        )
    if value < least:
        raise ValueError(f"{name} must be an int from {least}, but got {value!r}.")
    return value
