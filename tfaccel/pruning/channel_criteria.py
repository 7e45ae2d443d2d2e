"""What a channel is worth: a criterion maps a group to one score per channel."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.registry import Registry
from tfaccel.core.transforms import weight_keys
from tfaccel.pruning.dependencies import ChannelGroup, ChannelMap
from tfaccel.pruning.gradients import gradient_products
from tfaccel.pruning.tracing import CARRIES, CONSUMES, PRODUCES, Site
from tfaccel.rewriting.sampling import gather_batches, visit

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """What criteria may look at.

    Attributes:
        model: the model whose channels are judged.
        channels: what `read_channels` found in it.
        data: samples, as the user gave them; None if there are none.
        loss: `loss(y_true, y_pred)`, a Keras loss or its name; None if not given.
        samples: how many samples are looked at.
        seed: for criteria that draw lots.
    """

    model: keras.Model
    channels: ChannelMap
    data: Any = None
    loss: Any = None
    samples: int = 256
    seed: int = 0

    def weight(self, site: Site) -> Array:
        """Returns the weight of a site with the site's axis in front, flat behind it."""
        value = keras.ops.convert_to_numpy(weight_keys(site.layer)[site.key])
        return _flat(np.asarray(value, np.float64), site.axis)

    def pool(self, group: ChannelGroup, site: Site, values: Array) -> Array:
        """Returns the sum of a site's values, [positions], over the positions of each unit."""
        roots = self.channels.trace.units.roots(site.labels)
        places = np.searchsorted(group.units, roots)
        ours = np.isin(roots, group.units)
        return np.bincount(places[ours], weights=values[ours], minlength=group.size)

    @cached_property
    def products(self) -> list[dict[int, Array]]:
        """For each batch, by the id of a variable, gradient times weight of the mean loss."""
        return gradient_products(
            self.model, self.data, self.loss, self.samples, self.seed, "The criterion 'taylor'"
        )

    @cached_property
    def activations(self) -> dict[int, tuple[Array, Array]]:
        """By the id of a layer: mean of |x| and share of non-zeros, by input channel."""
        if self.data is None:
            raise ValueError(
                "Criteria that look at activations need data: pass data=x, unlabelled samples."
            )
        readers = {id(s.layer): s for s in self.channels.trace.sites.values() if s.role == CONSUMES}
        sums: dict[int, list[Any]] = {}
        for batch in gather_batches(
            self.model, self.data, self.samples, self.seed, "prune_channels"
        ):
            for call in visit(self.model, batch):
                layer = call.node.operation
                if id(layer) not in readers:
                    continue
                axis = 1 if getattr(layer, "data_format", None) == "channels_first" else -1
                x = _flat(np.asarray(keras.ops.convert_to_numpy(call.inputs[0])), axis)
                entry = sums.setdefault(id(layer), [0.0, 0.0, 0])
                entry[0] = entry[0] + np.abs(x).sum(1, dtype=np.float64)
                entry[1] = entry[1] + (x != 0).sum(1)
                entry[2] += x.shape[1]
        return {key: (total / n, nonzero / n) for key, (total, nonzero, n) in sums.items()}


Scores = Array | None


class ChannelCriterion:
    """Base class: scores the channels of a group; the lowest are removed first."""

    def __call__(self, group: ChannelGroup, evidence: Evidence) -> Scores:
        """Returns [channels] scores, or None for a group that it cannot judge."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(group, evidence).")


CHANNEL_CRITERIA: Registry[ChannelCriterion] = Registry("channel criterion", ChannelCriterion)


def get(criterion: Any) -> ChannelCriterion:
    """Returns the criterion that a name, an instance or a function `(group, evidence)` is."""
    if callable(criterion) and not isinstance(criterion, (ChannelCriterion, type)):
        return _Given(criterion)
    return CHANNEL_CRITERIA.get(criterion)


class _Given(ChannelCriterion):
    """A function of the user's."""

    def __init__(self, function: Callable[[ChannelGroup, Evidence], Any]) -> None:
        self._function = function

    def __call__(self, group: ChannelGroup, evidence: Evidence) -> Scores:
        scores = self._function(group, evidence)
        if scores is not None and np.shape(scores) != (group.size,):
            raise ValueError(
                f"A criterion gives one score for each channel of a group, so {group.size} for "
                f"{', '.join(group.names)}, but got the shape {np.shape(scores)}."
            )
        return None if scores is None else np.asarray(scores, np.float64)


@dataclasses.dataclass(frozen=True)
class Norm(ChannelCriterion):
    """The norm of a channel's filters (Li et al. 2017, Pruning filters for efficient ConvNets).

    Args:
        order: 1 for the sum of absolute weights, the paper's; 2 for the root of the squares.
    """

    order: int

    def __call__(self, group: ChannelGroup, evidence: Evidence) -> Scores:
        """Returns the norms, those of several filters of one channel taken together."""
        powers = [
            evidence.pool(group, site, (np.abs(evidence.weight(site)) ** self.order).sum(axis=1))
            for site in _produced(group)
        ]
        total: Array = np.sum(powers, axis=0) ** (1 / self.order)
        return total


