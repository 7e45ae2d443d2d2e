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
        axes = [a for a in range(len(inputs.shape)) if a != self.axis % len(inputs.shape)]
        if mask is None:
            moments = ops.moments(values, axes, synchronized=self.synchronized)
        else:
            moments = _masked_moments(values, mask, axes)
        still = ops.convert_to_tensor(self.frozen) > 0
        share = ops.where(still, 0.0, 1.0 - self.momentum)
        used = []
        for variable, now in zip((self.moving_mean, self.moving_variance), moments, strict=True):
            before = ops.convert_to_tensor(variable)
            used.append(ops.where(still, before, now))
            variable.assign(before + share * (now - before))
        outputs = ops.batch_normalization(
            values,
            *used,
            axis=self.axis,
            offset=ops.cast(self.beta, values.dtype) if self.center else None,
            scale=ops.cast(self.gamma, values.dtype) if self.scale else None,
            epsilon=self.epsilon,
        )
        return ops.cast(outputs, self.compute_dtype)

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
