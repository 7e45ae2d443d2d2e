"""Through all layers of a model and of the models nested in it: what is called, and with what."""

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Final

import keras

from tfaccel.core import keras_private
from tfaccel.core.graph import Graph, Node, map_models

REMOVED: Final = object()
"""What `map_layers` takes for "this layer is taken out"."""


@dataclasses.dataclass(frozen=True)
class Visit:
    """One call on the way.

    Attributes:
        node: the call, of the graph of the model or of a nested one.
        args: its positional arguments, a tree in which each tensor is a value.
        kwargs: its keyword arguments, likewise.
        inputs: the values that stand for its tensors, flat.
        outputs: what it gives, flat.
    """

    node: Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Sequence[Any]
    outputs: Sequence[Any]


Call = Callable[..., Any]


def walk(
    model: keras.Model, inputs: Sequence[Any], call: Call
) -> Generator[Visit, None, Sequence[Any]]:
    """Yields each call that a model makes, those of nested models in their place.

    Args:
        model: a model with a graph.
        inputs: one value for each input of the model: arrays, or `keras.KerasTensor` for shapes.
        call: `call(operation, *args, **kwargs)` gives the outputs of an operation.

    Returns:
        The outputs of the model.
    """
    graph = Graph.read(model)
    values = {id(t): value for t, value in zip(graph.inputs, inputs, strict=True)}
    dying = _last_reads(graph)

    def to_value(leaf: Any) -> Any:
        return values.get(id(leaf), leaf)

    for node in graph.nodes:
        if node.is_input:
            continue
        given = [values[id(tensor)] for tensor in node.inputs]
        if keras_private.has_graph(node.operation):
            outputs = yield from walk(node.operation, given, call)
        else:
            args = keras.tree.map_structure(to_value, node.args)
            kwargs = keras.tree.map_structure(to_value, node.kwargs)
            outputs = keras.tree.flatten(call(node.operation, *args, **kwargs))
            yield Visit(node, args, kwargs, given, outputs)
            del args, kwargs
        values.update({id(t): value for t, value in zip(node.outputs, outputs, strict=True)})
        # Values of a whole data set may be on the way: none is held longer than it is read.
        del given, outputs
        for key in dying[id(node)]:
            del values[key]
    return [values[id(tensor)] for tensor in graph.outputs]


def _last_reads(graph: Graph) -> dict[int, list[int]]:
    """Returns for each node, by id, the ids of the tensors that nothing reads after it."""
    last = {id(output): id(node) for node in graph.nodes for output in node.outputs}
    last.update({id(tensor): id(node) for node in graph.nodes for tensor in node.inputs})
    for tensor in graph.outputs:
        last.pop(id(tensor), None)
    dying: dict[int, list[int]] = {id(node): [] for node in graph.nodes}
    for tensor_id, node_id in last.items():
        dying[node_id].append(tensor_id)
    return dying


def walk_shapes(
    model: keras.Model, inputs: Sequence[keras.KerasTensor]
) -> Generator[Visit, None, Sequence[Any]]:
    """Yields each call as `walk` does, with shapes alone: every value is a `keras.KerasTensor`."""

    def spec(operation: Any, *args: Any, **kwargs: Any) -> Any:
        return operation.compute_output_spec(*args, **kwargs)

    return (yield from walk(model, inputs, spec))


def read_graphs(model: keras.Model) -> Iterator[Graph]:
    """Yields the graphs of a model and of its nested models, each model's once."""
    waiting, seen = [model], {id(model)}
    while waiting:
        graph = Graph.read(waiting.pop())
        yield graph
        for layer in graph.layers():
            if keras_private.has_graph(layer) and id(layer) not in seen:
                seen.add(id(layer))
                waiting.append(layer)


def map_layers(model: keras.Model, replacement: Callable[[Any], Any]) -> keras.Model:
    """Puts a new layer in the place of each that `replacement` gives one for.

    Args:
        model: a built Functional or Sequential model; not changed.
        replacement: given a layer, returns a new one, None to let it stand, or `REMOVED` to take it
            out. It is asked once for each layer, also for one that several nested models share,
            which stays shared.

    Returns:
        The rebuilt model.
    """
    made: dict[int, Any] = {}

    def edit(graph: Graph) -> None:
        for layer in graph.layers():
            if keras_private.has_graph(layer):  # a nested model, whose layers are done already
                continue
            if id(layer) not in made:
                made[id(layer)] = replacement(layer)
            new = made[id(layer)]
            if new is REMOVED:
                for node in graph.calls(layer):
                    graph.remove(node)
            elif new is not None:
                graph.replace_layer(layer, new)

    return map_models(model, edit)
