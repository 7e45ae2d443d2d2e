"""Batch norm and pruning: a penalty on gamma before, statistics from unlabelled data after."""

from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.checks import check_model, check_positive
from tfaccel.core.cloning import clone_built
from tfaccel.core.graph import flat_layers
from tfaccel.core.walking import map_layers
from tfaccel.rewriting.sampling import gather_batches, visit

Array = npt.NDArray[Any]


def recalibrate_batch_norm(
    model: keras.Model, data: Any, *, samples: int = 1024, seed: int = 0
) -> keras.Model:
    """Returns the model with the batch-norm statistics that it has now, by unlabelled data.

    A pruned network feeds its batch norms other values than the ones they averaged in training.
    Mean and variance are taken anew over all samples, layer by layer in the order of the graph, so
    that each is measured on what it will get (precise batch norm: Wu & Johnson 2021, section 3).

    Args:
        model: a built Functional or Sequential model; not changed.
        data: x, (x, y) of which y is not used, or batches of either.
        samples: at most so many are looked at.
        seed: of the choice of samples.

    Raises:
        TypeError: the model is subclassed.
        ValueError: it has no batch norm, or the data do not fit it.
    """
    check_model(model, "recalibrate_batch_norm")
    check_positive("samples", samples)
    renewed = map_layers(model, lambda layer: None)  # noqa: ARG005
    norms = _norms(renewed)
    if not norms:
        raise ValueError(
            f"recalibrate_batch_norm() found no batch normalization in {model.name!r}. "
            "There is nothing to do."
        )
    batches = gather_batches(renewed, data, samples, seed, "recalibrate_batch_norm")
    sums: dict[int, list[Any]] = {}

    def run(operation: Any, *args: Any, **kwargs: Any) -> Any:
        if id(operation) not in norms:
            return operation(*args, **kwargs)
        # Normalized by the batch itself, as in training, so that what follows sees what it will.
        x = keras.ops.cast(args[0], "float32")
        axes = [a for a in range(len(x.shape)) if a != operation.axis % len(x.shape)]
        mean, variance = keras.ops.moments(x, axes)
        _add(sums.setdefault(id(operation), [0, 0.0, 0.0]), x, axes, mean, variance)
        operation.moving_mean.assign(mean)
        operation.moving_variance.assign(variance)
        return operation(*args, **{**kwargs, "training": False})

    for batch in batches:
        for _ in visit(renewed, batch, run):
            pass
    for key, (_, mean, variance) in sums.items():
        norms[key].moving_mean.assign(mean)
        norms[key].moving_variance.assign(variance)
    return renewed


def penalize_batch_norm(model: keras.Model, strength: float = 1e-4) -> keras.Model:
    """Returns the model with an L1 penalty on the gammas of its batch norms.

    Trained so, unimportant channels get a gamma near zero, and `prune_channels` with the criterion
    "bn_gamma" finds them (Liu et al. 2017, Network Slimming, eq. 1).

    Args:
        model: a built Functional or Sequential model; not changed.
        strength: weight of the penalty in the loss; the paper has 1e-4 to 1e-5.

    Raises:
        TypeError: the model is subclassed.
        ValueError: no batch norm has a gamma.
    """
    check_model(model, "penalize_batch_norm")
    check_positive("strength", strength)
    found = []

    def penalized(layer: Any) -> Any:
        if not isinstance(layer, keras.layers.BatchNormalization) or not layer.scale:
            return None
        found.append(layer)
        new = clone_built(layer)
        new.gamma_regularizer = keras.regularizers.L1(strength)
        new.gamma.regularizer = new.gamma_regularizer
        return new

    rebuilt = map_layers(model, penalized)
    if not found:
        raise ValueError(
            f"penalize_batch_norm() found no batch normalization with a gamma in {model.name!r}."
        )
    return rebuilt


def _norms(model: keras.Model) -> dict[int, Any]:
    norms = [layer for layer in flat_layers(model) if isinstance(layer, _NORM)]
    return {id(layer): layer for layer in norms}


_NORM = keras.layers.BatchNormalization


def _add(entry: list[Any], x: Any, axes: list[int], mean: Any, variance: Any) -> None:
    """Adds a batch to a running count, mean and variance (Chan et al. 1979)."""
    mean = np.asarray(keras.ops.convert_to_numpy(mean), np.float64)
    variance = np.asarray(keras.ops.convert_to_numpy(variance), np.float64)
    count = int(np.prod([x.shape[axis] for axis in axes]))
    before, old_mean, old_variance = entry
    total = before + count
    shift = mean - old_mean
    entry[0] = total
    entry[1] = old_mean + shift * count / total
    entry[2] = (
        old_variance * before + variance * count + shift**2 * before * count / total
    ) / total
