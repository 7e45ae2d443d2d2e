"""Batch normalization that can stop following its batches while it is trained on."""

from typing import Any

import keras
from keras import layers, ops

from tfaccel.core.checks import check_type


@keras.saving.register_keras_serializable("tfaccel")
class FreezableBatchNormalization(layers.BatchNormalization):
    """Batch normalization that goes over from the batch's statistics to its moving ones.

    A quantized model computes with the moving statistics, folded into the convolution before. From
    the moment that `freeze_statistics` is called, training does so as well, and they no longer
    move; gamma and beta train on (Krishnamoorthi 2018, section 3.2.2). The switch is a weight, so
    that it is saved with the model and needs no new compilation.
    """

    def build(self, input_shape: Any) -> None:
        """Makes the weights, and the switch."""
        super().build(input_shape)
        self.frozen = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False, name="frozen"
        )

    @classmethod
    def like(cls, norm: Any) -> "FreezableBatchNormalization":
        """Returns one that does what a built `BatchNormalization` does, with its weights.

        Raises:
            ValueError: it renormalizes.
        """
        check_type("norm", norm, layers.BatchNormalization)
        if getattr(norm, "renorm", False):
            raise ValueError(
                f"{norm.name!r} renormalizes its batches (renorm=True), which follows the moving "
                "statistics already. Make it plain."
            )
        new = cls.from_config(norm.get_config())
        _take_over(norm, new)
        return new

    def freeze_statistics(self) -> None:
        """Makes training use the moving statistics from the next batch on."""
        self.frozen.assign(1)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalizes `inputs` [batch, ..., channels]."""
        if not (training and self.trainable):
            return super().call(inputs, training=False, mask=mask)
        values = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))
        if self._has_operator(values, mask):
            outputs, now = self._normalize_fused(values)
        else:
            outputs, now = self._normalize(values, mask)
        for variable, value in zip((self.moving_mean, self.moving_variance), now, strict=True):
            before = ops.convert_to_tensor(variable)
            # Frozen, what is seen now is what was there before.
            variable.assign(before + (1.0 - self.momentum) * (value - before))
        return ops.cast(outputs, self.compute_dtype)

    def _has_operator(self, values: Any, mask: Any) -> bool:
        """Whether TensorFlow normalizes such values in one operator."""
        rank = len(values.shape)
        return (
            keras.backend.backend() == "tensorflow"
            and keras.backend.standardize_dtype(values.dtype) == "float32"
            and rank == 4
            and self.axis % rank == 3
            and mask is None
            and not self.synchronized
        )

    def _factors(self, values: Any) -> tuple[Any, Any]:
        return (
            ops.cast(self.gamma, values.dtype) if self.scale else None,
            ops.cast(self.beta, values.dtype) if self.center else None,
        )

    def _normalize(self, values: Any, mask: Any) -> tuple[Any, tuple[Any, Any]]:
        """Returns the normalized values, and the mean and variance that were used."""
        axes = [a for a in range(len(values.shape)) if a != self.axis % len(values.shape)]
        if mask is None:
            seen = ops.moments(values, axes, synchronized=self.synchronized)
        else:
            seen = _masked_moments(values, mask, axes)
        still = ops.convert_to_tensor(self.frozen) > 0
        mean, variance = (
            ops.where(still, ops.convert_to_tensor(variable), moment)
            for variable, moment in zip((self.moving_mean, self.moving_variance), seen, strict=True)
        )
        gamma, beta = self._factors(values)
        outputs = ops.batch_normalization(
            values, mean, variance, self.axis, beta, gamma, self.epsilon
        )
        return outputs, (mean, variance)

    def _normalize_fused(self, values: Any) -> tuple[Any, tuple[Any, Any]]:
        """Returns the same by TensorFlow's operator for images, which is several times as fast."""
        import tensorflow as tf

        gamma, beta = self._factors(values)
        channels = values.shape[-1]
        gamma = tf.ones([channels]) if gamma is None else gamma
        beta = tf.zeros([channels]) if beta is None else beta
        moving = [tf.convert_to_tensor(v) for v in (self.moving_mean, self.moving_variance)]

        def by_batch() -> tuple[Any, Any, Any]:
            outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
                x=values, scale=gamma, offset=beta, mean=[], variance=[], epsilon=self.epsilon
            )
            # The operator gives the variance of a sample, of n - 1; Keras keeps that of all n.
            count = tf.cast(tf.size(values) // channels, variance.dtype)
            return outputs, mean, variance * ((count - 1) / count)

        def by_moving() -> tuple[Any, Any, Any]:
            outputs, *_ = tf.raw_ops.FusedBatchNormV3(
                x=values,
                scale=gamma,
                offset=beta,
                mean=moving[0],
                variance=moving[1],
                epsilon=self.epsilon,
                is_training=False,
            )
            return outputs, moving[0], moving[1]

        still = tf.convert_to_tensor(self.frozen) > 0
        outputs, mean, variance = tf.cond(still, by_moving, by_batch)
        return outputs, (mean, variance)

    def strip_layer(self) -> layers.BatchNormalization:
        """Returns the plain layer."""
        plain = layers.BatchNormalization.from_config(self.get_config())
        _take_over(self, plain)
        return plain


def _masked_moments(values: Any, mask: Any, axes: list[int]) -> tuple[Any, Any]:
    """Returns mean and variance of the samples [batch, ...] that the mask holds for."""
    weights = ops.broadcast_to(ops.expand_dims(ops.cast(mask, values.dtype), -1), values.shape)
    count = ops.sum(weights, axes) + keras.backend.epsilon()
    mean = ops.sum(values * weights, axes) / count
    return mean, ops.sum(ops.square(values - mean) * weights, axes) / count


def _take_over(source: Any, target: Any) -> None:
    target.build_from_config(source.get_build_config())
    target.trainable = source.trainable
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        variable = getattr(source, name, None)
        if variable is not None:
            own = getattr(target, name)
            own.assign(ops.copy(variable.value))
            if own.trainable != variable.trainable:
                own.trainable = variable.trainable
