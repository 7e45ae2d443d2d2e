"""What losses on the inside of two networks share."""

import dataclasses
import difflib
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.checks import check_type
from tfaccel.core.configurable import Configurable


@dataclasses.dataclass(frozen=True)
class FeatureLoss(Configurable, keras.distillation.DistillationLoss):
    """Base of losses that compare an output of a teacher's layer with one of a student's.

    A subclass is a frozen dataclass without state. What it learns (a projection for unequal shapes)
    or remembers (a memory bank) is its *head*, a Keras layer: the `Distiller` makes it once, trains
    and saves it with the student, and hands it back with each batch.

    Args:
        teacher_layer_name: of a layer that `teacher.get_layer` finds; None for the model's output.
        student_layer_name: likewise of the student.
        head_name: losses that give the same name share one head; None for one of its own.
    """

    teacher_layer_name: str | None = None
    student_layer_name: str | None = None
    head_name: str | None = None

    def make_head(self, teacher_shape: Any, student_shape: Any) -> keras.layers.Layer | None:  # noqa: ARG002
        """Returns a built layer with what the loss learns or remembers, None if there is nothing.

        Args:
            teacher_shape: of the teacher's feature, the batch first, as None.
            student_shape: likewise.
        """
        return None

    def compute_loss(
        self,
        teacher_outputs: Any,
        student_outputs: Any,
        *,
        head: keras.layers.Layer | None = None,
        sample_weight: Any = None,
        labels: Any = None,
        sample_index: Any = None,
        training: bool = True,
        **_: Any,
    ) -> Any:
        """Returns the loss of a batch.

        Args:
            teacher_outputs: the teacher's feature, [batch, ...].
            student_outputs: the student's.
            head: what `make_head` returned for their shapes.
            sample_weight: [batch] or None.
            labels: y as `fit` got it, or None.
            sample_index: [batch] int, which training sample each is, or None.
            training: whether this is a training step.

        Returns:
            [] float32.
        """
        raise NotImplementedError(f"{type(self).__name__} must define compute_loss().")

    def validate_model_compatibility(self, teacher: keras.Model, student: keras.Model) -> None:
        """Checks that both models have the layers that are named.

        Raises:
            TypeError: a name is no text.
            ValueError: a layer is missing, or its model is subclassed and has no graph to look at.
        """
        for role, model, name in (
            ("teacher", teacher, self.teacher_layer_name),
            ("student", student, self.student_layer_name),
        ):
            if name is not None:
                check_type(f"{role}_layer_name", name, str)
                check_layer_name(role, model, name)


def check_layer_name(role: str, model: keras.Model, name: str) -> None:
    """Checks that a model has a layer of a name, whose output can be looked at.

    Raises:
        ValueError: there is none, or the model has no graph.
    """
    if not keras_private.has_graph(model):
        raise ValueError(
            f"The {role} {model.name!r} is a subclassed {type(model).__name__}, so that "
            f"{role}_layer_name={name!r} cannot be looked up in a graph. Make it with "
            "keras.Model(inputs, outputs), or compare the outputs of the models."
        )
    names = [layer.name for layer in model.layers]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        meant = (
            f"Did you mean {' or '.join(map(repr, close))}?" if close else "See model.summary()."
        )
        raise ValueError(
            f"The {role} {model.name!r} has no layer {name!r} ({role}_layer_name). {meant}"
        )
