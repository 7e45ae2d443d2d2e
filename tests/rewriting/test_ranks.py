import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfaccel.rewriting.ranks import (
    Option,
    cheapest_keeping,
    frontier_of,
    options_of,
    share_budget,
)


def random_frontier(random, size):
    costs = np.sort(random.choice(200, size, replace=False)) + 1
    kept = np.sort(random.random(size))
    options = [
        Option("svd", (i + 1,), int(c), float(e))
        for i, (c, e) in enumerate(zip(costs, kept, strict=True))
    ]
    return frontier_of(options, 300)


def test_options_that_are_dearer_and_no_better_are_dropped():
    macs = np.array([[4, 6], [6, 12]])
    energies = np.array([[0.5, 0.6], [0.7, 1.0]])
    found = options_of("tucker", macs, energies, limit=12, multiple_of=1)
    # (2, 1) keeps more than (1, 2) at the same cost, and (2, 2) saves nothing.
    assert [(option.ranks, option.macs) for option in found] == [((1, 1), 4), ((2, 1), 6)]


def test_ranks_are_multiples_or_full():
    ranks = np.arange(1, 12)
    found = options_of("svd", ranks * 10, ranks / 11, limit=1000, multiple_of=4)
    assert [option.ranks for option in found] == [(4,), (8,), (11,)]


def test_frontier_of_two_methods_takes_the_better_at_each_cost():
    one = [Option("tucker", (1,), 10, 0.5), Option("tucker", (2,), 30, 0.9)]
    other = [Option("spatial", (1,), 10, 0.6), Option("spatial", (2,), 40, 0.8)]
    frontier = frontier_of([*one, *other], 50)
    assert [(o.method, o.macs) for o in frontier] == [("spatial", 10), ("tucker", 30), ("none", 50)]
    assert cheapest_keeping(frontier, 0.6).macs == 10
    assert cheapest_keeping(frontier, 0.61).macs == 30
    assert cheapest_keeping(frontier, 0.95).method == "none"


@given(
    layers=st.integers(1, 4),
    size=st.integers(1, 6),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_budget_is_kept_and_used_up(layers, size, share, seed):
    random = np.random.default_rng(seed)
    frontiers = [random_frontier(random, size) for _ in range(layers)]
    least = sum(frontier[0].macs for frontier in frontiers)
    budget = least + share * (300 * layers - least)
    chosen = share_budget(frontiers, budget)
    total = sum(option.macs for option in chosen)
    assert total <= budget
    for option, frontier in zip(chosen, frontiers, strict=True):
        place = frontier.index(option)
        if place + 1 < len(frontier):
            assert total - option.macs + frontier[place + 1].macs > budget
    # Of all choices, none is better by more than one layer can lose: the gap of a common price.
    loss = sum(-math.log(option.energy) for option in chosen)
    best = min(
        sum(-math.log(option.energy) for option in trial)
        for trial in itertools.product(*frontiers)
        if sum(option.macs for option in trial) <= budget
    )
    gap = max(-math.log(frontier[0].energy) for frontier in frontiers)
    assert best - 1e-9 <= loss <= best + gap + 1e-9


def test_budget_goes_where_it_keeps_most():
    flat = frontier_of([Option("svd", (1,), 10, 0.98)], 100)
    steep = frontier_of([Option("svd", (1,), 10, 0.10)], 100)
    assert [option.macs for option in share_budget([flat, steep], 115)] == [10, 100]


def test_budget_out_of_reach():
    with pytest.raises(ValueError, match="above 5"):
        share_budget([frontier_of([Option("svd", (1,), 10, 0.5)], 100)], 5)
