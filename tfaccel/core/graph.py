"""One way to read, match, edit and rebuild the graph of a Keras model.

    graph = Graph.read(model)
    graph.insert_after(graph.outputs[0], keras.layers.Softmax())
    new_model = graph.build()

A graph is a list of calls (`Node`) that pass values (`Tensor`) on. It refers to the layers of the
model it was read from and never changes them: `build` clones each layer once (a shared layer stays
shared, across nested models too) and carries its weights over. Layers handed to `replace_layer` and
`insert_*` are new; the first model that is built takes them over as they are, a second one clones.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.checks import check_model, check_type
from tfaccel.core.cloning import clone_operation, constructor_of, copy_state
from tfaccel.core.nodes import (
    Node,
    Tensor,
    check_names,
    is_chain,
    is_tensor,
    map_tree,
    output_of,
    swap,
)

__all__ = ["Graph", "Node", "Tensor", "flat_layers", "map_models"]


class Graph:
    """The graph of a Functional or Sequential model; make one with `Graph.read`.

    Attributes:
        model: the model that was read; never changed.
        nodes: all calls, producers before consumers.
    """

    def __init__(
        self, model: keras.Model, nodes: list[Node], input_tree: Any, output_tree: Any
    ) -> None:
        self.model = model
        self.nodes = nodes
        self._input_tree = input_tree
        self._output_tree = output_tree
        self._own = {id(layer) for layer in keras_private.sublayers(model)}
        self._given: _Given = {}

    @classmethod
    def read(cls, model: keras.Model) -> "Graph":
        """Reads the graph of a built Functional or Sequential model.

        Raises:
            TypeError: the model is subclassed and has no graph, or is no model.
            ValueError: the model is not built.
        """
        check_model(model, "Graph.read")
        functional = keras_private.functional_of(model)
        tensors: dict[int, Tensor] = {}

        def to_tensor(leaf: Any) -> Any:
            if not isinstance(leaf, keras.KerasTensor):
                return leaf
            if id(leaf) not in tensors:
                tensors[id(leaf)] = Tensor(tuple(leaf.shape), leaf.dtype, leaf.name)
            return tensors[id(leaf)]

        nodes = [
            Node(
                operation=call.operation,
                args=map_tree(to_tensor, call.arguments.args),
                kwargs=map_tree(to_tensor, call.arguments.kwargs),
                outputs=tuple(to_tensor(output) for output in call.outputs),
            )
            for call in keras_private.call_nodes(model)
        ]
        input_tree, output_tree = (
            map_tree(to_tensor, x) for x in (functional.input, functional.output)
        )
        return cls(model, nodes, input_tree, output_tree)

    # What is there

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that enter the model, flat."""
        return tuple(keras.tree.flatten(self._input_tree))

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The tensors that leave the model, flat."""
        return tuple(keras.tree.flatten(self._output_tree))

    @property
    def output_tree(self) -> Any:
        """What the model gives, a tree with a `Tensor` at each leaf."""
        return self._output_tree

    def layers(self) -> list[keras.layers.Layer]:
        """Returns the layers that are called, each once, nested models included, inputs not."""
        unique = {id(n.operation): n.operation for n in self.nodes if n.layer and not n.is_input}
        return list(unique.values())

    def calls(self, operation: Any) -> list[Node]:
        """Returns the nodes that call `operation`; a shared layer has several."""
        return [node for node in self.nodes if node.operation is operation]

    def producer(self, tensor: Tensor) -> Node:
        """Returns the node that gives `tensor`."""
        for node in self.nodes:
            if any(output is tensor for output in node.outputs):
                return node
        raise ValueError(f"The tensor {tensor.name!r} is not of this graph.")

    def consumers(self, tensor: Tensor) -> list[Node]:
        """Returns the nodes that read `tensor`, each once."""
        return [node for node in self.nodes if any(read is tensor for read in node.inputs)]

    def is_output(self, tensor: Tensor) -> bool:
        """Whether the model gives `tensor` out."""
        return any(output is tensor for output in self.outputs)

    # Edits

    def replace_layer(
        self,
        layer: keras.layers.Layer,
        new_layer: keras.layers.Layer,
        weights: Sequence[Any] | None = None,
    ) -> None:
        """Makes every call of `layer` a call of `new_layer`, with the same arguments.

        Args:
            layer: a layer of the graph.
            new_layer: a new layer, which the rebuilt model takes over.
            weights: arrays for `new_layer.set_weights` once it is built.

        Raises:
            ValueError: the graph does not call `layer`, or `new_layer` is not new.
        """
        calls = self.calls(layer)
        if not calls:
            name = getattr(layer, "name", layer)
            raise ValueError(f"No call of layer {name!r} is in the graph of {self.model.name!r}.")
        self._take(new_layer, weights)
        for node in calls:
            node.operation = new_layer

    def replace_by_chain(
        self, layer: keras.layers.Layer, chain: Sequence[keras.layers.Layer]
    ) -> None:
        """Makes every call of `layer` a call of one layer after the other.

        Args:
            layer: a layer of the graph, called with one tensor.
            chain: new layers of one input and one output. A layer that is built keeps its weights,
                so build each and set its weights first. The last may have the old layer's name.

        Raises:
            ValueError: the graph does not call `layer`, it is called with several tensors, the
                chain is empty, or one of its layers is not new.
        """
        calls = self.calls(layer)
        if not chain or any(len(node.inputs) != 1 for node in calls):
            raise ValueError(
                f"A chain of layers replaces a layer of one input, but got {len(chain)} layers for "
                f"{layer.name!r}, called with {[len(node.inputs) for node in calls]} tensors."
            )
        self.replace_layer(layer, chain[-1])
        for node in calls:
            tensor = node.inputs[0]
            for new_layer in chain[:-1]:
                tensor = self.insert_before(node, tensor, new_layer)

    def insert_after(
        self, tensor: Tensor, layer: keras.layers.Layer, consumers: Sequence[Node] | None = None
    ) -> Tensor:
        """Puts `layer` behind `tensor`.

        Args:
            tensor: what the layer reads.
            layer: a new layer of one input and one output.
            consumers: the nodes that then read the layer's output; by default all, and the model's
                output too.

        Returns:
            The layer's output.

        Raises:
            ValueError: the tensor is not of this graph or a consumer does not read it, the layer is
                not new, or it gives several outputs.
        """
        place = self.nodes.index(self.producer(tensor)) + 1
        all_readers = self.consumers(tensor)
        readers = all_readers if consumers is None else consumers
        for reader in readers:
            if not any(reader is known for known in all_readers):
                raise ValueError(f"{reader.name!r} does not read the tensor {tensor.name!r}.")
        self._take(layer)
        node = Node(layer, (tensor,), {}, (output_of(layer, tensor),))
        for reader in readers:
            self._redirect(reader, tensor, node.outputs[0])
        if consumers is None:
            self._output_tree = swap(self._output_tree, tensor, node.outputs[0])
        self.nodes.insert(place, node)
        return node.outputs[0]

    def insert_before(self, node: Node, tensor: Tensor, layer: keras.layers.Layer) -> Tensor:
        """Puts `layer` between `tensor` and its use by `node` alone; returns the layer's output."""
        return self.insert_after(tensor, layer, consumers=[node])

    def remove(self, node: Node) -> None:
        """Takes a call out: what read its output reads its input instead.

        Raises:
            ValueError: the call has not exactly one input and one output, or is of another graph.
        """
        if not any(node is known for known in self.nodes):
            raise ValueError(f"{node.name!r} is no call of the graph of {self.model.name!r}.")
        if len(node.inputs) != 1 or len(node.outputs) != 1:
            raise ValueError(
                f"Only a call of one input and one output can be removed, but {node.name!r} has "
                f"{len(node.inputs)} inputs and {len(node.outputs)} outputs."
            )
        before, after = node.inputs[0], node.outputs[0]
        for reader in self.consumers(after):
            self._redirect(reader, after, before)
        self._output_tree = swap(self._output_tree, after, before)
        self.nodes.remove(node)

    def splice(self, node: Node, model: keras.Model, inputs: Sequence[Tensor]) -> list[Node]:
        """Puts the calls that a small model makes in the place of one call.

        Args:
            node: a call of the graph, of one output.
            model: gives one tensor; its layers are new, and taken over with their weights.
            inputs: tensors of the graph for the inputs of the model, of the same shapes.

        Returns:
            The calls that took its place.

        Raises:
            ValueError: the call is of another graph, or the numbers of tensors do not fit.
        """
        other = Graph.read(model)
        place = next((n for n, known in enumerate(self.nodes) if known is node), None)
        counts = len(other.inputs), len(other.outputs), len(node.outputs)
        if place is None or counts != (len(inputs), 1, 1):
            raise ValueError(
                f"{node.name!r} cannot give its place to {model.name!r}: the call must be of this "
                f"graph and both give one tensor, the model taking {len(inputs)}; the model takes "
                f"{counts[0]} and gives {counts[1]}, the call gives {counts[2]}."
            )
        made = [call for call in other.nodes if not call.is_input]
        for call in made:
            if call.layer is not None:
                self._take(call.layer)
            for old, new in zip(other.inputs, inputs, strict=True):
                self._redirect(call, old, new)
        for reader in self.consumers(node.outputs[0]):
            self._redirect(reader, node.outputs[0], other.outputs[0])
        self._output_tree = swap(self._output_tree, node.outputs[0], other.outputs[0])
        self.nodes[place : place + 1] = made
        return made

    def _take(self, layer: keras.layers.Layer, weights: Sequence[Any] | None = None) -> None:
        check_type("layer", layer, keras.layers.Layer)
        if id(layer) in self._own:
            raise ValueError(
                f"Layer {layer.name!r} is of the model {self.model.name!r} already, which is not "
                "to be changed. Give a new layer, such as type(layer).from_config(config)."
            )
        if weights is not None or id(layer) not in self._given:
            self._given[id(layer)] = (layer, weights)

    @staticmethod
    def _redirect(node: Node, old: Tensor, new: Tensor) -> None:
        node.args = swap(node.args, old, new)
        node.kwargs = swap(node.kwargs, old, new)

    # Rebuilding

    def build(self, name: str | None = None) -> keras.Model:
        """Makes the model that the graph describes, weights carried over.

        A Sequential model stays Sequential while it is a chain; a class derived from Functional or
        Sequential is kept if it is constructed in the same way. What `compile` set is not carried
        over: compile the new model.

        Args:
            name: of the new model; by default that of the model that was read.

        Raises:
            ValueError: two layers have one name, or a layer cannot be cloned from its config.
            TypeError: the model's class has a constructor of its own.
        """
        return self._build(_Builder(), name)

    def _build(self, builder: "_Builder", name: str | None = None) -> keras.Model:
        nodes = self._needed()
        check_names(nodes, self.model)
        builder.take(self._given)
        chain = is_chain(nodes, self.model)
        make = constructor_of(self.model, chain)
        if chain:
            content = [[builder.clone(node.operation) for node in nodes]]
        else:
            content = self._call_all(nodes, builder)
        model = make(*content, name=name or self.model.name)
        builder.carry_state()
        keras_private.set_own_trainable(model, self.model.trainable)
        # Of the model's own policy, compile() learns whether to scale the loss.
        model.dtype_policy = self.model.dtype_policy
        self._given = {}
        return model

    def _call_all(self, nodes: list[Node], builder: "_Builder") -> list[Any]:
        values: dict[int, Any] = {}

        def to_value(leaf: Any) -> Any:
            return values[id(leaf)] if is_tensor(leaf) else leaf

        for node in nodes:
            operation = builder.clone(node.operation)
            if node.is_input:
                outputs = operation.output
            else:
                outputs = operation(
                    *map_tree(to_value, node.args), **map_tree(to_value, node.kwargs)
                )
            for tensor, value in zip(node.outputs, keras.tree.flatten(outputs), strict=True):
                values[id(tensor)] = value
        return [map_tree(to_value, self._input_tree), map_tree(to_value, self._output_tree)]

    def _needed(self) -> list[Node]:
        wanted = {id(tensor) for tensor in (*self.outputs, *self.inputs)}
        kept = []
        for node in reversed(self.nodes):
            if any(id(output) in wanted for output in node.outputs):
                kept.append(node)
                wanted.update(id(tensor) for tensor in node.inputs)
        return kept[::-1]


