"""A student that learns from labels and from a teacher."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.checks import check_fraction, check_type
from tfaccel.distillation.arguments import (
    Weight,
    check_built,
    check_same_shapes,
    is_schedule,
    list_losses,
    list_weights,
    serialize_weight,
)
from tfaccel.distillation.batches import Batch, StoredTeacher, read_batch
from tfaccel.distillation.extraction import FINAL, extract, layer_names, pick, shapes_of
from tfaccel.distillation.heads import make_heads, shapes_for_heads
from tfaccel.distillation.losses import OutputLoss

# Keras neither tracks nor saves these: the teacher is not a part of what is trained, and the
# extractors are made of the layers of teacher and student.
_OUTSIDE = ("teacher", "_teacher_extractor", "_student_extractor", "_latest")


@keras.saving.register_keras_serializable("tfaccel")
class Distiller(keras.distillation.Distiller):
    """Trains a student on labels and on a teacher's outputs (Hinton 2015).

    loss = alpha · (the student's own loss) + (1 - alpha) · (distillation losses) + regularization

    To Keras this model *is* the student: its weights, metrics, predictions and checkpoints are the
    student's, with those of the losses' heads (projections, memories) beside them. `compile` and
    `fit` it as you would the student (the loss gets the student's outputs, so mostly
    `from_logits=True`); sample weights count in both terms. Then take `.student`.

    The teacher runs as in inference and is not changed in any way, not even frozen. It is not saved
    either: a distiller that is loaded from a file evaluates (the student's own loss) and predicts;
    to train on, set its `teacher` again.

    The x of a batch is what the student takes, or `{"inputs": that, "sample_index": [batch],
    "teacher_outputs": what the teacher would say}`, the last two as needed; with the last the
    teacher does not run (`cache_teacher` makes such data).

    What `keras.distillation.Distiller` lacks: losses that learn projections, schedules, one forward
    pass for outputs and features, sample weights, the student's regularizers and `add_loss`, dict
    metrics, a float32 teacher for a student in mixed precision, training on from a file.

    Args:
        teacher: a built model of the student's input shapes, or a `TeacherCache`. Their output
            shapes are equal where a loss compares outputs.
        student: a built model; a pruned or quantization-aware one is as welcome.
        alpha: weight of the student's own loss, in [0, 1], or a Keras learning-rate schedule that
            gives it for each batch seen. At 0 no labels are needed.
        temperature: of the default loss, `LogitDistillation`; 3 if not given.
        losses: other distillation losses, one or several.
        loss_weights: a weight or schedule for each of `losses`; 1 by default.
        name: of the model.

    Raises:
        TypeError: teacher or student is no Keras model.
        ValueError: a model is not built, their shapes differ, an output is softmax where logits are
            expected, or an argument makes no sense.

    Example:
        >>> def net(units):
        ...     layers = [keras.layers.Dense(units, activation="relu"), keras.layers.Dense(3)]
        ...     return keras.Sequential([keras.Input((4,)), *layers])
        >>> distiller = Distiller(net(32), net(4), alpha=0.3, temperature=4.0)
        >>> distiller.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> x, y = keras.random.normal((8, 4)), keras.ops.zeros(8)
        >>> sorted(distiller.fit(x, y, verbose=0).history)
        ['distillation_loss', 'loss', 'student_loss', 'total_loss']
        >>> type(distiller.student).__name__
        'Sequential'
    """

    # Keras refuses to restore the optimizer of a model whose compile() is not its own.
    compile = keras.Model.compile

    def __init__(
        self,
        teacher: keras.Model | StoredTeacher | None,
        student: keras.Model,
        *,
        alpha: Weight = 0.5,
        temperature: float | None = None,
        losses: Any = None,
        loss_weights: Sequence[Weight] | None = None,
        name: str = "distiller",
        **kwargs: Any,
    ) -> None:
        check_type("student", student, keras.Model)
        check_built("student", student)
        if not is_schedule(alpha):
            check_fraction("alpha", alpha, closed_right=True)
            alpha = float(alpha)
        losses = list_losses(losses, temperature)
        loss_weights = list_weights(loss_weights, losses)
        head_shapes = kwargs.pop("head_shapes", None)  # of a distiller that is loaded
        kwargs = {"dtype": student.dtype_policy, **kwargs, "autocast": False}
        # The constructor of the stock Distiller wants a teacher, and freezes it for good.
        super(keras.distillation.Distiller, self).__init__(name=name, **kwargs)
        self.student = student
        self.student_loss_weight = alpha
        self.distillation_losses = losses
        self.distillation_loss_weights = loss_weights
        self.student_loss_tracker = keras.metrics.Mean(name="student_loss")
        self.distillation_loss_tracker = keras.metrics.Mean(name="distillation_loss")
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
        self.batches_seen = None
        if any(is_schedule(weight) for weight in (alpha, *loss_weights)):
            self.batches_seen = self.add_weight(
                shape=(), dtype="int32", initializer="zeros", trainable=False, name="batches_seen"
            )
        self.built = True
        self._latest = None
        self._student_extractor = extract(student, losses, "student")
        self._head_shapes = head_shapes
        self.heads, self._head_of = make_heads(losses, head_shapes or [None] * len(losses))
        self.teacher = teacher

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OUTSIDE:
            super().__setattr__(name, value)
            return
        if name == "teacher":
            self._take_teacher(value)
        object.__setattr__(self, name, value)

    def __dir__(self) -> list[str]:
        # Keras saves every model that it finds here.
        return [name for name in super().__dir__() if name not in _OUTSIDE]

    def make_train_function(self, force: bool = False) -> Any:
        """Makes what `fit` runs, after a check that there is something to learn from.

        Raises:
            ValueError: `compile` was given no loss though alpha is above 0, or a loaded distiller
                has no teacher.
        """
        if self.loss is None and self.student_loss_weight != 0:
            raise ValueError(
                f"alpha={self.student_loss_weight} gives weight to the student's own loss, "
                "but there is none. Pass loss= to compile(), or alpha=0 to learn from the teacher "
                "alone."
            )
        if self.teacher is None and self.student_loss_weight != 1:
            raise ValueError(
                f"{self.name!r} was loaded from a file, which holds no teacher. Set it before "
                "training on: distiller.teacher = tfaccel.load_model('teacher.keras')."
            )
        return super().make_train_function(force)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Returns the weighted sum of the student's own loss and the distillation losses.

        Args:
            x: a batch of inputs.
            y: its labels.
            y_pred: the student's outputs.
            sample_weight: weights of the samples, in both terms.
            training: whether this is a training step.
        """
        alpha = self._at_this_batch(self.student_loss_weight)
        if y_pred is None:
            y_pred = self(x, training=training)
        regularization = sum((keras.ops.sum(loss) for loss in self.losses), start=0.0)
        if self.loss is not None:
            own = super(keras.distillation.Distiller, self).compute_loss(
                x, y, y_pred, sample_weight, training
            )
        else:
            own = keras.ops.zeros(())
        batch = read_batch(x)
        taught = self._taught(batch, training) if self.student_loss_weight != 1 else None
        if taught is not None:
            distilled = self._distillation_loss(
                batch, taught, y_pred, sample_weight=sample_weight, labels=y, training=training
            )
            total = alpha * own + (1 - alpha) * (distilled + regularization)
        else:
            distilled, total = keras.ops.zeros(()), own
        if training and self.batches_seen is not None:
            self.batches_seen.assign_add(1)
        size = keras.ops.shape(keras.tree.flatten(y_pred)[0])[0]
        self.student_loss_tracker.update_state(own, sample_weight=size)
        self.distillation_loss_tracker.update_state(distilled, sample_weight=size)
        self.total_loss_tracker.update_state(total, sample_weight=size)
        return total

    def call(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Returns the student's outputs."""
        inputs = read_batch(inputs).inputs
        if self._student_extractor is None:
            return self.student(inputs, training=training, **kwargs)
        features = self._student_extractor(inputs, training=training, **kwargs)
        # For compute_loss, which follows: a second pass would cost as much again, draw other
        # dropout and move the batch norms' statistics twice.
        self._latest = features
        return features[FINAL]

    def _at_this_batch(self, weight: Any) -> Any:
        """Returns a weight, or what its schedule says by now."""
        if self.batches_seen is None or not is_schedule(weight):
            return weight
        return keras.ops.cast(weight(keras.ops.convert_to_tensor(self.batches_seen)), "float32")

    def _taught(self, batch: Batch, training: bool) -> Mapping[str, Any] | None:
        """Returns what the teacher says by layer name; None where nobody can tell."""
        if batch.teacher_outputs is not None:
            taught: Any = batch.teacher_outputs
        elif self._teacher_extractor is not None:
            taught = self._teacher_extractor(batch.inputs, training=False)
        elif isinstance(self.teacher, keras.Model):
            taught = {FINAL: self.teacher(batch.inputs, training=False)}
        elif self.teacher is not None and training:
            raise ValueError(
                f"The outputs of the teacher {self.teacher.name!r} are stored, but this batch does "
                "not bring them. Fit the data set that the cache makes: cache.dataset(x, y, ...)."
            )
        else:
            return None
        return keras.tree.map_structure(keras.ops.stop_gradient, taught)

    def _learnt(self, batch: Batch, y_pred: Any, training: bool) -> Mapping[str, Any]:
        """Returns the student's features by layer name, its output among them."""
        if self._student_extractor is None:
            return {FINAL: y_pred}
        latest: Any = self._latest
        self._latest = None
        made = keras.tree.flatten(latest[FINAL])[0] if latest is not None else None
        if made is not keras.tree.flatten(y_pred)[0]:
            latest = self._student_extractor(batch.inputs, training=training)
        return {**latest, FINAL: y_pred}

    def _distillation_loss(
        self,
        batch: Batch,
        taught: Mapping[str, Any],
        y_pred: Any,
        *,
        sample_weight: Any,
        labels: Any,
        training: bool,
    ) -> Any:
        learnt = self._learnt(batch, y_pred, training)
        options = {
            "sample_weight": sample_weight,
            "labels": labels,
            "sample_index": batch.sample_index,
            "training": training,
        }
        total = keras.ops.zeros(())
        for place, loss in enumerate(self.distillation_losses):
            teacher_outputs = pick(taught, loss, "teacher")
            student_outputs = pick(learnt, loss, "student")
            loss.validate_outputs(teacher_outputs, student_outputs)
            head = self._head_of[place]
            more = {} if head is None else {"head": self.heads[head]}
            value = loss.compute_loss(teacher_outputs, student_outputs, **options, **more)
            weight = self._at_this_batch(self.distillation_loss_weights[place])
            total = total + weight * keras.ops.cast(value, "float32")
        return total

    def _take_teacher(self, teacher: Any) -> None:
        """Checks a teacher, prepares to look into it, and makes the heads if there are none yet."""
        self._teacher_extractor = None
        if teacher is None:
            return
        if isinstance(teacher, keras.Model):
            self._check_teacher(teacher)
            self._teacher_extractor = extract(teacher, self.distillation_losses, "teacher")
            self.supports_jit = all(
                layer.supports_jit for layer in keras_private.sublayers(teacher)
            )
        else:
            check_type("teacher", teacher, (keras.Model, StoredTeacher))
            self._check_stored(teacher)
        if not any(hasattr(loss, "make_head") for loss in self.distillation_losses):
            return
        shapes = shapes_for_heads(
            self.distillation_losses,
            shapes_of(teacher, self._teacher_extractor),
            shapes_of(self.student, self._student_extractor),
        )
        if self._head_shapes is None:
            self._head_shapes = shapes
            self.heads, self._head_of = make_heads(self.distillation_losses, shapes)
        elif shapes != self._head_shapes:
            raise ValueError(
                f"{self.name!r} has learnt projections for features of the shapes "
                f"{self._head_shapes} (of teacher and student, for each loss), but with the "
                f"teacher {teacher.name!r} they are {shapes}. Set the same teacher, or make a new "
                "Distiller."
            )

    def _check_teacher(self, teacher: Any) -> None:
        check_built("teacher", teacher)
        for loss in self.distillation_losses:
            loss.validate_model_compatibility(teacher, self.student)
        if not (keras_private.has_graph(teacher) and keras_private.has_graph(self.student)):
            return
        check_same_shapes("input", teacher, self.student)
        if any(isinstance(loss, OutputLoss) for loss in self.distillation_losses):
            check_same_shapes("output", teacher, self.student)

    def _check_stored(self, teacher: StoredTeacher) -> None:
        wanted = layer_names(self.distillation_losses, "teacher")
        missing = [name for name in wanted if name not in teacher.output_shapes]
        if missing:
            raise ValueError(
                f"The losses look at the teacher's layers {', '.join(map(repr, wanted))}, but the "
                f"stored outputs of {teacher.name!r} have no {', '.join(map(repr, missing))}. "
                f"Store them too: cache_teacher(..., layers={wanted!r})."
            )

    def get_config(self) -> dict[str, Any]:
        """Returns student, losses and weights, serialized; the teacher is left out."""
        serialize = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "dtype": serialize(self.dtype_policy),
            "student": serialize(self.student),
            "alpha": serialize_weight(self.student_loss_weight),
            "losses": [serialize(loss) for loss in self.distillation_losses],
            "loss_weights": [serialize_weight(weight) for weight in self.distillation_loss_weights],
            "head_shapes": self._head_shapes,
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> "Distiller":
        """Returns the distiller that `get_config` described, without a teacher."""
        restored = {
            key: keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
            if isinstance(value, (dict, list))
            else value
            for key, value in config.items()
        }
        return cls(None, **restored)
