"""Which rank each layer gets: what every rank costs and keeps, and how a budget is shared out."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

_TINY = 1e-12
_HALVINGS = 80


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to write a layer.

    Attributes:
        method: "svd", "tucker", "spatial", or "none" for the layer as it is.
        ranks: of the factors.
        macs: multiply-accumulates of one sample, over all calls.
        energy: share of the squared norm that is kept, 0 to 1.
    """

    method: str
    ranks: tuple[int, ...]
    macs: int
    energy: float


Frontier = list[Option]


def options_of(
    method: str,
    macs: npt.NDArray[np.int64],
    energies: npt.NDArray[np.float64],
    limit: int,
    multiple_of: int,
) -> Frontier:
    """Returns the options of one method that are worth having, the cheapest first.

    Args:
        method: its name.
        macs: what each tuple of ranks costs; the entry of ranks (r, s) is at [r - 1, s - 1].
        energies: what each keeps, of the same shape.
        limit: MACs that an option must stay below: those of the layer as it is.
        multiple_of: ranks are multiples of this, or full.
    """
    allowed = np.ones(macs.shape, bool)
    for axis, size in enumerate(macs.shape):
        fits = np.arange(1, size + 1) % multiple_of == 0
        fits[-1] = True
        shape = [1] * macs.ndim
        shape[axis] = size
        allowed &= fits.reshape(shape)
    places = np.flatnonzero(allowed & (macs < limit))
    costs, kept = macs.ravel()[places], energies.ravel()[places]
    order = np.lexsort((-kept, costs))
    # An option is worth it if nothing as cheap keeps as much.
    best = np.concatenate([[-1.0], np.maximum.accumulate(kept[order])[:-1]])
    chosen = places[order[kept[order] > best]]
    ranks = np.stack(np.unravel_index(chosen, macs.shape), axis=-1) + 1
    return [
        Option(method, tuple(int(r) for r in row), int(macs.flat[at]), float(energies.flat[at]))
        for row, at in zip(ranks, chosen, strict=True)
    ]


def frontier_of(options: Iterable[Option], macs: int) -> Frontier:
    """Merges the options of several methods; the last one is the layer as it is, with `macs`."""
    frontier: Frontier = []
    for option in sorted(options, key=lambda option: (option.macs, -option.energy)):
        if not frontier or option.energy > frontier[-1].energy:
            frontier.append(option)
    return [*frontier, Option("none", (), macs, 1.0)]


def cheapest_keeping(frontier: Frontier, energy: float) -> Option:
    """Returns the cheapest option that keeps at least so much energy."""
    return next(option for option in frontier if option.energy >= energy - _TINY)


def share_budget(frontiers: Sequence[Frontier], budget: float) -> list[Option]:
    """Chooses for each layer the option such that all stay within a budget of MACs together.

    What is kept best is the product of the layers' energies (Zhang et al. 2015, Accelerating Very
    Deep Convolutional Networks, section 3.4), so that no layer is given up for the others. A price
    per MAC is found by bisection, at which every layer by itself chooses within the budget; what is
    left over then buys the largest steps that still fit. No step of any layer fits in the end.

    Args:
        frontiers: of each layer, cheapest option first.
        budget: MACs of one sample for all of them.

    Raises:
        ValueError: the cheapest options of all layers are above the budget.
    """
    costs = [np.array([option.macs for option in frontier], float) for frontier in frontiers]
    losses = [
        -np.log(np.maximum([option.energy for option in frontier], _TINY)) for frontier in frontiers
    ]
    least, most = sum(cost[0] for cost in costs), sum(cost[-1] for cost in costs)
    if least > budget:
        raise ValueError(f"The layers take {least:,.0f} MACs at rank 1, above {budget:,.0f}.")
    if most <= budget:
        return [frontier[-1] for frontier in frontiers]

    def choose(price: float) -> list[int]:
        pairs = zip(losses, costs, strict=True)
        return [int(np.argmin(loss + price * cost / most)) for loss, cost in pairs]

    def total(places: Sequence[int]) -> float:
        return sum(cost[place] for cost, place in zip(costs, places, strict=True))

    places = [0] * len(costs)
    low, high = -20.0, 40.0  # logarithms of the price of all MACs together
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        trial = choose(float(np.exp(middle)))
        if total(trial) <= budget:
            places, high = trial, middle
        else:
            low = middle
    _spend(places, costs, losses, budget - total(places))
    return [frontier[place] for frontier, place in zip(frontiers, places, strict=True)]


def _spend(
    places: list[int],
    costs: Sequence[npt.NDArray[np.float64]],
    losses: Sequence[npt.NDArray[np.float64]],
    left: float,
) -> None:
    """Moves layers to dearer options while one fits into what is left, the largest gain first."""
    while True:
        steps = []
        for layer, place in enumerate(places):
            # Costs rise along a frontier: the last option that can be paid gains most.
            last = int(np.searchsorted(costs[layer], costs[layer][place] + left, side="right")) - 1
            if last > place:
                steps.append((losses[layer][place] - losses[layer][last], layer, last))
        if not steps:
            return
        _, layer, last = max(steps)
        left -= costs[layer][last] - costs[layer][places[layer]]
        places[layer] = last
