"""`prune_channels`: a smaller model, without the channels that matter least."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.checks import check_fraction, check_in, check_model, check_number, check_positive
from tfaccel.core.selection import Selector, select_layers
from tfaccel.measurement import count
from tfaccel.pruning import channel_criteria
from tfaccel.pruning.channel_criteria import Evidence
from tfaccel.pruning.dependencies import ChannelGroup, ChannelMap, read_channels
from tfaccel.pruning.shrinking import shrink
from tfaccel.pruning.units import Labels

Array = npt.NDArray[Any]
Cost = Callable[[keras.Model], float]

TARGETS = ("channels", "macs", "parameters", "cost")
ALLOCATIONS = ("global", "uniform")


def prune_channels(
    model: keras.Model,
    target: float | Mapping[str, float],
    criterion: Any = "l1",
    data: Any = None,
    multiple_of: int = 8,
    *,
    allocation: str = "global",
    at_least: float = 0.1,
    cost: Cost | None = None,
    loss: Any = None,
    samples: int = 256,
    steps: int = 1,
    fine_tune: Callable[[keras.Model], Any] | None = None,
    include: Selector | None = None,
    exclude: Selector | None = None,
    seed: int = 0,
) -> keras.Model:
    """Returns a smaller model, without the channels that matter least.

    Channels that depend on each other go together (`read_channels`). Fine-tune the result, or at
    least give its batch norms new statistics (`recalibrate_batch_norm`).

    Args:
        model: a built Functional or Sequential model; not changed.
        target: what is kept: {"macs": 0.5} for half of the multiply-accumulates, {"parameters":
            0.5}, {"channels": 0.5} of all that can go, or {"cost": 0.5} of what `cost` says; a
            number alone is a share of channels.
        criterion: what a channel is worth: "l1" and "l2" (Li 2017), "bn_gamma" (Liu 2017), "fpgm"
            (He 2019), "taylor" (Molchanov 2019; needs `data` and `loss`), "activation" and "apoz"
            (Hu 2016; need `data`), "random", or a function `(group, evidence) -> scores`.
        data: samples for the criterion: x, or (x, y) for "taylor".
        multiple_of: groups are left with a multiple of so many channels, since kernels work on
            blocks; 1 to let any number stand. A group of fewer, or of no multiple, may stay whole.
        allocation: "global" ranks all groups together, their scores divided by the group's mean;
            "uniform" takes the same share of each.
        at_least: share of a group that always stays, so that no layer is starved.
        cost: what a model costs, such as its measured latency; for the target "cost".
        loss: a Keras loss or its name, for "taylor".
        samples: how many samples the criterion looks at.
        steps: the target is reached in so many equal steps, each judged anew.
        fine_tune: trains the model that it is given in place, after each step.
        include: layers whose channels may go (names, patterns, predicate); by default all.
        exclude: layers whose channels stay. A group goes by its most careful layer.
        seed: for the choice of samples and criteria that draw lots.

    Returns:
        The smaller model, weights carried over. What was kept, and why, say
        `tfaccel.diff(model, smaller)` and `read_channels(model).reasons`.

    Raises:
        TypeError: the model is subclassed.
        ValueError: an argument is not known, nothing can be removed, or the target is out of reach.

    References:
        Li et al. 2017, Pruning filters for efficient ConvNets; Fang et al. 2023, DepGraph (groups
        of dependent channels).

    Example:
        >>> from keras import layers
        >>> inputs = keras.Input((8, 8, 3))
        >>> x = layers.Conv2D(32, 3, activation="relu")(inputs)
        >>> x = layers.GlobalAveragePooling2D()(x)
        >>> model = keras.Model(inputs, layers.Dense(10)(x))
        >>> [tuple(w.shape) for w in prune_channels(model, 0.5).weights]
        [(3, 3, 3, 16), (16,), (16, 10), (10,)]
    """
    check_model(model, "prune_channels")
    kind, kept = _target(target, cost)
    judge = channel_criteria.get(criterion)
    check_in("allocation", allocation, ALLOCATIONS)
    check_positive("multiple_of", multiple_of)
    check_positive("steps", steps)
    check_positive("samples", samples)
    check_fraction("at_least", at_least)
    measure = _measure(kind, cost)
    full = measure(model)
    small = model
    for step in range(1, steps + 1):
        channels = read_channels(small)
        groups = _selected(small, channels, include, exclude)
        evidence = Evidence(small, channels, data, loss, samples, seed)
        plan = _Plan(groups, [judge(g, evidence) for g in groups], multiple_of, at_least)
        share = 1 - (1 - kept) * step / steps
        small = plan.reach(small, channels, allocation, measure, share * full)
        if fine_tune is not None:
            fine_tune(small)
    return small


def _target(target: Any, cost: Cost | None) -> tuple[str, float]:
    given = target if isinstance(target, Mapping) else {"channels": target}
    if len(given) != 1 or next(iter(given)) not in TARGETS:
        raise ValueError(
            f"target names one of {', '.join(map(repr, TARGETS))} with the share to keep, such as "
            f"{{'macs': 0.5}}, but got {target!r}."
        )
    ((kind, kept),) = given.items()
    check_number("target", kept)
    if not 0 < kept < 1:
        raise ValueError(
            f"target is the share to keep, above 0 and below 1, but got {kept!r} for {kind!r}."
        )
    if (kind == "cost") != (cost is not None):
        raise ValueError(
            'target={"cost": share} and cost=function go together, but got '
            f"target={target!r} and cost={cost!r}."
        )
    return kind, float(kept)


def _measure(kind: str, cost: Cost | None) -> Cost:
    if cost is not None:
        return cost
    if kind == "parameters":
        return lambda model: float(count(model).parameters)
    if kind == "macs":
        return _macs
    return lambda model: float(sum(group.size for group in read_channels(model).groups))


def _macs(model: keras.Model) -> float:
    found = count(model).macs
    if found is None:
        raise ValueError(
            f"The multiply-accumulates of {model.name!r} are not known: a layer has no rule, or an "
            'input no fixed size. Take target={"parameters": share}.'
        )
    return float(found)


def _selected(
    model: keras.Model,
    channels: ChannelMap,
    include: Selector | None,
    exclude: Selector | None,
) -> list[ChannelGroup]:
    chosen = {c.layer.name for c in select_layers(model, include, exclude) if c.chosen}
    groups = [group for group in channels.groups if set(group.names) <= chosen]
    if not groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in channels.reasons.items())
        raise ValueError(
            f"prune_channels() found no channels to remove in {model.name!r} "
            f"({reasons or 'no group is included'})."
        )
    return groups


@dataclasses.dataclass(eq=False)
class _Plan:
    """Groups with their scores, and how many channels may stand in each."""

    groups: list[ChannelGroup]
    scores: list[Array | None]
    multiple_of: int
    at_least: float

    def __post_init__(self) -> None:
        judged = [(g, s) for g, s in zip(self.groups, self.scores, strict=True) if s is not None]
        if not judged:
            raise ValueError(
                "The criterion can judge no group of channels. Take another one: 'bn_gamma' needs "
                "batch norms, 'activation' and 'apoz' layers that read the channels."
            )
        self.groups = [group for group, _ in judged]
        self.scores = [score for _, score in judged]

    def reach(
        self,
        model: keras.Model,
        channels: ChannelMap,
        allocation: str,
        measure: Cost,
        wanted: float,
    ) -> keras.Model:
        """Returns the model that loses least and costs at most `wanted`."""
        tried: dict[tuple[int, ...], tuple[keras.Model, float]] = {}

        def attempt(counts: tuple[int, ...]) -> float:
            if counts not in tried:
                smaller = shrink(model, channels, self.removed(counts))
                tried[counts] = (smaller, measure(smaller))
            return tried[counts][1]

        more, fewer = self.counts(allocation, 0.0), self.counts(allocation, 1.0)
        if attempt(fewer) > wanted:
            raise ValueError(
                f"The target is out of reach: it asks for {wanted:.6g}, but with everything gone "
                f"that may go the model still costs {attempt(fewer):.6g}. Lower at_least "
                f"(now {self.at_least}), lower multiple_of (now {self.multiple_of}), or aim lower."
            )
        low, high = 0.0, 1.0  # share removed: too little, enough
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            counts = self.counts(allocation, middle)
            if attempt(counts) <= wanted:
                high, fewer = middle, counts
            else:
                low, more = middle, counts
        # Where several groups lose a block of channels at one share, not all of them need to: the
        # first ones, which are more sensitive as a rule, get theirs back as far as the cost allows.
        given, refused = 0, len(fewer) + 1
        while refused - given > 1:
            first = (given + refused) // 2
            if attempt((*more[:first], *fewer[first:])) <= wanted:
                given = first
            else:
                refused = first
        best = (*more[:given], *fewer[given:])
        attempt(best)
        return tried[best][0]

    def counts(self, allocation: str, share: float) -> tuple[int, ...]:
        """Returns how many channels each group keeps if a share of all goes."""
        if allocation == "uniform":
            kept = [group.size * (1 - share) for group in self.groups]
        else:
            relative = [_relative(score) for score in self.scores if score is not None]
            owners = np.repeat(np.arange(len(relative)), [score.size for score in relative])
            order = np.argsort(np.concatenate(relative), kind="stable")
            left = owners[order[round(share * order.size) :]]
            kept = [float(number) for number in np.bincount(left, minlength=len(relative))]
        return tuple(
            self._allowed(group.size, number)
            for group, number in zip(self.groups, kept, strict=True)
        )

    def _allowed(self, size: int, kept: float) -> int:
        floor = max(1, math.ceil(self.at_least * size))
        number = max(floor, math.ceil(kept - 1e-9))
        return min(size, math.ceil(number / self.multiple_of) * self.multiple_of)

    def removed(self, counts: Sequence[int]) -> Labels:
        """Returns the units that go if each group keeps so many."""
        gone = [
            group.units[np.argsort(score, kind="stable")[: group.size - kept]]
            for group, score, kept in zip(self.groups, self.scores, counts, strict=True)
            if score is not None
        ]
        return np.concatenate(gone)


_HALVINGS = 14


def _relative(scores: Array) -> Array:
    """Returns scores on a scale that groups share: from 0 on, and 1 is the group's mean."""
    positive: Array = scores - min(float(np.min(scores)), 0.0)
    mean = float(np.mean(positive))
    return positive / mean if mean > 0 else np.ones_like(positive)


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """How a model does without a share of one group's channels.

    Attributes:
        names: of the layers that make the channels.
        channels: of the group.
        kept: share of channels kept: the given score.
        baseline: score of the whole model.
    """

    names: tuple[str, ...]
    channels: int
    kept: Mapping[float, float]
    baseline: float


