"""Labels that not every sample has, skipped by losses and metrics.

A missing label is -1 in integers and NaN in floats, in any place of a label's array.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import keras

from tfaccel.core.checks import check_type

# What a loss sees instead of a missing label. One is a class, a probability, a sign and a divisor,
# so that no loss makes infinities of it, which would be NaN once multiplied by a weight of zero.
_STAND_IN = 1


def skip_missing(
    loss_or_metric: keras.losses.Loss | keras.metrics.Metric, *, elementwise: bool = False
) -> Any:
    """Returns a loss or metric that takes samples without a label for samples of weight zero.

    The loss's own `reduction` says what a mean is over. With Keras's default,
    "sum_over_batch_size", it is over the batch: each label counts the same, in whichever batch it
    is, and a batch without labels gives 0. With "mean_with_sample_weight" it is over the labels
    that are there: each batch counts the same. Metrics are over the labels that are there.

    Labels are missing where integers are -1 or floats NaN. A label that is an array itself (one-hot
    classes, several targets) is missing if any entry is.

    Args:
        loss_or_metric: an instance, of any class that takes sample weights.
        elementwise: the entries of a label are labels of their own and missing on their own, as in
            multi-label classification: the loss is taken entry by entry. Labels and outputs have
            the same shape then, [batch, ..., labels].

    Returns:
        A `keras.losses.Loss` or `keras.metrics.Metric`, of the same name.

    Raises:
        TypeError: it is neither, or it takes no sample weights.

    >>> import numpy as np
    >>> loss = skip_missing(keras.losses.MeanAbsoluteError())
    >>> float(loss(np.array([[1.0], [np.nan]]), np.array([[3.0], [5.0]])))
    1.0
    >>> metric = skip_missing(keras.metrics.MeanAbsoluteError())
    >>> float(metric(np.array([[1.0], [np.nan]]), np.array([[3.0], [5.0]])))
    2.0
    """
    if isinstance(loss_or_metric, (SkipMissing, SkipMissingInMetric)):
        return loss_or_metric
    if isinstance(loss_or_metric, keras.metrics.Metric):
        return SkipMissingInMetric(loss_or_metric, elementwise)
    if isinstance(loss_or_metric, keras.losses.Loss):
        return SkipMissing(loss_or_metric, elementwise)
    raise TypeError(
        "skip_missing() needs an instance of a Keras loss or metric, but got "
        f"{loss_or_metric!r}. Give keras.losses.SparseCategoricalCrossentropy(from_logits=True), "
        "for example, rather than its name."
    )


@keras.saving.register_keras_serializable("tfaccel")
class SkipMissing(keras.losses.Loss):
    """The loss that `skip_missing` returns.

    Args:
        loss: a loss with one value for each sample.
        elementwise: whether entries of a label are missing on their own.
    """

    def __init__(self, loss: keras.losses.Loss, elementwise: bool = False) -> None:
        check_type("loss", loss, keras.losses.Loss)
        if type(loss).__call__ is not keras.losses.Loss.__call__:
            raise TypeError(
                f"skip_missing() weighs the values that a loss's call() gives, but "
                f"{type(loss).__name__} defines __call__() too. Move what it does to call()."
            )
        super().__init__(name=loss.name, reduction=loss.reduction, dtype=loss.dtype)
        self.loss = loss
        self.elementwise = elementwise

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Returns the loss of the samples that have a label.

        Args:
            y_true: labels, [batch, ...], some of them missing.
            y_pred: outputs, [batch, ..., units].
            sample_weight: [batch, ...].
        """
        arguments = _weighted(y_true, y_pred, sample_weight, self.elementwise)
        return super().__call__(*arguments)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns one value for each sample, or for each entry of its label."""
        values = self.loss.call(y_true, y_pred)
        if len(values.shape) != len(y_pred.shape) - 1:
            raise ValueError(
                f"skip_missing() needs a loss with a value for each sample, but {self.name!r} "
                f"makes values of shape {tuple(values.shape)} of outputs of shape "
                f"{tuple(y_pred.shape)}. A loss of a whole batch cannot leave samples out."
            )
        return values

    def get_config(self) -> dict[str, Any]:
        """Returns the loss, serialized."""
        return {
            "loss": keras.saving.serialize_keras_object(self.loss),
            "elementwise": self.elementwise,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "SkipMissing":
        """Returns the loss that `get_config` described."""
        return cls(keras.saving.deserialize_keras_object(config["loss"]), config["elementwise"])


@keras.saving.register_keras_serializable("tfaccel")
class SkipMissingInMetric(keras.metrics.Metric):
    """The metric that `skip_missing` returns.

    Args:
        metric: a metric that takes sample weights.
        elementwise: whether entries of a label are missing on their own.
    """

    def __init__(self, metric: keras.metrics.Metric, elementwise: bool = False) -> None:
        check_type("metric", metric, keras.metrics.Metric)
        if "sample_weight" not in inspect.signature(metric.update_state).parameters:
            raise TypeError(
                f"skip_missing() gives weight 0 to a sample without label, but {metric.name!r} "
                "takes no sample weights. Its update_state() needs the argument sample_weight."
            )
        super().__init__(name=metric.name, dtype=metric.dtype)
        self.metric = metric
        self.elementwise = elementwise

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Takes account of the samples that have a label.

        Args:
            y_true: labels, [batch, ...], some of them missing.
            y_pred: outputs, [batch, ..., units].
            sample_weight: [batch, ...].
        """
        self.metric.update_state(*_weighted(y_true, y_pred, sample_weight, self.elementwise))

    def result(self) -> Any:
        """Returns what the metric says of the samples with labels."""
        return self.metric.result()

    def reset_state(self) -> None:
        """Forgets all samples."""
        self.metric.reset_state()

    def get_config(self) -> dict[str, Any]:
        """Returns the metric, serialized."""
        return {
            "metric": keras.saving.serialize_keras_object(self.metric),
            "elementwise": self.elementwise,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "SkipMissingInMetric":
        """Returns the metric that `get_config` described."""
        return cls(keras.saving.deserialize_keras_object(config["metric"]), config["elementwise"])


def is_missing(labels: Any) -> Any:
    """Returns where labels are missing: -1 in integers, NaN in floats.

    Args:
        labels: a tensor.

    Returns:
        bool, of the same shape.
    """
    dtype = keras.backend.standardize_dtype(labels.dtype)
    if keras.backend.is_float_dtype(dtype):
        return keras.ops.isnan(labels)
    if dtype.startswith("int"):
        return keras.ops.equal(labels, -1)
    return keras.ops.zeros_like(labels, dtype="bool")  # unsigned or bool: there is no -1


def fill_missing(labels: Any) -> Any:
    """Returns labels with a number for each missing one, so that nothing is made of NaN.

    Args:
        labels: a tensor.

    Returns:
        A tensor of the same shape and type.
    """
    stand_in = keras.ops.cast(_STAND_IN, labels.dtype)
    return keras.ops.where(is_missing(labels), stand_in, labels)


def weight_of_labelled(labels: Any, sample_weight: Any = None, rank: int = 1) -> Any:
    """Returns sample weights that are zero where labels are missing.

    Args:
        labels: [batch, ...].
        sample_weight: [batch, ...] or None.
        rank: of what is to be weighed, [batch, ...]; a label's further axes are one label.

    Returns:
        float32 of that rank.
    """
    ops = keras.ops
    missing = is_missing(labels)
    while len(missing.shape) > rank:
        missing = ops.any(missing, axis=-1)
    weight = ops.cast(ops.logical_not(missing), "float32")
    if sample_weight is None:
        return weight
    given = ops.cast(sample_weight, "float32")
    if len(given.shape) > len(weight.shape) and given.shape[-1] == 1:
        given = ops.squeeze(given, axis=-1)
    while len(given.shape) < len(weight.shape):
        given = ops.expand_dims(given, axis=-1)
    return weight * given


def _weighted(y_true: Any, y_pred: Any, sample_weight: Any, elementwise: bool) -> tuple[Any, ...]:
    """Returns labels without gaps, outputs, and weights that are zero where the gaps were."""
    ops = keras.ops
    y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
    if len(y_pred.shape) == 1:
        y_pred = ops.expand_dims(y_pred, axis=-1)
        y_true = ops.expand_dims(y_true, axis=-1) if len(y_true.shape) == 1 else y_true
    if elementwise:
        if len(y_true.shape) != len(y_pred.shape):
            raise ValueError(
                "skip_missing(elementwise=True) needs labels of the outputs' shape, but got "
                f"{tuple(y_true.shape)} for outputs of {tuple(y_pred.shape)}. Leave it out if a "
                "sample has one label."
            )
        y_true, y_pred = (ops.expand_dims(each, axis=-1) for each in (y_true, y_pred))
    weight = weight_of_labelled(y_true, sample_weight, rank=len(y_pred.shape) - 1)
    return fill_missing(y_true), y_pred, weight
