"""Students that learn from one another."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tfaccel.core.checks import check_type
from tfaccel.distillation.arguments import Weight, check_built, check_same_shapes, serialize_weight
from tfaccel.distillation.batches import read_batch
from tfaccel.distillation.distiller import Distiller
from tfaccel.distillation.losses import LogitDistillation


@keras.saving.register_keras_serializable("tfaccel")
class MutualLearning(Distiller):
    """Trains several students at once, each on labels and on what its peers say (Zhang 2018).

    loss of student k = its own loss + weight · 1/(K - 1) · Σ over peers l of KL(pₗ ‖ pₖ)

    The students' losses are added and minimized in one step by one optimizer; what a peer says
    counts as a constant, so that each student's gradient is that of its own loss. That is the
    paper's algorithm with all students updated at the same time. Clipping by a global norm would
    couple the students.

    `compile` and `fit` it as you would one of them. Predictions and compiled metrics are those of
    the first student; `student_1_loss`, ... in the history are the own loss of each, `student_loss`
    is their sum and `distillation_loss` that of the divergences. Then take `.students`, plain
    models. All of them are saved with it and train on when it is loaded.

    Args:
        students: two or more built models of the same input and output shapes, which give logits.
            They may differ in size, and begin from different weights.
        weight: of the divergences, a number or a Keras learning-rate schedule.
        temperature: of the divergences, times its square as in `LogitDistillation`; the paper's
            is 1.
        name: of the model.

    Raises:
        TypeError: a student is no Keras model.
        ValueError: there are fewer than two, one comes twice or is not built, their shapes differ,
            one gives probabilities, or an argument makes no sense.

    Example:
        >>> layers = lambda n: [keras.layers.Dense(n, activation="relu"), keras.layers.Dense(3)]
        >>> pair = [keras.Sequential([keras.Input((4,)), *layers(n)]) for n in (8, 6)]
        >>> mutual = MutualLearning(pair)
        >>> mutual.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> x, y = keras.random.normal((8, 4)), keras.ops.zeros(8)
        >>> history = mutual.fit(x, y, verbose=0).history
        >>> [student.output_shape for student in mutual.students]
        [(None, 3), (None, 3)]
    """

    _latest: Any

    def __init__(
        self,
        students: Sequence[keras.Model],
        *,
        weight: Weight = 1.0,
        temperature: float = 1.0,
        name: str = "mutual_learning",
        **kwargs: Any,
    ) -> None:
        check_type("students", students, (list, tuple))
        if len({id(student) for student in students}) < max(len(students), 2):
            raise ValueError(
                f"Mutual learning needs two different students or more, but got {len(students)}"
                + (" of which one comes twice." if len(students) > 1 else ".")
            )
        divergence = LogitDistillation(temperature)
        for student in students:
            check_type("students", student, keras.Model)
            check_built("student", student)
            divergence.validate_model_compatibility(students[0], student)
            for side in ("input", "output"):
                check_same_shapes(side, students[0], student)
        # Of the two terms that alpha weighs, the own loss of the first student is the one in full.
        super().__init__(
            None,
            students[0],
            alpha=1.0,
            losses=divergence,
            loss_weights=[weight],
            name=name,
            **kwargs,
        )
        self.students = list(students)
        self.student_trackers = [
            keras.metrics.Mean(name=f"student_{number + 1}_loss") for number in range(len(students))
        ]

    def call(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Returns the outputs of the first student; in training, runs the others too."""
        if not training:
            return self.student(read_batch(inputs).inputs, training=training, **kwargs)
        outputs = self._ask(inputs, self.students, training)
        # For compute_loss, which follows. Keras counts the losses of layers that run in here.
        self._latest = outputs
        return outputs[0]

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Returns the sum of all students' losses.

        Args:
            x: a batch of inputs.
            y: its labels.
            y_pred: the first student's outputs.
            sample_weight: weights of the samples, in both terms.
            training: whether this is a training step.
        """
        if y_pred is None:
            y_pred = self(x, training=training)
        outputs, self._latest = self._latest, None
        if outputs is None or _first(outputs) is not _first(y_pred):
            outputs = [y_pred, *self._ask(x, self.students[1:], training)]
        everything = _regularization(self)
        owns = []
        for student, output in zip(self.students, outputs, strict=True):
            # Keras adds the regularizers of all students to each.
            own = keras.Model.compute_loss(self, x, y, output, sample_weight, training)
            owns.append(own - everything + _regularization(student))
        own, divergence = sum(owns), self._divergence(outputs, sample_weight)
        total = own + self._at_this_batch(self.distillation_loss_weights[0]) * divergence
        if training and self.batches_seen is not None:
            self.batches_seen.assign_add(1)
        size = keras.ops.shape(_first(y_pred))[0]
        trackers = (
            self.student_loss_tracker,
            self.distillation_loss_tracker,
            self.total_loss_tracker,
            *self.student_trackers,
        )
        for tracker, value in zip(trackers, (own, divergence, total, *owns), strict=True):
            tracker.update_state(value, sample_weight=size)
        return total

    def _ask(self, x: Any, students: Sequence[keras.Model], training: bool) -> list[Any]:
        inputs = read_batch(x).inputs
        return [student(inputs, training=training) for student in students]

    def _divergence(self, outputs: list[Any], sample_weight: Any) -> Any:
        """Returns the sum over students of the mean divergence from their peers."""
        said = keras.tree.map_structure(keras.ops.stop_gradient, outputs)
        (loss,) = self.distillation_losses
        total = keras.ops.zeros(())
        for place, output in enumerate(outputs):
            for peer, taught in enumerate(said):
                if peer != place:
                    total = total + loss.compute_loss(taught, output, sample_weight=sample_weight)
        return total / (len(outputs) - 1)

    def _take_teacher(self, teacher: Any) -> None:
        if teacher is not None:
            raise ValueError(
                "In mutual learning the students teach one another, so that there is no teacher to "
                "set. Give a trained model to a Distiller."
            )
        super()._take_teacher(None)

    def get_config(self) -> dict[str, Any]:
        """Returns the students, serialized, and the other arguments."""
        serialize = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "dtype": serialize(self.dtype_policy),
            "students": [serialize(student) for student in self.students],
            "weight": serialize_weight(self.distillation_loss_weights[0]),
            "temperature": self.distillation_losses[0].temperature,
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> "MutualLearning":
        """Returns what `get_config` described."""
        restored = {
            key: keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
            if isinstance(value, (dict, list))
            else value
            for key, value in config.items()
        }
        return cls(**restored)


def _first(outputs: Any) -> Any:
    return keras.tree.flatten(outputs)[0]


def _regularization(model: keras.Model) -> Any:
    return sum((keras.ops.sum(loss) for loss in model.losses), start=keras.ops.zeros(()))
