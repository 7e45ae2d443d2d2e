"""Where a model can be cut into stages, and where it is best cut."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.checks import check_model
from tfaccel.core.graph import Graph, Node, Tensor
from tfaccel.core.nodes import map_tree

_SENDABLE = (
    *("float16", "bfloat16", "float32", "float64", "bool"),
    *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A place between two calls of a model.

    Attributes:
        position: number of calls before it.
        after: name of the layer that is called last before it.
        tensors: what is made before it and read behind it, or given out by the model; it has to be
            sent.
        why_not: why the model cannot be cut here; None where it can.
    """

    position: int
    after: str
    tensors: tuple[Tensor, ...]
    why_not: str | None


class Calls:
    """The calls of a model in the order in which they run, and the cuts between them.

    Args:
        model: a built Functional or Sequential model; it is not changed. A nested model is one
            call.

    Raises:
        TypeError: it has no graph, or trains in a way of its own.
        ValueError: it is not built.
    """

    def __init__(self, model: keras.Model) -> None:
        check_model(model, "Pipeline")
        for method in ("train_step", "compute_loss", "compute_metrics"):
            if getattr(type(model), method) is not getattr(keras.Model, method):
                raise TypeError(
                    f"A pipeline trains by compile's loss, but {model.name!r} is a "
                    f"{type(model).__name__} with a {method} of its own, which needs the whole "
                    "model at once. Give keras.Model(model.inputs, model.outputs)."
                )
        # A Functional twin of the same layers, because stages take lists of tensors.
        twin = keras.Model(model.inputs, keras_private.functional_of(model).output, name=model.name)
        twin.dtype_policy = model.dtype_policy
        self.graph = Graph.read(twin)
        self.inputs = [node for node in self.graph.nodes if node.is_input]
        self.calls = [node for node in self.graph.nodes if not node.is_input]
        self._masked = _masked_tensors(self.graph)

    def cuts(self) -> list[Cut]:
        """Returns every place between two calls, first to last."""
        return [self._cut(position) for position in range(1, len(self.calls))]

    def masked_output(self) -> str | None:
        """Returns the name of a tensor that leaves the model with a Keras mask, if there is one."""
        return next((t.name for t in self.graph.outputs if id(t) in self._masked), None)

    def positions_of(self, names: Sequence[str]) -> list[int]:
        """Returns the positions of cuts behind layers of these names.

        Raises:
            ValueError: there is no such layer, it is the last, the order is wrong, or the model
                cannot be cut there; it says why and where it can.
        """
        cuts = {cut.after: cut for cut in self.cuts()}
        free = [name for name, cut in cuts.items() if cut.why_not is None]
        where = f"It can be cut after {', '.join(free) or 'none of its layers'}."
        positions: list[int] = []
        for name in names:
            if name not in cuts:
                raise ValueError(f"There is no layer {name!r} to cut the model after. {where}")
            if cuts[name].why_not is not None:
                reason = cuts[name].why_not
                raise ValueError(f"The model cannot be cut after {name!r}: {reason}. {where}")
            positions.append(cuts[name].position)
        if positions != sorted(set(positions)):
            raise ValueError(
                f"Cuts must stand in the order of the layers, each once, but got {list(names)}."
            )
        return positions

    def balance(self, seconds: Mapping[str, float], stages: int) -> list[int]:
        """Returns the cuts by which the slowest stage is as fast as it can be.

        Args:
            seconds: time of a call of each layer, by name; a layer that is not named takes none.
            stages: how many parts, from 1.

        Returns:
            Positions of `stages - 1` cuts; of equally good ones those that send least.

        Raises:
            ValueError: there are not as many places to cut.
        """
        cuts = [cut for cut in self.cuts() if cut.why_not is None]
        if len(cuts) < stages - 1:
            raise ValueError(
                f"{self.graph.model.name!r} can be cut in {len(cuts)} places, but {stages} stages "
                f"need {stages - 1}: after {', '.join(c.after for c in cuts) or 'no layer'}. "
                "A nested model is one piece; take fewer stages, or make the model of its layers."
            )
        costs = [seconds.get(node.name, 0.0) for node in self.calls]
        sizes = {cut.position: sum(map(_values, cut.tensors)) for cut in cuts}
        return partition(costs, sizes, stages)

    def _cut(self, position: int) -> Cut:
        before, behind = self.calls[:position], self.calls[position:]
        read = {id(tensor) for node in behind for tensor in node.inputs}
        live = tuple(
            tensor
            for node in before
            for tensor in node.outputs
            if id(tensor) in read or self.graph.is_output(tensor)
        )
        why_not = self._why_not(before, behind, live)
        return Cut(position, before[-1].name, live, why_not)

    def _why_not(
        self, before: Sequence[Node], behind: Sequence[Node], live: Sequence[Tensor]
    ) -> str | None:
        early = {id(node.operation) for node in before}
        for node in behind:
            if id(node.operation) in early and _has_state(node.operation):
                return f"layer {node.name!r} is called on both sides and has weights"
        for tensor in live:
            if tensor.dtype not in _SENDABLE:
                return f"the tensor {tensor.name!r} of type {tensor.dtype} cannot be sent"
            if id(tensor) in self._masked:
                return f"the tensor {tensor.name!r} carries a mask, which would be lost"
        return None


