"""Channels that go together: read off the graph, for any architecture.

Every channel that a layer makes is a unit. The units are followed through the graph: a sum unites
those of its operands place by place, a concatenation puts them side by side, a depthwise
convolution and a batch norm carry them on, a reshape and a permutation (channel shuffle) move them,
a convolution or dense layer consumes them and makes new ones. What a layer does not treat channel
by channel, such as a softmax or an unknown layer, must keep them all, and is named as the reason.
"""

import dataclasses
from collections.abc import Sequence

import keras
import numpy as np

from tfaccel.core import keras_private
from tfaccel.core.checks import check_model
from tfaccel.core.transforms import TransformedLayer
from tfaccel.pruning.channel_rules import rule_for
from tfaccel.pruning.tracing import PRODUCES, Site, Trace
from tfaccel.pruning.units import Labels


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units that lie along the same axes of the same weights, so that they can be ranked together.

    Attributes:
        units: [channels] roots; the k-th is removed from every site at once.
        sites: the axes on which they lie.
    """

    units: Labels
    sites: tuple[Site, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The layers that make these channels."""
        return tuple(dict.fromkeys(s.layer.name for s in self.sites if s.role == PRODUCES))

    @property
    def size(self) -> int:
        """How many channels can be removed independently."""
        return int(self.units.size)


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelMap:
    """What `read_channels` found.

    Attributes:
        groups: units that can be removed.
        reasons: for each layer whose channels must stay, why.
        trace: the way there.
    """

    groups: tuple[ChannelGroup, ...]
    reasons: dict[str, str]
    trace: Trace


def read_channels(model: keras.Model) -> ChannelMap:
    """Returns the channels of a model that can be removed, and those that go with them.

    Args:
        model: a built Functional or Sequential model; not changed. Nested models are followed.

    Raises:
        TypeError: the model is subclassed and has no graph.
        ValueError: the model is not built, or holds transformed layers.

    >>> from keras import layers
    >>> x = keras.Input((8, 8, 3))
    >>> y = layers.Conv2D(16, 3, padding="same", name="first")(x)
    >>> z = layers.Add()([y, layers.Conv2D(16, 3, padding="same", name="second")(y)])
    >>> found = read_channels(keras.Model(x, layers.Dense(10, name="head")(layers.Flatten()(z))))
    >>> [(group.names, group.size) for group in found.groups]
    [(('first', 'second'), 16)]
    >>> found.reasons["head"].startswith("an output of")
    True
    """
    check_model(model, "prune_channels")
    for layer in keras_private.sublayers(model):
        if isinstance(layer, TransformedLayer):
            raise ValueError(  # noqa: TRY004 - the model is of the right type
                f"Layer {layer.name!r} of {model.name!r} has transformed weights (a mask or fake "
                "quantization). Remove channels first, or strip the model: tfaccel.strip(model)."
            )
    trace = Trace(model, rule_for)
    groups = _groups(trace)
    return ChannelMap(groups, _reasons(trace, groups), trace)


def _groups(trace: Trace) -> tuple[ChannelGroup, ...]:
    sites = list(trace.sites.values())
    places: dict[int, list[tuple[int, int]]] = {}
    for number, site in enumerate(sites):
        roots, counts = np.unique(trace.units.roots(site.labels), return_counts=True)
        for root, count in zip(roots, counts, strict=True):
            places.setdefault(int(root), []).append((number, int(count)))
    together: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for root, where in places.items():
        made = any(sites[number].role == PRODUCES for number, _ in where)
        if made and trace.units.reason(root) is None:
            together.setdefault(tuple(where), []).append(root)
    return tuple(
        ChannelGroup(np.array(sorted(units)), tuple(sites[number] for number, _ in where))
        for where, units in together.items()
        if len(units) > 1
    )


def _reasons(trace: Trace, groups: Sequence[ChannelGroup]) -> dict[str, str]:
    """Returns why layers keep all that they make."""
    named = {name for group in groups for name in group.names}
    found: dict[str, str] = {}
    for site in trace.sites.values():
        if site.role == PRODUCES and site.layer.name not in (*found, *named):
            roots = np.unique(trace.units.roots(site.labels))
            fixed = [trace.units.reason(int(root)) for root in roots]
            if all(fixed):
                found[site.layer.name] = str(fixed[0])
            elif roots.size == 1:
                found[site.layer.name] = "all of its channels go together"
            else:
                found[site.layer.name] = "no two of its channels go with the same others"
    return found
