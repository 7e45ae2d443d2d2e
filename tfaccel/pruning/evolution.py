"""Evolutionary search over lists of integers under a hard limit (Liu et al. 2019, algorithm 1)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tfaccel.core.checks import check_fraction, check_positive

Genes = tuple[int, ...]
# Draws in a row that are known or too costly, after which the space counts as exhausted.
_TRIES = 2000


@dataclasses.dataclass(frozen=True)
class Evolution:
    """What a search found.

    Attributes:
        genes: the best of all candidates.
        score: its score.
        cost: its cost, within the budget.
        history: the best score so far, after the first population and after each generation.
        evaluated: how many different candidates were scored.
    """

    genes: Genes
    score: float
    cost: float
    history: tuple[float, ...]
    evaluated: int


def evolve(
    choices: Sequence[Sequence[int]],
    score: Callable[[Genes], float],
    cost: Callable[[Genes], float],
    budget: float,
    *,
    population: int = 50,
    parents: int = 10,
    generations: int = 20,
    mutation: float = 0.1,
    seed: int = 0,
    report: Callable[[int, float], Any] | None = None,
) -> Evolution:
    """Returns the best candidate within a budget that an evolutionary search comes across.

    The first population is random. Of all candidates scored so far, the best are parents; half of
    the next generation are parents in which each gene is drawn anew with probability `mutation`,
    half are crossings of two parents, each gene from either. Candidates beyond the budget are not
    scored, and none is scored twice.

    Args:
        choices: for each gene the values that it may have.
        score: of a candidate, higher is better; asked only within the budget.
        cost: of a candidate.
        budget: the highest cost allowed.
        population: candidates in a generation.
        parents: best candidates that the next generation comes from.
        generations: after the first population.
        mutation: probability for each gene, in [0, 1].
        seed: of all draws.
        report: `report(generation, best score)`, called after each generation.

    Raises:
        ValueError: an argument is out of range, or no random candidate fits the budget.
    """
    _check(choices, population, parents, generations, mutation)
    search = _Search(choices, score, cost, budget, mutation, np.random.default_rng(seed))
    if not search.fill(search.draw, population):
        raise ValueError(
            f"Of {_TRIES:,} random candidates none costs {budget:g} or less; the "
            f"cheapest costs {min(search.costs.values()):g}. Raise the budget, or let genes be "
            "smaller."
        )
    history = [search.select(parents)]
    if report is not None:
        report(0, history[-1])
    for generation in range(1, generations + 1):
        made = search.fill(search.mutate, population // 2)
        made += search.fill(search.cross, population - population // 2)
        # Alike parents have few new children; fresh blood keeps the generation full.
        search.fill(search.draw, population - made)
        history.append(search.select(parents))
        if report is not None:
            report(generation, history[-1])
    best = search.best[0]
    return Evolution(
        best, search.scores[best], search.costs[best], tuple(history), len(search.scores)
    )


class _Search:
    """All candidates so far, and how new ones come about."""

    def __init__(
        self,
        choices: Sequence[Sequence[int]],
        score: Callable[[Genes], float],
        cost: Callable[[Genes], float],
        budget: float,
        mutation: float,
        random: np.random.Generator,
    ) -> None:
        self._choices = [tuple(map(int, values)) for values in choices]
        self._score, self._cost, self._budget = score, cost, budget
        self._mutation, self._random = mutation, random
        self.costs: dict[Genes, float] = {}
        self.scores: dict[Genes, float] = {}
        self.best: list[Genes] = []

    def select(self, parents: int) -> float:
        """Takes the best candidates as parents; returns the best score."""
        self.best = sorted(self.scores, key=lambda genes: -self.scores[genes])[:parents]
        return self.scores[self.best[0]]

    def fill(self, make: Callable[[], Genes], wanted: int) -> int:
        """Scores up to `wanted` new candidates; fewer where the space is exhausted."""
        done = failed = 0
        while done < wanted and failed < _TRIES:
            genes = make()
            if genes not in self.scores and self._fits(genes):
                self.scores[genes] = float(self._score(genes))
                done, failed = done + 1, 0
            else:
                failed += 1
        return done

    def draw(self) -> Genes:
        return tuple(self._pick(values) for values in self._choices)

    def mutate(self) -> Genes:
        genes = self.best[self._random.integers(len(self.best))]
        return tuple(
            self._pick(values) if self._random.random() < self._mutation else gene
            for gene, values in zip(genes, self._choices, strict=True)
        )

    def cross(self) -> Genes:
        one, other = (self.best[i] for i in self._random.integers(len(self.best), size=2))
        pairs = zip(one, other, strict=True)
        return tuple(a if self._random.random() < 0.5 else b for a, b in pairs)

    def _pick(self, values: Genes) -> int:
        return values[int(self._random.random() * len(values))]

    def _fits(self, genes: Genes) -> bool:
        if genes not in self.costs:
            self.costs[genes] = float(self._cost(genes))
        return self.costs[genes] <= self._budget


def _check(
    choices: Sequence[Sequence[int]],
    population: int,
    parents: int,
    generations: int,
    mutation: float,
) -> None:
    if not choices or not all(len(values) for values in choices):
        raise ValueError(f"choices must give each gene a value or more, but got {choices!r}.")
    check_positive("population", population)
    check_positive("parents", parents)
    check_positive("generations", generations + 1)
    check_fraction("mutation", mutation, closed_right=True)