def partition(costs: Sequence[float], sizes: Mapping[int, int], parts: int) -> list[int]:
    """Splits a row of costs so that the largest sum of a part is smallest.

    Args:
        costs: of each element, in order.
        sizes: the places where it may be split (number of elements before), and what a split there
            costs to send; that decides between splits which are equally good otherwise.
        parts: how many.

    Returns:
        `parts - 1` places, ascending.

    >>> partition([1, 1, 1, 3, 1], {1: 9, 2: 9, 3: 9, 4: 9}, 2)
    [3]
    """
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    places = [0, *sorted(sizes), len(costs)]
    # best[p] = (largest part, values sent, cuts) of the elements before place p.
    best: dict[int, tuple[float, int, list[int]]] = {0: (0.0, 0, [])}
    for part in range(parts):
        last = part == parts - 1
        ends = [len(costs)] if last else places[1:-1]
        found: dict[int, tuple[float, int, list[int]]] = {}
        for end in ends:
            options = [
                (
                    max(worst, sums[end] - sums[begin]),
                    sent + (0 if last else sizes[end]),
                    [*cuts, *([] if last else [end])],
                )
                for begin, (worst, sent, cuts) in best.items()
                if begin < end
            ]
            if options:
                found[end] = min(options)
        best = found
    return best[len(costs)][2]


def _values(tensor: Tensor) -> int:
    """Values of one sample, an unknown length taken as one."""
    return math.prod(size or 1 for size in tensor.shape[1:])


def _has_state(operation: Any) -> bool:
    if not isinstance(operation, keras.layers.Layer):
        return False
    return bool(operation.variables)


def _masked_tensors(graph: Graph) -> set[int]:
    """Returns the ids of the tensors that carry a Keras mask, found as Keras finds it."""
    masks: dict[int, Any] = {}

    def mask_of(leaf: Any) -> Any:
        return masks.get(id(leaf)) if isinstance(leaf, Tensor) else None

    def to_symbol(leaf: Any) -> Any:
        return keras.KerasTensor(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf

    for node in graph.nodes:
        layer = node.layer
        if layer is None or node.is_input or not layer.supports_masking or not node.args:
            continue
        inputs, previous = map_tree(to_symbol, node.args[0]), map_tree(mask_of, node.args[0])
        found = keras.tree.flatten(layer.compute_mask(inputs, previous))
        for tensor, mask in zip(node.outputs, found):  # noqa: B905 - None stands for all outputs
            if mask is not None:
                masks[id(tensor)] = mask
    return set(masks)