_Given = dict[int, tuple[keras.layers.Layer, Sequence[Any] | None]]


class _Builder:
    """Clones each operation once and, when all are built, carries the weights over.

    A model and its nested models have one builder, so that a layer of several stays one layer.
    """

    def __init__(self) -> None:
        self._clones: dict[int, tuple[Any, Any]] = {}
        self._waiting: list[tuple[Any, Any]] = []
        self._weights: list[tuple[keras.layers.Layer, Sequence[Any]]] = []

    def take(self, given: _Given) -> None:
        self._clones.update({key: (layer, layer) for key, (layer, _) in given.items()})
        self._weights += [(layer, w) for layer, w in given.values() if w is not None]

    def clone(self, operation: Any) -> Any:
        if id(operation) not in self._clones:
            if _is_nested(operation):
                clone = Graph.read(operation)._build(self)  # noqa: SLF001
            else:
                clone = clone_operation(operation)
                if isinstance(operation, keras.layers.Layer):
                    self._waiting.append((operation, clone))
            self._clones[id(operation)] = (operation, clone)
        return self._clones[id(operation)][1]

    def carry_state(self) -> None:
        for source, clone in self._waiting:
            copy_state(source, clone)
        for layer, weights in self._weights:
            layer.set_weights(weights)
        self._waiting, self._weights = [], []


