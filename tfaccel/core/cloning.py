"""Copies of layers and of their state."""

from typing import Any

import keras

from tfaccel.core import keras_private


def clone_operation(operation: Any) -> Any:
    """Returns a new layer or operation of the same config and name, not built.

    Raises:
        ValueError: it has no config that it could be made from.
    """
    try:
        clone = type(operation).from_config(operation.get_config())
    except (NotImplementedError, TypeError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{type(operation).__name__} {operation.name!r} cannot be copied from its config "
            f"({why}). Give the class get_config() and from_config()."
        ) from error
    # Functional operations lose their name in the config.
    clone.name = operation.name
    return clone


def clone_built(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Returns a built copy of a built layer, with its weights, seeds and trainable flags."""
    clone = clone_operation(layer)
    if not clone.built:
        config = layer.get_build_config()
        if config:
            clone.build_from_config(config)
        clone.built = True
    copy_state(layer, clone)
    return clone


def copy_state(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Copies weights, random seeds and trainable flags between layers of one config, both built.

    Raises:
        ValueError: the target has other weights than the source.
    """
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


def _state(layer: keras.layers.Layer) -> list[keras.Variable]:
    return [*layer.weights, *keras_private.seed_states(layer)]
