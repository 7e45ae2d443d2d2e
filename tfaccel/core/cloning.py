"""Copies of layers and of their state, and what makes a model of the same class."""

import contextlib
import inspect
import tempfile
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras

from tfaccel.core import keras_private


def clone_operation(operation: Any, config: dict[str, Any] | None = None) -> Any:
    """Returns a new layer or operation of the same config and name, without the weights.

    It is not built yet, unless its class says by itself how (`build_from_config`), as a layer does
    whose weights do not follow from the shape of its inputs. Classes and functions that the layer
    holds need not be registered with Keras.

    Args:
        operation: a layer or functional operation.
        config: what the copy is made from instead, if it is to differ; such a copy is not built.

    Raises:
        ValueError: it has no config that it could be made from.
    """
    try:
        with _deserializing_what(operation):
            clone = type(operation).from_config(config or operation.get_config())
    except (NotImplementedError, TypeError, ValueError) as error:
        cause = error.__context__ or error
        why = textwrap.shorten(str(cause) or type(cause).__name__, 200)
        raise ValueError(
            f"{type(operation).__name__} {operation.name!r} cannot be copied from its config "
            f"({why}). Give the class get_config() and from_config()."
        ) from error
    # Functional operations lose their name in the config, and inputs of Keras 3.12 this flag.
    clone.name = operation.name
    if isinstance(operation, keras.layers.InputLayer):
        clone.optional = operation.optional
    if isinstance(operation, keras.layers.Layer):
        _share_lambdas(operation, clone)
        if config is None and keras_private.says_how_it_is_built(operation):
            _build_like(operation, clone)
    return clone


def clone_built(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Returns a built copy of a built layer, with its weights, seeds and trainable flags."""
    clone = clone_operation(layer)
    _build_like(layer, clone)
    clone.built = True
    copy_state(layer, clone)
    return clone


def copy_state(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Copies all that a layer has learned to a layer of the same config, both built.

    That is weights, random seeds, the states of stateful recurrent layers, vocabularies and
    statistics of adapted layers, and the trainable flags.

    Raises:
        ValueError: the target has other weights than the source.
    """
    pairs = list(zip(keras_private.sublayers(source), keras_private.sublayers(target)))  # noqa: B905
    for old_layer, new_layer in pairs:
        # An activation that is a layer of its own is built by the first batch only.
        _build_like(old_layer, new_layer)
    old, new = _state(source), _state(target)
    shapes = [tuple(v.shape) for v in old], [tuple(v.shape) for v in new]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"A copy of layer {source.name!r} ({type(source).__name__}) made from its config has "
            f"other weights than the layer itself: {shapes[1]} against {shapes[0]}. Its config or "
            "build config does not say all; complete get_config() or get_build_config()."
        )
    for old_variable, new_variable in zip(old, new, strict=True):
        # A copy: on JAX, training one model would otherwise delete the arrays of the other.
        new_variable.assign(keras.ops.copy(old_variable.value))
    for old_layer, new_layer in pairs:
        _copy_adapted(old_layer, new_layer)
    copy_trainable(source, target)


def copy_trainable(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Copies the trainable flags of a layer, of its inner layers and of their variables."""
    pairs = zip(keras_private.sublayers(source), keras_private.sublayers(target), strict=True)
    for old_layer, new_layer in pairs:  # parents first: setting a parent sets its children
        if new_layer.trainable != old_layer.trainable:
            new_layer.trainable = old_layer.trainable
    for old, new in zip(source.weights, target.weights, strict=True):
        if new.trainable != old.trainable:
            new.trainable = old.trainable


def recurrent_states(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns what stateful recurrent layers carry from batch to batch; Keras tracks it nowhere."""
    return [
        state
        for inner in keras_private.sublayers(layer)
        if isinstance(inner, keras.layers.RNN)
        for state in keras.tree.flatten(inner.states)
        if state is not None
    ]


def _state(layer: keras.layers.Layer) -> list[keras.Variable]:
    return [*layer.weights, *keras_private.seed_states(layer), *recurrent_states(layer)]


def _build_like(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Builds `target` as Keras builds a layer on loading, where `source` is built and it is not."""
    config = source.get_build_config() if source.built and not target.built else None
    if config:
        target.build_from_config(config)
        target.built = True


def _copy_adapted(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Carries over what `adapt` left outside of the weights, in the way that Keras saves it."""
    if hasattr(source, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            variables: dict[str, Any] = {}
            source.save_own_variables(variables)
            source.save_assets(folder)
            target.load_own_variables(variables)
            target.load_assets(folder)
    elif isinstance(target, keras.layers.Normalization):
        target.finalize_state()


# Classes of models


def constructor_of(model: keras.Model, chain: bool) -> Callable[..., keras.Model]:
    """Returns what makes a model of the same class.

    Args:
        model: a Functional or Sequential model, or one of a class derived from these.
        chain: whether it is to be made from a list of layers, else from inputs and outputs.

    Raises:
        TypeError: the class cannot be made so.
    """
    kind = type(model)
    if isinstance(model, keras.Sequential):
        if kind is keras.Sequential:
            return kind if chain else keras.Model
        same = _signature(kind) == _signature(keras.Sequential)
        wanted = "(layers, trainable, name)"
    else:
        same, wanted = keras_private.has_functional_constructor(kind), "(inputs, outputs, name)"
        chain = True
    if same and chain:
        return kind
    why = "the edited graph is no chain" if same else f"its constructor does not take {wanted}"
    raise TypeError(
        f"{model.name!r} is a {kind.__name__}, and the rewritten model cannot be one too: {why}. "
        "What the class adds, such as a train_step, would be lost. Rewrite "
        "keras.Model(model.inputs, model.outputs) and wrap the result."
    )


def _signature(kind: type) -> inspect.Signature:
    return inspect.signature(kind.__init__)  # type: ignore[misc]


# Functions and classes in a config


@contextlib.contextmanager
def _deserializing_what(operation: Any) -> Iterator[None]:
    """Lets Keras deserialize what `operation` holds: it is in memory, so it is trusted already."""
    with (
        keras_private.trusted_deserialization(),
        keras.saving.custom_object_scope(_custom_objects(operation)),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="The object being serialized includes a `lambda`")
        yield


def _custom_objects(operation: Any) -> dict[str, Any]:
    """Returns the functions and classes of a layer that are not Keras's own, by name."""
    found: dict[str, Any] = {}
    for value in _attributes(operation):
        if isinstance(value, types.FunctionType):
            found[value.__name__] = value
        elif hasattr(value, "get_config") and type(value).__module__.partition(".")[0] != "keras":
            found[type(value).__name__] = type(value)
    return found


def _attributes(operation: Any) -> Iterator[Any]:
    if not isinstance(operation, keras.layers.Layer):
        yield from vars(operation).values()
        return
    for layer in keras_private.sublayers(operation):
        yield layer
        yield from vars(layer).values()


def _share_lambdas(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Replaces lambdas that Keras made from byte code, which lost their globals, by the true ones.

    A lambda that the constructor of a layer made is left alone: it may hold the layer itself.
    """
    pairs = zip(keras_private.sublayers(source), keras_private.sublayers(target))  # noqa: B905
    for old_layer, new_layer in pairs:
        for name, old in list(vars(old_layer).items()):
            new = vars(new_layer).get(name)
            both = isinstance(old, types.FunctionType) and isinstance(new, types.FunctionType)
            if both and old.__name__ == "<lambda>" and new.__code__ is not old.__code__:
                setattr(new_layer, name, old)
