"""Lottery tickets: the masks of a trained network on the weights that it once had."""

from typing import Any

import keras

from tfaccel.core.checks import check_fraction, check_model
from tfaccel.core.graph import flat_layers
from tfaccel.core.schedules import ConstantSparsity
from tfaccel.core.transforms import TransformedLayer, transform_model, transformed_layers
from tfaccel.pruning.callbacks import groups_of
from tfaccel.pruning.masks import PruningMask


def rewind(
    model: keras.Model, earlier: keras.Model, *, sparsity: float | None = None
) -> keras.Model:
    """Returns the pruned model with the weights of an earlier state; its masks stay from now on.

    With `sparsity`, masks are first decided anew by the weights that `model` has now. Iterative
    magnitude pruning trains, prunes 20 % of what is left, rewinds, and begins again. A network at
    initialization is the earlier state of Frankle & Carbin 2019; deeper ones need the weights after
    some hundred steps (Frankle et al. 2020, Linear mode connectivity, late rewinding).

    Args:
        model: what `prune` returned, trained; not changed.
        earlier: the model before, pruned or not, with layers of the same names and shapes.
        sparsity: share of zeros, in [0, 1); by default the masks stay what they are.

    Returns:
        A new model, not compiled. Batch-norm statistics are rewound too.

    Raises:
        TypeError: a model is subclassed.
        ValueError: the model has no masks, or none was decided yet and no sparsity is given, or the
            layers of the two do not fit.

    Example:
        >>> from tfaccel.pruning import prune, update_masks
        >>> start = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="dense")])
        >>> trained = prune(start, 0.5)
        >>> update_masks(trained, 0)  # and trained.fit(...)
        >>> ticket = rewind(trained, start, sparsity=0.6)
        >>> round(float(ticket.layers[0].transforms[0][1].state["mask"].numpy().mean()), 2)
        0.41
    """
    check_model(model, "rewind")
    check_model(earlier, "rewind")
    if sparsity is not None:
        check_fraction("sparsity", sparsity)
    before = {layer.name: _inner(layer) for layer in flat_layers(earlier) if layer.weights}
    result = transform_model(model, lambda layer: None)  # noqa: ARG005  a copy
    groups = groups_of(result, "rewind()")
    if sparsity is not None:
        for group in groups:
            group.decide(sparsity, max(group.last, 0))
    elif min(group.last for group in groups) < 0:
        raise ValueError(
            f"rewind() keeps the masks of {model.name!r}, but none was decided yet. Train it with "
            "UpdatePruning, or give sparsity= to decide them now."
        )
    for layer in flat_layers(result):
        if layer.weights:
            _take_weights(_inner(layer), before, earlier)
    for transformed in transformed_layers(result):
        for _, transform in transformed.transforms:
            if isinstance(transform, PruningMask):
                _hold(transform)
    return result


def _take_weights(layer: keras.layers.Layer, before: dict[str, Any], earlier: keras.Model) -> None:
    source = before.get(layer.name)
    shapes = [tuple(variable.shape) for variable in layer.weights]
    if source is None or [tuple(variable.shape) for variable in source.weights] != shapes:
        found = "has no such layer" if source is None else "has other weights in it"
        raise ValueError(
            f"rewind() needs the weights of the layer {layer.name!r}, {shapes}, but "
            f"{earlier.name!r} {found}. Give an earlier state of the same network."
        )
    for variable, old in zip(layer.weights, source.weights, strict=True):
        variable.assign(keras.ops.copy(old.value))


def _hold(mask: PruningMask) -> None:
    """Gives a mask a schedule that has no turn left."""
    step = mask.last_step
    kept = float(keras.ops.convert_to_numpy(mask.state["mask"]).mean())
    mask.schedule = ConstantSparsity(min(1 - kept, 1 - 1e-6), step, step, 1)


def _inner(layer: keras.layers.Layer) -> keras.layers.Layer:
    return layer.layer if isinstance(layer, TransformedLayer) else layer
