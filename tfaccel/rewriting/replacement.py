"""Layers put in the place of others, as the user says."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import keras

from tfaccel.core import keras_private
from tfaccel.core.checks import check_model
from tfaccel.core.cloning import clone_built, clone_operation
from tfaccel.core.graph import Graph, Node, flat_layers, map_models
from tfaccel.core.nodes import is_tensor, map_tree
from tfaccel.core.selection import Selector, select_layers
from tfaccel.core.walking import read_graphs
from tfaccel.rewriting.chains import wrapped_layers

LayerClass = type[keras.layers.Layer]
Match = Selector | LayerClass | tuple[LayerClass, ...]
Shape = tuple[int | None, ...]


def replace_layers(model: keras.Model, match: Match, build: Callable[[Any], Any]) -> keras.Model:
    """Puts the layers that `build` makes in the place of those that match.

    Where one layer is replaced by several, each is called with what the one before gives. Nested
    models are searched too, and a layer that is called several times is replaced once and stays
    shared. All is checked before anything is rebuilt.

    Weights: a layer that `build` returns built keeps the weights that it has (build it and set
    them). Of the others, the first whose weights have the shapes of the old layer's, in the same
    order, takes these over; the rest begin freshly initialized. The `trainable` flags are those of
    the layers that `build` returns.

    Names: the last layer, or the only one, takes the name of the old layer, which
    `tfaccel.diff(model, replaced)` compares them by; those before it that Keras named by itself are
    called "<old>_1", "<old>_2" and so on.

    Args:
        model: a built Functional or Sequential model; not changed.
        match: the layers to replace: a layer class or several in a tuple, which subclasses match
            too; a name or pattern ("block_*") or several; or a predicate on the layer.
        build: given a layer of `model`, which it must not change, returns a new layer, a sequence
            of layers, a keras.Model of one input and one output, or None to leave the layer alone;
            the layer itself, in a sequence too, stands for a copy with its weights.

    Returns:
        The rewritten model.

    Raises:
        TypeError: the model is subclassed, `match` is none of these, or `build` returns something
            else.
        ValueError: the model is not built; a class, name or pattern matches nothing; or what
            `build` returns does not fit: it gives another shape, takes one tensor where the layer
            takes several, is a layer of the model, was returned for another layer already, or is to
            replace a layer that a technique has wrapped.

    >>> inputs = keras.Input((8,))
    >>> model = keras.Model(inputs, keras.layers.ReLU(name="act")(keras.layers.Dense(4)(inputs)))
    >>> smooth = replace_layers(model, keras.layers.ReLU, lambda old: keras.layers.ELU())
    >>> type(smooth.get_layer("act")).__name__
    'ELU'
    """
    check_model(model, "replace_layers")
    wrapped = wrapped_layers(model)
    plans: dict[int, _Plan] = {}
    names = {node.name for graph in read_graphs(model) for node in graph.nodes}
    for choice in select_layers(model, include=_selector(model, match)):
        if not choice.chosen:
            continue
        built = build(choice.layer)
        if built is None or built is choice.layer:
            continue
        if id(choice.layer) in wrapped:
            raise ValueError(
                f"build returned a new layer for {choice.layer.name!r}, which is wrapped by a "
                "technique, such as pruning. Replace layers first, or begin with "
                "tfaccel.core.bake_weights(model)."
            )
        chain = _checked(choice.layer, built)
        _check_new(choice.layer, chain, model, plans)
        plans[id(choice.layer)] = _Plan(choice.layer, chain)
    for plan in plans.values():
        plan.chain = [
            clone_built(plan.layer) if layer is plan.layer else layer for layer in plan.chain
        ]
        _name(plan, names)
        _fit(plan, model)

    def edit(graph: Graph) -> None:
        for layer in graph.layers():
            if id(layer) in plans:
                _apply(graph, plans[id(layer)])

    return map_models(model, edit)


@dataclasses.dataclass
class _Plan:
    """What takes the place of a layer.

    Attributes:
        layer: the old one.
        chain: the new ones, in the order in which they are called.
        heir: the new layer that takes the old weights over, if there is one.
    """

    layer: keras.layers.Layer
    chain: list[keras.layers.Layer]
    heir: keras.layers.Layer | None = None


# What is replaced


def _selector(model: keras.Model, match: Match) -> Selector:
    classes = match if isinstance(match, tuple) else (match,)
    if not classes or not all(isinstance(kind, type) for kind in classes):
        return cast(Selector, match)
    found = {type(layer).__name__ for layer in flat_layers(model)}
    if not any(choice.chosen for choice in select_layers(model, _of_classes(classes))):
        raise ValueError(
            f"match={' or '.join(kind.__name__ for kind in classes)} is no layer of "
            f"{model.name!r}, which has {', '.join(sorted(found)) or 'none'}."
        )
    return _of_classes(classes)


def _of_classes(classes: tuple[Any, ...]) -> Callable[[keras.layers.Layer], bool]:
    return lambda layer: isinstance(layer, classes)


# Checks, before anything is rebuilt


def _checked(layer: keras.layers.Layer, built: Any) -> list[keras.layers.Layer]:
    chain = list(built) if isinstance(built, (list, tuple)) else [built]
    if not chain or not all(isinstance(new, keras.layers.Layer) for new in chain):
        raise TypeError(
            "build must return a layer, a sequence of layers, a keras.Model or None, but for "
            f"{layer.name!r} it returned {built!r}."
        )
    return chain


def _check_new(
    layer: keras.layers.Layer,
    chain: list[keras.layers.Layer],
    model: keras.Model,
    plans: dict[int, _Plan],
) -> None:
    own = {id(inner) for inner in keras_private.sublayers(model)}
    for new in chain:
        if id(new) in own and new is not layer:
            raise ValueError(
                f"For {layer.name!r} build returned {new.name!r}, a layer of {model.name!r}, which "
                "is not to be changed. Return a new one, such as type(layer).from_config(config)."
            )
        others = [p.layer.name for p in plans.values() if any(new is known for known in p.chain)]
        others += [layer.name] * (sum(new is known for known in chain) - 1)
        if others:
            raise ValueError(
                f"build returned one {type(new).__name__} twice, for {others[0]!r} and "
                f"for {layer.name!r}. Return a new layer for each."
            )


def _name(plan: _Plan, names: set[str]) -> None:
    old = plan.layer.name
    plan.chain[-1].name = old
    for new in plan.chain[:-1]:
        if _is_named_by_keras(new) or new.name == old:
            number = 1
            while f"{old}_{number}" in names:
                number += 1
            new.name = f"{old}_{number}"
        names.add(new.name)


def _is_named_by_keras(layer: keras.layers.Layer) -> bool:
    plain = re.sub(r"\W+", "", type(layer).__name__)
    plain = re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", plain))
    return re.fullmatch(rf"{re.escape(plain.lower())}(_\d+)?", layer.name) is not None


def _fit(plan: _Plan, model: keras.Model) -> None:
    """Tries the chain on every call of the old layer, and finds who takes its weights over."""
    layer = plan.layer
    weights = [tuple(weight.shape) for weight in layer.weights]
    for graph in read_graphs(model):
        for node in graph.calls(layer):
            tried = _try(plan, node)
            for new, trial in zip(plan.chain, tried, strict=True):
                shapes = [tuple(weight.shape) for weight in trial.weights]
                if plan.heir is None and not new.built and shapes and shapes == weights:
                    plan.heir = new


def _try(plan: _Plan, node: Node) -> list[keras.layers.Layer]:
    """Calls copies of the new layers as the old one is called; returns the copies, built."""
    name = plan.layer.name
    if len(plan.chain) > 1 and (len(node.inputs) != 1 or len(node.args) != 1):
        raise ValueError(
            f"Several layers can replace a layer of one input, but {name!r} "
            f"({type(plan.layer).__name__}) is called with {len(node.inputs)} tensors. Return one "
            "layer for it, or None."
        )
    args, kwargs = (map_tree(_to_keras, tree) for tree in (node.args, node.kwargs))
    copies: list[keras.layers.Layer] = []
    for number, new in enumerate(plan.chain):
        last = number == len(plan.chain) - 1
        # A layer that is called remembers it, so that a copy is called in its place.
        copy = clone_built(new) if new.built else clone_operation(new)
        try:
            outputs = copy(*args, **(kwargs if last else {}))
        except Exception as error:  # whatever a layer raises about its input
            given = " and ".join(str(tensor.shape) for tensor in node.inputs)
            raise ValueError(
                f"What build returned for {name!r} cannot be called as that layer is: "
                f"{type(new).__name__} refuses {given}, or what was made of it ({error}). "
                "Return a layer that takes this input."
            ) from error
        args = (outputs,)
        copies.append(copy)
    gives = [tuple(tensor.shape) for tensor in keras.tree.flatten(args[0])]
    wanted = [tensor.shape for tensor in node.outputs]
    if len(gives) != len(wanted) or not all(map(_agree, gives, wanted)):
        raise ValueError(
            f"What build returned for {name!r} gives {_spell(gives)}, but {name!r} gives "
            f"{_spell(wanted)}. Return layers that give the same shape, or None."
        )
    return copies


def _to_keras(leaf: Any) -> Any:
    return keras.KerasTensor(leaf.shape, leaf.dtype) if is_tensor(leaf) else leaf


def _agree(shape: Shape, other: Shape) -> bool:
    return len(shape) == len(other) and all(
        None in (a, b) or a == b for a, b in zip(shape, other, strict=True)
    )


def _spell(shapes: Sequence[Shape]) -> str:
    return " and ".join(map(str, shapes)) or "nothing"


# The replacement itself


def _apply(graph: Graph, plan: _Plan) -> None:
    if len(plan.chain) == 1:
        graph.replace_layer(plan.layer, plan.chain[0])
    else:
        graph.replace_by_chain(plan.layer, plan.chain)
    if plan.heir is not None:
        graph.replace_layer(plan.heir, plan.heir, plan.layer.get_weights())
