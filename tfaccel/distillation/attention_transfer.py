"""Attention transfer: where a network looks, not what it sees there."""

import dataclasses
from typing import Any

import keras

from tfaccel.core.checks import check_in, check_positive
from tfaccel.distillation.feature_losses import FeatureLoss
from tfaccel.distillation.feature_math import RESIZES, equal_positions, flattened, unit_rows
from tfaccel.distillation.losses import weighted_mean


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class AttentionTransfer(FeatureLoss):
    """How far the student's spatial attention map is from the teacher's (Zagoruyko 2017, eq. 2).

    loss = mean over samples of ‖Q(teacher) / ‖Q(teacher)‖ - Q(student) / ‖Q(student)‖‖²

    Q is the mean of |activation|^power over channels, one number for each position, so that the
    numbers of channels may differ. Features are [batch, height, width, channels] or [batch, time,
    features]; where resolutions differ the larger is brought to the smaller on each axis, before Q.
    Each term is between 0 and 2, whatever the resolution. (The authors' code takes the mean over
    positions instead of the sum, with a weight of 1000: at 8 by 8 as much as 1000 / 64 here.)

    Args:
        teacher_layer_name: None for the model's output.
        student_layer_name: None for the model's output.
        head_name: unused; there is nothing to learn.
        power: of the activations; the higher, the more the strongest positions count.
        resize: "average" (adaptive average pooling) or "bilinear".

    Raises:
        ValueError: the power is not above 0, or there is no such way to resize.

    >>> here, there = keras.ops.array([[[5.0], [0.0]]]), keras.ops.array([[[0.0], [1.0]]])
    >>> float(AttentionTransfer().compute_loss(here, there))
    2.0
    """

    power: float = 2.0
    resize: str = "average"

    def __post_init__(self) -> None:
        check_positive("power", self.power)
        check_in("resize", self.resize, RESIZES)

    def compute_loss(
        self, teacher_outputs: Any, student_outputs: Any, *, sample_weight: Any = None, **_: Any
    ) -> Any:
        """Returns the loss.

        Args:
            teacher_outputs: [batch, ..., channels].
            student_outputs: [batch, ..., channels], other sizes along all axes but the first.
            sample_weight: [batch] or None.

        Returns:
            [] float32.

        Raises:
            ValueError: a feature has no positions.
        """
        ops = keras.ops
        if len(student_outputs.shape) < 3:
            raise ValueError(
                "Attention needs positions, [batch, height, width, channels] or [batch, time, "
                f"features], but the student's feature is {tuple(student_outputs.shape)}. Name "
                "layers before pooling."
            )
        both = equal_positions(
            ops.cast(teacher_outputs, "float32"), ops.cast(student_outputs, "float32"), self.resize
        )
        teacher, student = (unit_rows(flattened(self._map(feature))) for feature in both)
        return weighted_mean(ops.sum(ops.square(teacher - student), axis=-1), sample_weight)

    def _map(self, feature: Any) -> Any:
        ops = keras.ops
        # A square has a gradient at 0, where that of |x|^power is a NaN.
        powers = ops.square(feature) if self.power == 2 else ops.abs(feature) ** self.power
        return ops.mean(powers, axis=-1)
