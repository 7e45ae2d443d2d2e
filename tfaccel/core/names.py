"""Names for new layers."""

from collections.abc import Iterable


class FreeNames:
    """Makes names that no layer has yet.

    Args:
        taken: the names that there are.

    >>> make = FreeNames(["conv"])
    >>> make("conv"), make("conv"), make("dense")
    ('conv_1', 'conv_2', 'dense')
    """

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)

    def __call__(self, wanted: str) -> str:
        """Returns the wanted name, with a number if it is taken; it is taken from then on."""
        name, number = wanted, 0
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name
