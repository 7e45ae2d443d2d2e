"""The search against brute force, on spaces small enough for it."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfaccel.pruning.evolution import evolve

CHOICES = [[1, 2, 3], [1, 2, 3, 4], [2, 5], [1, 3, 9]]


def score(genes):
    """Rewards balance, so that no gene can be chosen by itself."""
    a, b, c, d = genes
    return a * b - (c - d) ** 2 + 0.1 * d


def brute_force(budget):
    fitting = [genes for genes in itertools.product(*CHOICES) if sum(genes) <= budget]
    return max(map(score, fitting)), len(fitting)


@settings(max_examples=20)
@given(budget=st.integers(5, 21), seed=st.integers(0, 99))
def test_finds_the_best_of_a_small_space(budget, seed):
    best, size = brute_force(budget)
    found = evolve(CHOICES, score, sum, budget, population=20, generations=10, seed=seed)
    assert found.score == best
    assert found.cost == sum(found.genes) <= budget
    assert found.evaluated <= size


@given(seed=st.integers(0, 9999))
@settings(max_examples=20)
def test_scores_only_what_fits_and_nothing_twice(seed):
    asked = []

    def watched(genes):
        asked.append(genes)
        return score(genes)

    found = evolve(
        CHOICES, watched, sum, 12, population=6, parents=3, generations=4, mutation=0.5, seed=seed
    )
    assert all(sum(genes) <= 12 for genes in asked)
    assert len(set(asked)) == len(asked) == found.evaluated
    assert max(map(score, asked)) == found.score
    assert list(found.history) == sorted(found.history)
    assert len(found.history) == 5


def test_selection_beats_as_many_random_draws():
    # 12 genes of 16 values: nobody draws the best by chance.
    choices = [list(range(16))] * 12

    def total(genes):
        return float(sum(genes))

    wins = 0
    for seed in range(10):
        bred = evolve(choices, total, total, 1000, population=20, generations=10, seed=seed)
        drawn = evolve(choices, total, total, 1000, population=220, generations=0, seed=seed)
        assert bred.evaluated == drawn.evaluated == 220
        wins += bred.score > drawn.score
    assert wins == 10  # by 20 and more


def test_the_seed_decides():
    runs = [evolve(CHOICES, score, sum, 10, generations=2, seed=seed) for seed in (3, 3)]
    assert runs[0] == runs[1]


def test_reports_every_generation():
    seen = []
    evolve(CHOICES, score, sum, 10, generations=3, report=lambda *what: seen.append(what))
    assert [generation for generation, _ in seen] == [0, 1, 2, 3]


def test_errors_come_first():
    with pytest.raises(ValueError, match=r"none costs 4 or less; the cheapest costs [5-9]"):
        evolve(CHOICES, score, sum, 4)
    with pytest.raises(ValueError, match="choices must give"):
        evolve([[1], []], score, sum, 4)
    with pytest.raises(ValueError, match="population must be above 0"):
        evolve(CHOICES, score, sum, 10, population=0)
    with pytest.raises(ValueError, match="mutation must be a fraction"):
        evolve(CHOICES, score, sum, 10, mutation=2)
