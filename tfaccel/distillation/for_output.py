"""Losses of one among several outputs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.checks import check_type
from tfaccel.core.configurable import Configurable
from tfaccel.distillation.arguments import check_same_shapes
from tfaccel.distillation.losses import OutputLoss
from tfaccel.distillation.missing import fill_missing, weight_of_labelled


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class LabelLoss(Configurable, keras.distillation.DistillationLoss):
    """The student's loss on labels, in the place of a distillation loss where there is no teacher.

    A distiller gives labels the weight alpha. With this loss beside the student's own, a task
    without a teacher learns with weight alpha + (1 - alpha) = 1.

    Args:
        loss: of labels and the student's outputs.
    """

    needs_teacher = False

    loss: keras.losses.Loss

    def __post_init__(self) -> None:
        check_type("loss", self.loss, keras.losses.Loss)

    def compute_loss(
        self,
        teacher_outputs: Any,  # noqa: ARG002
        student_outputs: Any,
        *,
        labels: Any = None,
        sample_weight: Any = None,
        **_: Any,
    ) -> Any:
        """Returns the loss of a batch.

        Args:
            teacher_outputs: not looked at.
            student_outputs: [batch, ...].
            labels: [batch, ...].
            sample_weight: [batch, ...].
        """
        if labels is None:
            raise ValueError("LabelLoss needs labels, but the batch has none. Pass y to fit().")
        return self.loss(labels, student_outputs, sample_weight=sample_weight)

    def validate_outputs(self, teacher_outputs: Any, student_outputs: Any) -> None:
        """Accepts all: there is nothing to compare."""


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class ForOutput(Configurable, keras.distillation.DistillationLoss):
    """A distillation loss for one of several outputs.

    It takes its part of the teacher's outputs, the student's, the labels and the sample weights,
    wherever these are a dict or list, and hands them to the loss.

    Args:
        output: key or position of the output.
        loss: any distillation loss on outputs.
        only_labelled: whether samples without a label of this output (-1 or NaN, see
            `skip_missing`) count nothing here too, as when each task is trained on its own data.
            Otherwise all samples learn from the teacher, but for losses that look at labels.

    Raises:
        TypeError: the loss is no distillation loss.
        ValueError: the loss looks at a layer instead of an output.

    >>> import numpy as np
    >>> loss = ForOutput("shape", keras.distillation.LogitsDistillation(loss="mse"))
    >>> teacher, student = {"shape": np.zeros((1, 2))}, {"shape": np.zeros((1, 2)), "color": None}
    >>> float(loss.compute_loss(teacher, student))
    0.0
    """

    output: str | int
    loss: keras.distillation.DistillationLoss
    only_labelled: bool = False

    def __post_init__(self) -> None:
        check_type("output", self.output, (str, int))
        check_type("loss", self.loss, keras.distillation.DistillationLoss)
        for role in ("teacher", "student"):
            layer = getattr(self.loss, f"{role}_layer_name", None)
            if layer is not None:
                raise ValueError(
                    f"ForOutput() is for losses on outputs, but this one looks at the {role}'s "
                    f"layer {layer!r}. Give it to the Distiller as it is."
                )

    @property
    def head_name(self) -> str | None:
        """Name of the head that the loss shares with others."""
        return getattr(self.loss, "head_name", None)

    @property
    def make_head(self) -> Any:
        """The loss's own `make_head`, for the shapes of this output; no attribute without one."""
        make = self.loss.make_head
        return lambda *shapes: make(*(_part_of_shapes(each, self.output) for each in shapes))

    def compute_loss(
        self,
        teacher_outputs: Any,
        student_outputs: Any,
        *,
        labels: Any = None,
        sample_weight: Any = None,
        **options: Any,
    ) -> Any:
        """Returns the loss of a batch.

        Args:
            teacher_outputs: tensors [batch, ...] by name or position, or the one tensor.
            student_outputs: likewise.
            labels: likewise, or None.
            sample_weight: likewise, or one tensor for all outputs.
            options: for the loss.

        Raises:
            ValueError: there is no such output, or labels are needed and there are none.
        """
        taught, learnt = self._parts(teacher_outputs, student_outputs)
        if isinstance(labels, Mapping):  # where no sample has a label, its key may be missing too
            labels = labels.get(self.output)
        labels = _part(labels, self.output, "labels")
        sample_weight = _part(sample_weight, self.output, "sample weights")
        if self.only_labelled and labels is None:
            raise ValueError(
                f"ForOutput({self.output!r}, ..., only_labelled=True) needs labels, but the batch "
                "has none. Pass y to fit()."
            )
        if labels is not None and (self.only_labelled or getattr(self.loss, "needs_labels", False)):
            labels = keras.ops.convert_to_tensor(labels)
            rank = max(len(learnt.shape) - 1, 1)
            sample_weight = weight_of_labelled(labels, sample_weight, rank)
            labels = fill_missing(labels)
        return self.loss.compute_loss(
            taught, learnt, labels=labels, sample_weight=sample_weight, **options
        )

    def validate_outputs(self, teacher_outputs: Any, student_outputs: Any) -> None:
        """Checks what the loss does, on this output."""
        self.loss.validate_outputs(*self._parts(teacher_outputs, student_outputs))

    def validate_model_compatibility(self, teacher: keras.Model, student: keras.Model) -> None:
        """Checks what the loss does, on models with this output alone.

        Raises:
            ValueError: there is no such output, or it does not suit the loss.
        """
        if not (keras_private.has_graph(teacher) and keras_private.has_graph(student)):
            return
        parts = self._parts(*(keras_private.functional_of(m).output for m in (teacher, student)))
        if parts[0] is None:
            return
        alone = [
            keras.Model(keras_private.functional_of(model).input, part, name=model.name)
            for model, part in zip((teacher, student), parts, strict=True)
        ]
        self.loss.validate_model_compatibility(*alone)
        if isinstance(self.loss, OutputLoss):
            check_same_shapes("output", *alone)

    def _parts(self, teacher_outputs: Any, student_outputs: Any) -> tuple[Any, Any]:
        taught = None
        if getattr(self.loss, "needs_teacher", True):
            taught = _part(teacher_outputs, self.output, "teacher's outputs")
        return taught, _part(student_outputs, self.output, "student's outputs")


def _part(structure: Any, output: str | int, what: str) -> Any:
    """Returns an output's part of a dict or list; what is neither is the part."""
    if isinstance(structure, Mapping):
        names: Sequence[Any] = list(structure)
    elif isinstance(structure, (list, tuple)):
        names = range(len(structure))
    else:
        return structure
    if output not in names:
        raise ValueError(
            f"There is no {output!r} among the {what}: they are {', '.join(map(repr, names))}. "
            "Name one of these."
        )
    return structure[output]


def _part_of_shapes(shapes: Any, output: str | int) -> Any:
    """Returns an output's shape, of several shapes or of the one."""
    one = isinstance(shapes, (list, tuple)) and not any(
        isinstance(each, (list, tuple)) for each in shapes
    )
    return shapes if one else _part(shapes, output, "outputs")
