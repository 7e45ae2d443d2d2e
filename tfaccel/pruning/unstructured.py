"""`prune` adds masks to weights that train, `UpdatePruning` moves them, `strip` bakes them in."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from tfaccel.core import schedules
from tfaccel.core.checks import check_in, check_model, check_type
from tfaccel.core.selection import Selector
from tfaccel.core.transforms import WeightTransform, transform_model
from tfaccel.pruning import criteria
from tfaccel.pruning.criteria import GIVEN, LEARNED, Criterion
from tfaccel.pruning.gradients import gradient_products
from tfaccel.pruning.kernels import prunable_keys, selection_for
from tfaccel.pruning.masks import PruningMask
from tfaccel.pruning.patterns import PATTERNS, Pattern

SCOPES = ("layer", "global")


def prune(
    model: keras.Model,
    schedule: Any,
    *,
    pattern: str | Pattern = "element",
    scope: str = "layer",
    criterion: Any = "magnitude",
    include: Selector | None = None,
    exclude: Selector | None = None,
    data: Any = None,
    loss: Any = None,
    samples: int = 512,
    seed: int | None = None,
) -> keras.Model:
    """Returns a model that loses its least important weights while it trains.

    Compile and fit the result with the callback `UpdatePruning`, then take `tfaccel.strip(result)`.

    Args:
        model: a built Functional or Sequential model; not changed.
        schedule: how sparse at which step: a `PolynomialDecay`, a `ConstantSparsity`, their TFMOT
            namesakes, or a share of zeros such as 0.8, held from the first step on.
        pattern: which weights stand or fall together: "element", "2:4" (n of every m inputs kept),
            "4x1" (blocks of inputs by outputs) or "channel" (all weights of an output), see
            `tfaccel.pruning.patterns`.
        scope: "layer" gives every kernel the schedule's sparsity; "global" ranks all of them
            together, so that some layers lose more than others.
        criterion: what a weight is worth: "magnitude", "movement" (learned while training), "snip"
            (from `data` and `loss`, before training), "random", or a function of the kernel that
            gives an array of scores of its shape, the highest kept.
        include: layers to prune (names, patterns, predicate). By default the kernels of
            convolutions, dense, recurrent, attention and embedding layers, without the first
            convolution, depthwise kernels and layers of fewer than 64 weights; `selection_for` says
            which and why. What is included by name is pruned whatever it is.
        exclude: layers to leave alone.
        data: (x, y), arrays, for "snip".
        loss: a Keras loss or its name, for "snip".
        samples: how many of the data are looked at.
        seed: for criteria that draw lots, and for the choice of samples.

    Returns:
        The rewritten model, weights carried over, masks all ones until the schedule begins.

    Raises:
        TypeError: the model is subclassed, or the schedule is none.
        ValueError: the model is not built, an argument is not known, a selector matches nothing,
            there is nothing to prune, the schedule does not end at the share of zeros that an n:m
            pattern has, or "movement" is to prune before it could learn.

    References:
        Zhu & Gupta 2017, To prune, or not to prune.
    """
    check_model(model, "prune")
    check_in("scope", scope, SCOPES)
    schedule, pattern = schedules.get(schedule), PATTERNS.get(pattern)
    criterion = criteria.get(criterion)
    _check_schedule(schedule, pattern, criterion)
    chosen = _chosen_keys(model, include, exclude, pattern)
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    check_type("seed", seed, (int, np.integer))
    numbers = iter(np.random.SeedSequence(int(seed)).generate_state(sum(map(len, chosen.values()))))
    masks = {
        layer: {
            key: PruningMask(schedule, pattern, scope, criterion, seed=int(next(numbers)))
            for key in keys
        }
        for layer, keys in chosen.items()
    }
    if criterion.source == GIVEN:
        products = gradient_products(
            model, data, loss, samples, int(seed), f"The criterion {criterion!r}", training=True
        )
        for layer, keys in chosen.items():
            for key, variable in keys.items():
                # A weight that the loss does not depend on is worth nothing.
                nothing = np.zeros(variable.shape, np.float32)
                masks[layer][key].given = criterion.scores_from(
                    [batch.get(id(variable), nothing) for batch in products]
                )

    def rules(layer: keras.layers.Layer) -> Mapping[str, WeightTransform] | None:
        return masks.get(id(layer))

    return transform_model(model, rules)


def _check_schedule(
    schedule: schedules.SparsitySchedule, pattern: Pattern, criterion: Criterion
) -> None:
    if isinstance(schedule, schedules.ConstantSparsity):
        pattern.check(schedule.target_sparsity)
    elif isinstance(schedule, schedules.PolynomialDecay):
        pattern.check(schedule.final_sparsity)
    learns = criterion.source == LEARNED
    # Step 1 comes before the first update: all scores are zero there.
    if learns and isinstance(schedule, schedules.Schedule) and schedule.begin_step < 2:
        raise ValueError(
            f"The criterion {criterion!r} learns its scores while training, but the schedule "
            f"prunes from step {schedule.begin_step} on. Let it begin after an epoch or so: "
            "ConstantSparsity(0.8, begin_step=steps_per_epoch), or a PolynomialDecay."
        )


def _chosen_keys(
    model: keras.Model, include: Selector | None, exclude: Selector | None, pattern: Pattern
) -> dict[int, dict[str, keras.Variable]]:
    choices = selection_for(model, include, exclude, pattern)
    chosen = {
        id(choice.layer): prunable_keys(choice.layer, include is not None)
        for choice in choices
        if choice.chosen
    }
    if not chosen:
        reasons = "; ".join(f"{c.layer.name}: {c.reason}" for c in choices if c.layer.weights)
        raise ValueError(
            f"prune() found nothing to prune in {model.name!r} "
            f"({reasons or 'no layer has weights'}). Name the layers to prune with include=."
        )
    return chosen
