"""Channels followed through the graph of a model, by a rule for each kind of layer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import keras
import numpy as np

from tfaccel.core import keras_private
from tfaccel.core.graph import Graph, Node
from tfaccel.core.nodes import is_tensor, map_tree
from tfaccel.pruning.units import CONSTANT, Channels, Labels, Units, constant

PRODUCES, CONSUMES, CARRIES = "produces", "consumes", "carries"

Counter = Callable[[Labels], int]
"""Gives how many positions of an array of labels are kept."""


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One axis of one weight, and the units that lie along it.

    Attributes:
        layer: whose weight it is.
        key: of the weight, see `tfaccel.core.transforms.weight_keys`.
        axis: of the weight.
        role: PRODUCES (one filter for each channel), CONSUMES (rows that read it) or CARRIES (a
            number for each channel, such as a batch norm's gamma).
        labels: unit of each position.
    """

    layer: keras.layers.Layer
    key: str
    axis: int
    role: str
    labels: Labels


class Rule(Protocol):
    """How one kind of layer or operation treats channels."""

    def __call__(self, trace: "Trace", call: "TracedCall") -> Sequence[Labels]:
        """Returns the labels of each output."""


@dataclasses.dataclass(frozen=True, eq=False)
class TracedCall:
    """One call on the way: the arguments with `Channels` in place of tensors.

    Attributes:
        operation: the layer or functional operation.
        args: positional arguments.
        kwargs: keyword arguments.
        outputs: shape of each output, the batch axis first.
    """

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[tuple[int | None, ...], ...]

    @property
    def inputs(self) -> list[Channels]:
        """The tensors among the arguments."""
        leaves = keras.tree.flatten((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Channels)]


Resize = Callable[[dict[str, Any], Counter], None]
Recall = Callable[[tuple[Any, ...], Counter], tuple[Any, ...]]


class Trace:
    """The units of a model, where they lie, and what depends on how many are kept.

    Attributes:
        units: all units.
        sites: axes of weights with units along them.
        inputs: labels of the inputs of nested models, by the id of their input layer.
        resizes: by the id of a layer or operation, what to change in its config.
        recalls: by the id of an operation, what to change in its arguments.
    """

    def __init__(self, model: keras.Model, rule_for: Callable[[Any], Rule]) -> None:
        self.units = Units()
        self.sites: dict[tuple[int, str, int], Site] = {}
        self.inputs: dict[int, Channels] = {}
        self.resizes: dict[int, Resize] = {}
        self.recalls: dict[int, Recall] = {}
        self._made: dict[tuple[int, str], Labels] = {}
        self._rule_for = rule_for
        outputs = self._run(model, [_unlabelled(t) for t in Graph.read(model).inputs])
        for value in outputs:
            self.units.fix(value.labels, f"an output of {model.name!r}")

    # What rules say

    def fresh(self, layer: Any, what: str, count: int) -> Labels:
        """Returns the units that a layer makes; the same at each of its calls."""
        if (id(layer), what) not in self._made:
            self._made[id(layer), what] = self.units.fresh(count)
        return self._made[id(layer), what]

    def lay(self, layer: Any, key: str, axis: int, role: str, labels: Labels) -> None:
        """Says which units lie along an axis of a weight."""
        place = (id(layer), key, axis)
        if place in self.sites:
            self.units.unite(self.sites[place].labels, labels)
        else:
            self.sites[place] = Site(layer, key, axis, role, labels)

    def along(self, value: Channels, axis: int, reason: str) -> Labels:
        """Returns the unit of each position along an axis; units along another must stay."""
        axis %= len(value.shape)
        labels = self.units.settle(value.labels)
        size = value.shape[axis] or 1
        if any(n > 1 for place, n in enumerate(labels.shape) if place != axis):
            self.units.fix(labels, reason)
            return np.full(size, CONSTANT, np.int64)
        return np.broadcast_to(labels.ravel(), (size,)) if labels.size == 1 else labels.ravel()

    def fix(self, values: Sequence[Channels], reason: str) -> None:
        """Says that all units of tensors must stay."""
        for value in values:
            self.units.fix(value.labels, reason)

    # Following the graph

    def _run(self, model: keras.Model, inputs: Sequence[Channels]) -> list[Channels]:
        graph = Graph.read(model)
        values: dict[int, Channels] = {}
        for tensor, value in zip(graph.inputs, inputs, strict=True):
            values[id(tensor)] = value
            entry = id(graph.producer(tensor).operation)
            if entry in self.inputs:
                known = self.inputs[entry]
                self._unite_values(known, value, f"{model.name!r} is called in several ways")
            self.inputs.setdefault(entry, value)
        for node in graph.nodes:
            if not node.is_input:
                for tensor, value in zip(node.outputs, self._call(node, values), strict=True):
                    values[id(tensor)] = value
        return [values[id(tensor)] for tensor in graph.outputs]

    def _unite_values(self, known: Channels, value: Channels, reason: str) -> None:
        if known.labels.shape == value.labels.shape:
            self.units.unite(known.labels, value.labels)
        else:
            self.fix([known, value], reason)

    def _call(self, node: Node, values: Mapping[int, Channels]) -> list[Channels]:
        if keras_private.has_graph(node.operation):
            return self._run(node.operation, [values[id(t)] for t in node.inputs])

        def to_value(leaf: Any) -> Any:
            return values[id(leaf)] if is_tensor(leaf) else leaf

        args, kwargs = map_tree(to_value, node.args), map_tree(to_value, node.kwargs)
        shapes = tuple(tensor.shape for tensor in node.outputs)
        call = TracedCall(node.operation, args, kwargs, shapes)
        labels = self._rule_for(node.operation)(self, call)
        return [
            Channels(tensor.shape, tensor.dtype, self.units.settle(array))
            for tensor, array in zip(node.outputs, labels, strict=True)
        ]


def _unlabelled(tensor: Any) -> Channels:
    return Channels(tensor.shape, tensor.dtype, constant(len(tensor.shape)))
