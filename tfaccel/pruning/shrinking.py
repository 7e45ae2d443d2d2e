"""The model that is left when channels are removed."""

import copy
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.cloning import clone_operation
from tfaccel.core.graph import Graph, map_models
from tfaccel.core.transforms import weight_keys
from tfaccel.pruning.dependencies import ChannelMap
from tfaccel.pruning.tracing import Site
from tfaccel.pruning.units import Labels

Array = npt.NDArray[Any]


def shrink(model: keras.Model, channels: ChannelMap, removed: Labels) -> keras.Model:
    """Returns the model without some of its channels.

    Args:
        model: what `read_channels` read; not changed.
        channels: what it found.
        removed: units of its groups.

    Returns:
        The smaller model. Its outputs are those of the model in which the removed channels are zero
        wherever they are read.

    Raises:
        ValueError: a unit is of no group, or nothing of a group would be left.
    """
    _check(channels, removed)
    return _Shrinking(channels, removed).apply(model)


def _check(channels: ChannelMap, removed: Labels) -> None:
    known = {int(unit) for group in channels.groups for unit in group.units}
    strange = sorted({int(unit) for unit in removed} - known)
    if strange:
        raise ValueError(
            f"The units {strange[:5]} are of no group, so they cannot be removed. "
            "Take them from read_channels(model).groups."
        )
    for group in channels.groups:
        if np.isin(group.units, removed).all():
            raise ValueError(
                f"All {group.size} channels of {', '.join(group.names)} would be removed. "
                "Keep at least one."
            )


class _Shrinking:
    """One rewriting: what is kept, and the layers that are made so far."""

    def __init__(self, channels: ChannelMap, removed: Labels) -> None:
        self._trace = channels.trace
        self._removed = np.asarray(removed, np.int64)
        self._made: dict[int, tuple[Any, list[Array] | None]] = {}
        self._sites: dict[int, list[Site]] = {}
        for site in self._trace.sites.values():
            if not self._kept(site.labels).all():
                self._sites.setdefault(id(site.layer), []).append(site)

    def apply(self, model: keras.Model) -> keras.Model:
        return map_models(model, self._edit)

    def _kept(self, labels: Labels) -> npt.NDArray[np.bool_]:
        return ~np.isin(self._trace.units.roots(labels), self._removed)

    def _count(self, labels: Labels) -> int:
        return int(self._kept(labels).sum())

    def _edit(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            operation = node.operation
            if node.is_input:
                self._resize_input(node)
                continue
            if id(operation) in self._trace.recalls:
                node.args = self._trace.recalls[id(operation)](node.args, self._count)
            made = self._make(operation)
            if made is None:
                continue
            new, weights = made
            if isinstance(operation, keras.layers.Layer):
                if graph.calls(operation):
                    graph.replace_layer(operation, new, weights)
            else:
                node.operation = new

    def _resize_input(self, node: Any) -> None:
        value = self._trace.inputs.get(id(node.operation))
        if value is None or value.axis is None:
            return
        kept = self._count(value.labels)
        config = copy.deepcopy(node.operation.get_config())
        shape = list(config["batch_shape"])
        if shape[value.axis] is not None and shape[value.axis] != kept:
            shape[value.axis] = kept
            config["batch_shape"] = tuple(shape)
            node.operation = clone_operation(node.operation, config)

    def _make(self, operation: Any) -> tuple[Any, list[Array] | None] | None:
        """Returns the smaller twin of a layer or operation and its weights; None if it stays."""
        key = id(operation)
        if key in self._made:
            return self._made[key]
        resize = self._trace.resizes.get(key)
        if resize is None and key not in self._sites:
            return None
        before = operation.get_config()
        config = copy.deepcopy(before)
        if resize is not None:
            resize(config, self._count)
        if config == before and key not in self._sites:
            return None
        weights = None
        if isinstance(operation, keras.layers.Layer):
            weights = self._weights(operation)
        self._made[key] = (clone_operation(operation, config), weights)
        return self._made[key]

    def _weights(self, layer: keras.layers.Layer) -> list[Array]:
        by_key: dict[str, list[Site]] = {}
        for site in self._sites.get(id(layer), ()):
            by_key.setdefault(site.key, []).append(site)
        keys = {id(variable): key for key, variable in weight_keys(layer).items()}
        weights = []
        for variable in layer.weights:
            value = keras.ops.convert_to_numpy(variable)
            for site in by_key.get(keys[id(variable)], ()):
                value = np.compress(self._kept(site.labels), value, axis=site.axis)
            weights.append(value)
        return weights
