"""FitNets: the student's features, sent through a learned regressor, shall be the teacher's."""

import dataclasses
from typing import Any

import keras

from tfaccel.core.checks import check_in
from tfaccel.distillation.feature_losses import FeatureLoss
from tfaccel.distillation.feature_math import RESIZES, check_same_rank, equal_positions
from tfaccel.distillation.losses import weighted_mean

_REGRESSORS = ("auto", "linear", "conv", None)


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class HintLoss(FeatureLoss):
    """How well a regressor of the student's feature predicts the teacher's (Romero 2015, eq. 3).

    loss = mean over samples, positions and channels of (teacher - regressor(student))²

    Features are [batch, height, width, channels], [batch, time, features] or [batch, features],
    both of one kind. Where resolutions or lengths differ, the larger is brought to the smaller, on
    each axis by itself (`resize`), before the regressor. The regressor then maps the student's
    channels to the teacher's; it is trained with the student, and dropped with the distiller. The
    paper's convolves without padding until the resolutions agree; for the two of most pairs of
    networks there is no such kernel, so it is pooling here.

    Args:
        teacher_layer_name: of the hint; None for the model's output.
        student_layer_name: of the guided layer.
        head_name: losses that give the same name share one regressor.
        regressor: "linear" (each position by itself, as a 1x1 convolution), "conv" (3x3, or 3 along
            time), "auto" ("linear" if the numbers of channels differ, else none), or None.
        resize: "average" (adaptive average pooling) or "bilinear".

    Raises:
        ValueError: a regressor or way to resize that there is not.

    >>> loss = HintLoss("deep", "shallow")
    >>> head = loss.make_head((None, 4, 4, 16), (None, 8, 8, 3))
    >>> tuple(head.kernel.shape)
    (3, 16)
    >>> wide, narrow = keras.ops.ones((2, 4, 4, 16)), keras.ops.zeros((2, 8, 8, 3))
    >>> float(loss.compute_loss(wide, narrow, head=head))
    1.0
    """

    regressor: str | None = "auto"
    resize: str = "average"

    def __post_init__(self) -> None:
        check_in("regressor", self.regressor, _REGRESSORS)
        check_in("resize", self.resize, RESIZES)

    def make_head(self, teacher_shape: Any, student_shape: Any) -> keras.layers.Layer | None:
        """Returns the regressor, None where there is none.

        Raises:
            ValueError: the features are of different kinds, or of different numbers of channels
                though regressor=None.
        """
        check_same_rank(teacher_shape, student_shape)
        wanted, given = teacher_shape[-1], student_shape[-1]
        if wanted is None or given is None:
            raise ValueError(
                "A hint needs known numbers of channels, but the teacher's feature is "
                f"{tuple(teacher_shape)} and the student's {tuple(student_shape)}."
            )
        if self.regressor is None and wanted != given:
            raise ValueError(
                f"regressor=None needs features of as many channels, but the teacher's has {wanted}"
                f' and the student\'s {given}. Take regressor="auto".'
            )
        if self.regressor is None or (self.regressor == "auto" and wanted == given):
            return None
        positions = len(student_shape) - 2
        if self.regressor != "conv":
            head = keras.layers.Dense(wanted, dtype="float32", name="regressor")
        elif positions in (1, 2):
            kind = keras.layers.Conv1D if positions == 1 else keras.layers.Conv2D
            head = kind(
                wanted,
                3,
                padding="same",
                data_format="channels_last",
                dtype="float32",
                name="regressor",
            )
        else:
            raise ValueError(
                'regressor="conv" needs features [batch, time, features] or [batch, height, width, '
                f'channels], but the student\'s is {tuple(student_shape)}. Take "linear".'
            )
        head.build((None, *([None] * positions), given))
        return head

    def compute_loss(
        self,
        teacher_outputs: Any,
        student_outputs: Any,
        *,
        head: keras.layers.Layer | None = None,
        sample_weight: Any = None,
        **_: Any,
    ) -> Any:
        """Returns the loss.

        Args:
            teacher_outputs: [batch, ..., channels].
            student_outputs: [batch, ..., channels], other sizes along all axes but the first.
            head: the regressor.
            sample_weight: [batch], or [batch, time] for features of as many steps.

        Returns:
            [] float32.
        """
        ops = keras.ops
        teacher, student = equal_positions(
            ops.cast(teacher_outputs, "float32"), ops.cast(student_outputs, "float32"), self.resize
        )
        if head is not None:
            student = head(student)
        if teacher.shape[-1] != student.shape[-1]:
            raise ValueError(
                f"The teacher's feature {tuple(teacher.shape)} and the student's "
                f"{tuple(student.shape)} have different channels. Pass head=loss.make_head(...) "
                "of their shapes, as the Distiller does."
            )
        return weighted_mean(ops.square(teacher - student), sample_weight)
