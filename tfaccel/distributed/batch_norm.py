"""Batch normalization by the statistics of all ranks' batches."""

from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.checks import check_type
from tfaccel.distributed import restarts, runtime
from tfaccel.distributed.gathering import unique_name
from tfaccel.distributed.runtime import Sum

_MARK = "_tfaccel_synchronized"


def synchronize_batch_norm(model: keras.Model) -> keras.Model:
    """Makes every batch normalization of a model use the statistics of all ranks' batches.

    For batches too small to have statistics of their own. N ranks with batches of B then normalize
    as one process does with N·B, and gradients flow through the other ranks' batches. The layers
    stay what they are: what is saved is plain Keras, and has to be synchronized again when it is
    loaded to be trained on. Not compiled by XLA. With one worker nothing is changed.

    Args:
        model: any Keras model; its inner models count.

    Returns:
        `model`.

    Raises:
        TypeError: it is no Keras model.
        ValueError: there is no batch normalization in it.
    """
    check_type("model", model, keras.Model)
    kind = keras.layers.BatchNormalization
    layers = [layer for layer in keras_private.sublayers(model) if isinstance(layer, kind)]
    if not layers:
        raise ValueError(f"{model.name!r} has no BatchNormalization to synchronize.")
    for layer in layers:
        _synchronize(layer)
    return model


def SyncBatchNormalization(  # noqa: N802 - Horovod's name
    fused: bool = False, **kwargs: Any
) -> keras.layers.BatchNormalization:
    """Makes a `keras.layers.BatchNormalization` that uses the statistics of all ranks' batches.

    Args:
        fused: False.
        kwargs: arguments of `keras.layers.BatchNormalization`.

    Returns:
        A layer, as `synchronize_batch_norm` leaves it.

    Raises:
        ValueError: `fused` is not False.

    >>> type(SyncBatchNormalization(momentum=0.9)).__name__
    'BatchNormalization'
    """
    if fused:
        raise ValueError("SyncBatchNormalization cannot be fused: leave fused=False.")
    layer = keras.layers.BatchNormalization(**kwargs)
    _synchronize(layer)
    return layer


def _synchronize(layer: keras.layers.BatchNormalization) -> None:
    number = restarts.numbered("batch_norm")  # counted by every rank, so that names agree
    alone = runtime.workers() == 1 and not runtime.is_elastic()
    if alone or hasattr(layer, _MARK):
        return

    def moments(inputs: Any, mask: Any) -> tuple[Any, Any]:
        mean, variance = original(inputs, mask)
        if runtime.workers() == 1:
            return mean, variance
        return _moments_of_all(
            mean, variance, _count(inputs, mask, mean), f"tfaccel_batch_norm{number}"
        )

    original = keras_private.replace_moments(layer, moments)
    setattr(layer, _MARK, True)


def _moments_of_all(mean: Any, variance: Any, count: Any, name: str) -> tuple[Any, Any]:
    """Combines each rank's moments as those of one batch (Chan 1979): no large squares cancel."""
    import tensorflow as tf

    from tfaccel.distributed.reduction import reduce_tensors

    def total(values: list[Any], what: str) -> list[Any]:
        # Sum, so that the gradient of every rank's loss comes back to each.
        return reduce_tensors(values, Sum, unique_name(None, f"{name}.{what}"))

    summed, samples = total([mean * count, count], "mean")
    whole = summed / samples
    (spread,) = total([(variance + tf.square(mean - whole)) * count], "variance")
    return whole, spread / samples


def _count(inputs: Any, mask: Any, mean: Any) -> Any:
    """How many values of each channel the moments are of; [] float."""
    import tensorflow as tf

    if mask is not None:
        return tf.reduce_sum(tf.cast(mask, mean.dtype))
    return tf.cast(tf.size(inputs) / tf.size(mean), mean.dtype)