def sensitivity(
    model: keras.Model,
    evaluate: Callable[[keras.Model], float],
    *,
    kept: Sequence[float] = (0.75, 0.5, 0.25),
    criterion: Any = "l1",
    data: Any = None,
    loss: Any = None,
    samples: int = 256,
    include: Selector | None = None,
    exclude: Selector | None = None,
    seed: int = 0,
) -> list[Sensitivity]:
    """Returns how much each group of channels matters, one group at a time (Li et al. 2017).

    Args:
        model: a built Functional or Sequential model; not changed.
        evaluate: gives a model's score, such as its accuracy on held-out data.
        kept: shares of a group's channels to keep.
        criterion: decides which go first; as in `prune_channels`.
        data: as in `prune_channels`.
        loss: as in `prune_channels`.
        samples: as in `prune_channels`.
        include: layers to look at.
        exclude: layers to leave out.
        seed: as in `prune_channels`.

    Returns:
        One record for each group; `tfaccel.reporting.plot_sensitivity` draws them.

    Raises:
        ValueError: a share is not between 0 and 1, or there is nothing to remove.
    """
    check_model(model, "sensitivity")
    for share in kept:
        check_fraction("kept", share)
    channels = read_channels(model)
    groups = _selected(model, channels, include, exclude)
    judge = channel_criteria.get(criterion)
    evidence = Evidence(model, channels, data, loss, samples, seed)
    return list(_sensitivities(evidence, groups, judge, evaluate, kept))


def _sensitivities(
    evidence: Evidence,
    groups: Sequence[ChannelGroup],
    judge: channel_criteria.ChannelCriterion,
    evaluate: Callable[[keras.Model], float],
    kept: Sequence[float],
) -> Iterator[Sensitivity]:
    baseline = float(evaluate(evidence.model))
    for group in groups:
        scores = judge(group, evidence)
        if scores is None:
            continue
        order = group.units[np.argsort(scores, kind="stable")]
        found = {}
        for share in kept:
            gone = order[: group.size - max(1, round(share * group.size))]
            found[share] = float(evaluate(shrink(evidence.model, evidence.channels, gone)))
        yield Sensitivity(group.names, group.size, found, baseline)