CHANNEL_CRITERIA.register("l1")(lambda: Norm(1))
CHANNEL_CRITERIA.register("l2")(lambda: Norm(2))


@CHANNEL_CRITERIA.register("bn_gamma")
@dataclasses.dataclass(frozen=True)
class BatchNormGamma(ChannelCriterion):
    """|gamma| of the batch norms that carry a channel (Liu et al. 2017, Network Slimming).

    Train with `penalize_batch_norm` first, which drives gammas to zero. A group without a batch
    norm is left alone.
    """

    def __call__(self, group: ChannelGroup, evidence: Evidence) -> Scores:
        """Returns the sum of |gamma|."""
        found = [
            evidence.pool(group, site, np.abs(evidence.weight(site)).sum(axis=1))
            for site in _carried_by_batch_norm(group)
            if site.key == "gamma"
        ]
        return np.sum(found, axis=0) if found else None


@CHANNEL_CRITERIA.register("fpgm")
@dataclasses.dataclass(frozen=True)
class GeometricMedian(ChannelCriterion):
    """The summed distance to all other filters (He et al. 2019, FPGM, eq. 4).

    A filter near the geometric median can be replaced by the others, however large it is.
    """

    def __call__(self, group: ChannelGroup, evidence: Evidence) -> Scores:
        """Returns the distances, filters of one channel side by side."""
        total = np.zeros(group.size)
        for site in _produced(group):
            filters = evidence.weight(site)
            squares = (filters**2).sum(axis=1)
            distances = squares[:, None] + squares[None] - 2 * filters @ filters.T
            total += evidence.pool(group, site, np.sqrt(np.maximum(distances, 0)).sum(axis=1))
        return total


@CHANNEL_CRITERIA.register("taylor")
@dataclasses.dataclass(frozen=True)
class Taylor(ChannelCriterion):
    """The squared first-order change of the loss without a channel (Molchanov et al. 2019, eq. 8).

    Gradient times weight is summed over the gate of a channel: gamma and beta of its batch norms,
    as in the paper, or its filters where there is none; then squared, and averaged over batches.
    """

    def __call__(self, group: ChannelGroup, evidence: Evidence) -> Scores:
        """Returns the mean of the squares."""
        sites = [s for s in _carried_by_batch_norm(group) if s.key in ("gamma", "beta")]
        sites = sites or [*_produced(group), *_biases(group)]
        total = np.zeros(group.size)
        for products in evidence.products:
            change = np.zeros(group.size)
            for site in sites:
                variable = weight_keys(site.layer)[site.key]
                if id(variable) in products:
                    values = _flat(products[id(variable)], site.axis).sum(axis=1)
                    change += evidence.pool(group, site, values)
            total += change**2
        return total / len(evidence.products)


@dataclasses.dataclass(frozen=True)
class Activation(ChannelCriterion):
    """What the readers of a channel see of it.

    Args:
        statistic: "mean" for the mean of |x|, "nonzero" for the share of values that are not zero
            (1 - APoZ, Hu et al. 2016, Network Trimming).
    """

    statistic: str

    def __call__(self, group: ChannelGroup, evidence: Evidence) -> Scores:
        """Returns the statistic, averaged over the readers."""
        place = 0 if self.statistic == "mean" else 1
        found = []
        for site in group.sites:
            seen = evidence.activations.get(id(site.layer))
            fits = seen is not None and seen[place].size == site.labels.size
            if site.role == CONSUMES and fits and site.key in _INPUT_KERNELS:
                counts = evidence.pool(group, site, np.ones(site.labels.size))
                found.append(evidence.pool(group, site, seen[place]) / counts)  # type: ignore[index]
        return np.mean(found, axis=0) if found else None


CHANNEL_CRITERIA.register("activation")(lambda: Activation("mean"))
CHANNEL_CRITERIA.register("apoz")(lambda: Activation("nonzero"))

_INPUT_KERNELS = ("kernel", "depthwise_kernel")


@CHANNEL_CRITERIA.register("random")
@dataclasses.dataclass(frozen=True)
class RandomChannels(ChannelCriterion):
    """A random order, the control arm that any criterion has to beat."""

    def __call__(self, group: ChannelGroup, evidence: Evidence) -> Scores:
        """Returns scores drawn from [0, 1), of the same mean in each group."""
        return np.random.default_rng([evidence.seed, *group.units[:4]]).random(group.size)


def _produced(group: ChannelGroup) -> Sequence[Site]:
    return [site for site in group.sites if site.role == PRODUCES]


def _biases(group: ChannelGroup) -> Sequence[Site]:
    makers = {id(site.layer) for site in _produced(group)}
    return [s for s in group.sites if s.key == "bias" and id(s.layer) in makers]


def _carried_by_batch_norm(group: ChannelGroup) -> Sequence[Site]:
    return [
        site
        for site in group.sites
        if site.role == CARRIES and isinstance(site.layer, keras.layers.BatchNormalization)
    ]


def _flat(value: Array, axis: int) -> Array:
    moved = np.moveaxis(value, axis, 0)
    return moved.reshape(len(moved), -1)
