"""What a graph is made of: values, and the calls that pass them on."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import keras

from tfaccel.core.cloning import clone_operation


@dataclasses.dataclass(eq=False)
class Tensor:
    """A value in the graph. Two tensors are the same only if they are one object.

    Attributes:
        shape: as in the model that was read, the batch dimension first and usually None.
        dtype: name of the type, such as "float32".
        name: what Keras called it.
    """

    shape: tuple[int | None, ...]
    dtype: str
    name: str


@dataclasses.dataclass(eq=False)
class Node:
    """One call of a layer or of a functional operation.

    Attributes:
        operation: the Keras layer or operation that is called.
        args: positional arguments, a tree in which every tensor is a `Tensor`.
        kwargs: keyword arguments, likewise.
        outputs: what the call gives, flat.
    """

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]

    @property
    def layer(self) -> keras.layers.Layer | None:
        """The layer that is called, or None for a functional operation such as `x + y`."""
        return self.operation if isinstance(self.operation, keras.layers.Layer) else None

    @property
    def name(self) -> str:
        """Name of the layer or operation."""
        return str(self.operation.name)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors among the arguments, flat, positional ones first."""
        return tuple(
            leaf for leaf in keras.tree.flatten((self.args, self.kwargs)) if is_tensor(leaf)
        )

    @property
    def is_input(self) -> bool:
        """Whether this is an entry of the model."""
        return isinstance(self.operation, keras.layers.InputLayer)

    @property
    def is_model(self) -> bool:
        """Whether this calls a nested model."""
        return isinstance(self.operation, keras.Model)


def is_tensor(leaf: Any) -> bool:
    """Whether a leaf of an argument tree is a value of the graph."""
    return isinstance(leaf, Tensor)


def map_tree(function: Callable[[Any], Any], tree: Any) -> Any:
    """Returns the tree with `function` applied to each leaf."""
    return keras.tree.map_structure(function, tree)


def swap(tree: Any, old: Tensor, new: Tensor) -> Any:
    """Returns the tree with `new` wherever `old` was."""
    return map_tree(lambda leaf: new if leaf is old else leaf, tree)


def check_names(nodes: list[Node], model: keras.Model) -> None:
    """Raises ValueError if two operations have one name; `model` is named in the error."""
    operations = {id(node.operation): node.name for node in nodes}
    names = list(operations.values())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Layers of one model need names of their own, but in {model.name!r} there are several "
            f"named {', '.join(map(repr, twice))}. Give the inserted layer another name."
        )


def output_of(layer: keras.layers.Layer, tensor: Tensor) -> Tensor:
    """Returns what `layer` will give for `tensor`; the layer is not built by it.

    Raises:
        ValueError: it gives several tensors.
    """
    value = keras.KerasTensor(tensor.shape, tensor.dtype)
    default = type(layer).compute_output_shape is keras.layers.Layer.compute_output_shape
    # Keras then runs the layer to see what it gives, which takes its weights. The layer itself
    # must not be called here: it would remember a call that is in no model.
    unclear = default and not layer.built
    outputs = clone_operation(layer)(value) if unclear else layer.compute_output_spec(value)
    flat = keras.tree.flatten(outputs)
    if len(flat) != 1:
        raise ValueError(
            f"Only a layer of one output can be inserted, but {layer.name!r} has {len(flat)}."
        )
    return Tensor(tuple(flat[0].shape), flat[0].dtype, layer.name)


def is_chain(nodes: list[Node], model: keras.Model) -> bool:
    """Whether the nodes of a Sequential model still form a chain that Sequential can hold."""
    if not isinstance(model, keras.Sequential):
        return False
    for before, node in itertools.pairwise(nodes):
        # Sequential calls its layers with these by itself, and nobody else can.
        bare = set(node.kwargs) <= {"training", "mask"}
        plain = bare and len(node.args) == 1 and node.args[0] is before.outputs[0]
        if node.layer is None or not plain or len(before.outputs) != 1:
            return False
    return len({id(node.operation) for node in nodes}) == len(nodes) > 1
