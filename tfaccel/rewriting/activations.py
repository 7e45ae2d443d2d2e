"""Activations put in the place of others that cost more."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
from keras import layers

from tfaccel.core.checks import check_model, check_type
from tfaccel.core.cloning import clone_built, clone_operation
from tfaccel.core.graph import Graph, Node, Tensor, map_models
from tfaccel.core.selection import Selector, select_layers
from tfaccel.core.transforms import TransformedLayer

Function = Callable[..., Any]

# Howard et al. 2019, section 5.2.
HARD: Mapping[str, str] = {"swish": "hard_swish", "sigmoid": "hard_sigmoid"}

# Operations of keras.ops that compute an activation and nothing else, by the name of their class.
_OPERATIONS = {
    "Elu": "elu",
    "HardSigmoid": "hard_sigmoid",
    "HardSilu": "hard_silu",
    "HardTanh": "hard_tanh",
    "Relu": "relu",
    "Relu6": "relu6",
    "Selu": "selu",
    "Sigmoid": "sigmoid",
    "Silu": "silu",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "Tanh": "tanh",
}
# What hands values on to the model's output as they are, so that what is before it ends the model.
_PASSING = (
    layers.Concatenate,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Dropout,
    layers.Flatten,
    layers.Identity,
    layers.Permute,
    layers.Reshape,
)
_PASSING_OPERATIONS = (
    "Concatenate",
    "ExpandDims",
    "GetItem",
    "Reshape",
    "Split",
    "Squeeze",
    "Transpose",
)


def replace_activations(
    model: keras.Model,
    mapping: Mapping[str, str | Function] = HARD,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    recurrent: bool = False,
    outputs: bool = False,
) -> keras.Model:
    """Puts other activations in the place of some; by default the hard ones, which need no exp.

    Hard swish is x relu6(x + 3) / 6 and hard sigmoid relu6(x + 3) / 6 (Howard et al. 2019,
    Searching for MobileNetV3, section 5.2). LiteRT has an operator for hard swish; swish it
    computes as two. The outputs change by a little in each place (at most 0.142 for hard swish, at
    x = 3 and -3, and 0.069 for hard sigmoid), so train for some epochs afterwards.

    Replaced are activations that are built into a layer (`activation=`, also within TimeDistributed
    and of layers that a technique has wrapped), Activation and ReLU layers, and operations such as
    keras.ops.silu(x), which become an Activation layer of the same name. A product x * sigmoid(x)
    becomes x * hard_sigmoid(x), which is hard swish. Nested models are rewritten too.

    Args:
        model: a built Functional or Sequential model; not changed.
        mapping: name of the activation to replace -> name (or function) of the new one, as
            `keras.activations.get` knows them; "swish" and "silu" are one.
        include: layers to rewrite (names, patterns, predicate); by default all, and all operations,
            which are no layers and cannot be included by name.
        exclude: layers to leave alone.
        recurrent: whether the gates and states of recurrent layers are replaced too. They feed on
            themselves, so that an error grows with the length of the sequence.
        outputs: whether activations are replaced that give what the model gives out. A sigmoid
            there makes probabilities, which a hard sigmoid would cut off at 0 and 1.

    Returns:
        The rewritten model, weights and names of layers carried over; if there is nothing to
        replace, a copy. `tfaccel.diff(model, replaced)` tells what was changed.

    Raises:
        TypeError: the model is subclassed, or an activation is neither name nor function.
        ValueError: the model is not built, an activation is not known, a selector matches nothing,
            or a layer does not keep a new activation in its config.
    """
    check_model(model, "replace_activations")
    functions = _functions(mapping)
    chosen = {id(c.layer) for c in select_layers(model, include, exclude) if c.chosen}
    kept = set() if outputs else {id(node.operation) for node in _last_nodes(Graph.read(model))}
    rewritten: dict[int, keras.layers.Layer] = {}

    def replacement_of(node: Node) -> keras.layers.Layer | None:
        if id(node.operation) in kept:
            return None
        if node.layer is None:
            return _for_operation(node, functions) if include is None else None
        inner = node.layer.layer if isinstance(node.layer, TransformedLayer) else node.layer
        if id(inner) not in chosen:
            return None
        return _for_layer(node.layer, functions, recurrent=recurrent)

    def edit(graph: Graph) -> None:
        for node in graph.nodes:
            operation = node.operation
            if node.is_input or node.is_model:
                continue
            if id(operation) not in rewritten:
                new = replacement_of(node)
                if new is None:
                    continue
                # A later node may call the new layer already, which is not to be looked at again.
                rewritten.update({id(operation): new, id(new): new})
            if rewritten[id(operation)] is not operation:
                graph.replace_layer(operation, rewritten[id(operation)])

    return map_models(model, edit)


def _functions(mapping: Mapping[str, str | Function]) -> dict[Function, Function]:
    check_type("mapping", mapping, Mapping)
    return {_activation(old): _activation(new) for old, new in mapping.items()}


def _activation(identifier: Any) -> Function:
    if not isinstance(identifier, str) and not callable(identifier):
        raise TypeError(
            f"An activation is a name such as 'swish' or a function, but got {identifier!r}."
        )
    try:
        return keras.activations.get(identifier)
    except ValueError as error:
        raise ValueError(
            f"keras.activations knows no {identifier!r}. Give a name such as 'relu', 'swish', "
            "'sigmoid', 'hard_swish' or 'hard_sigmoid'; the new one may be a function."
        ) from error


# Where the model ends


def _last_nodes(graph: Graph, wanted: list[bool] | None = None) -> Iterator[Node]:
    """Yields the calls that give what the model gives out, past what only hands values on."""
    waiting = [x for n, x in enumerate(graph.outputs) if wanted is None or wanted[n]]
    seen: set[int] = set()
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        node = graph.producer(tensor)
        if node.is_model:
            yield from _last_nodes(Graph.read(node.operation), _places(node, tensor))
        elif _hands_on(node):
            waiting += node.inputs
        else:
            yield node


def _places(node: Node, tensor: Tensor) -> list[bool]:
    return [output is tensor for output in node.outputs]


def _hands_on(node: Node) -> bool:
    if node.layer is None:
        return type(node.operation).__name__ in _PASSING_OPERATIONS
    linear = getattr(node.layer, "activation", None) is keras.activations.linear
    return isinstance(node.layer, _PASSING) or (
        isinstance(node.layer, layers.Activation) and linear
    )


# What takes the place


def _for_operation(node: Node, functions: Mapping[Function, Function]) -> keras.layers.Layer | None:
    name = _OPERATIONS.get(type(node.operation).__name__)
    # An Elu of another alpha is another function.
    plain = getattr(node.operation, "alpha", 1.0) == 1.0
    if name is None or not plain or keras.activations.get(name) not in functions:
        return None
    function = functions[keras.activations.get(name)]
    return layers.Activation(function, dtype=node.inputs[0].dtype, name=node.name)


def _for_layer(
    layer: keras.layers.Layer, functions: Mapping[Function, Function], *, recurrent: bool
) -> keras.layers.Layer | None:
    if type(layer) is layers.ReLU:
        function = functions.get(_relu_of(layer))
        if function is None:
            return None
        return layers.Activation(function, dtype=layer.dtype_policy, name=layer.name)
    places = [
        number
        for number, (owner, attribute) in enumerate(_owners(layer, recurrent=recurrent))
        if any(getattr(owner, attribute, None) is old for old in functions)
    ]
    if not places:
        return None
    new = clone_built(layer)
    owners = list(_owners(new, recurrent=recurrent))
    for owner, attribute in (owners[number] for number in places):
        setattr(owner, attribute, functions[getattr(owner, attribute)])
    saved = list(_owners(clone_operation(new), recurrent=recurrent))
    if any(getattr(*saved[number]) is not getattr(*owners[number]) for number in places):
        raise ValueError(
            f"Layer {layer.name!r} ({type(layer).__name__}) does not keep its activation in its "
            "config, so that a saved model would have the old one again. Leave it out with "
            f"exclude={layer.name!r}, or complete its get_config()."
        )
    return new


def _relu_of(layer: Any) -> Any:
    plain = not layer.negative_slope and not layer.threshold
    names = {None: "relu", 6: "relu6"}
    known = plain and layer.max_value in names
    return keras.activations.get(names[layer.max_value]) if known else None


def _owners(layer: Any, *, recurrent: bool) -> Iterator[tuple[Any, str]]:
    """Yields what may hold an activation, and the attribute that does."""
    if isinstance(layer, layers.Bidirectional):
        yield from _owners(layer.forward_layer, recurrent=recurrent)
        yield from _owners(layer.backward_layer, recurrent=recurrent)
    elif isinstance(layer, layers.Wrapper):
        yield from _owners(layer.layer, recurrent=recurrent)
    elif not isinstance(layer, layers.RNN):
        yield layer, "activation"
    elif recurrent:
        for cell in getattr(layer.cell, "cells", [layer.cell]):
            yield cell, "activation"
            yield cell, "recurrent_activation"