# Nested models


def map_models(model: keras.Model, edit: Callable[[Graph], None]) -> keras.Model:
    """Applies `edit` to the graph of a model and of every nested model, innermost first.

    Args:
        model: a built Functional or Sequential model; not changed.
        edit: changes the graph that it is given.

    Returns:
        The rebuilt model. A nested model that is called twice, in one model or in several, is
        edited once and stays shared. So does a layer of several models that `edit` lets stand.
    """
    builder = _Builder()
    rebuilt: dict[int, keras.Model] = {}

    def rebuild(source: keras.Model) -> keras.Model:
        if id(source) not in rebuilt:
            graph = Graph.read(source)
            for layer in graph.layers():
                if _is_nested(layer):
                    graph.replace_layer(layer, rebuild(layer))
            edit(graph)
            rebuilt[id(source)] = graph._build(builder)  # noqa: SLF001
        return rebuilt[id(source)]

    return rebuild(model)


def flat_layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """Yields every layer that the model calls, each once, those of nested models in their place."""
    seen: set[int] = set()
    for layer in _flatten(model):
        if id(layer) not in seen:
            seen.add(id(layer))
            yield layer


def _flatten(model: keras.Model) -> Iterator[keras.layers.Layer]:
    for layer in Graph.read(model).layers():
        if _is_nested(layer):
            yield from _flatten(layer)
        else:
            yield layer


def _is_nested(operation: Any) -> bool:
    return isinstance(operation, keras.Model) and keras_private.has_graph(operation)
