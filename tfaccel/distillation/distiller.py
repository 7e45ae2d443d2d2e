"""A student that learns from labels and from a teacher."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.checks import check_fraction, check_type
from tfaccel.distillation.losses import LogitDistillation

# Keras neither tracks nor saves these: the teacher is not a part of what is trained, and the
# extractors are made of the layers of teacher and student.
_OUTSIDE = ("teacher", "_teacher_feature_extractor", "_student_feature_extractor")


@keras.saving.register_keras_serializable("tfaccel")
class Distiller(keras.distillation.Distiller):
    """Trains a student on labels and on a teacher's outputs (Hinton 2015).

    loss = alpha · (the student's own loss) + (1 - alpha) · (distillation losses) + regularization

    To Keras this model *is* the student: its weights, metrics, predictions and checkpoints are the
    student's. `compile` and `fit` it as you would the student (the loss gets the student's outputs,
    so mostly `from_logits=True`); sample weights count in both terms. Then take `.student`.

    The teacher runs as in inference and is not changed in any way, not even frozen. It is not saved
    either: a distiller that is loaded from a file evaluates and predicts; to train on, set its
    `teacher` again.

    What `keras.distillation.Distiller` lacks: sample weights, the student's regularizers and
    `add_loss`, dict metrics, a float32 teacher for a student in mixed precision, training on from
    a file.

    Args:
        teacher: a built model, of the student's input and output shapes.
        student: a built model; a pruned or quantization-aware one is as welcome.
        alpha: weight of the student's own loss, in [0, 1]. At 0 no labels are needed.
        temperature: of the default loss, `LogitDistillation`; 3 if not given.
        losses: other distillation losses, one or several.
        loss_weights: a weight for each of `losses`; 1 by default.
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
        teacher: keras.Model | None,
        student: keras.Model,
        *,
        alpha: float = 0.5,
        temperature: float | None = None,
        losses: Any = None,
        loss_weights: Sequence[float] | None = None,
        name: str = "distiller",
        **kwargs: Any,
    ) -> None:
        check_type("student", student, keras.Model)
        _check_built("student", student)
        check_fraction("alpha", alpha, closed_right=True)
        losses = _loss_list(losses, temperature)
        loss_weights = _weight_list(loss_weights, losses)
        kwargs = {"dtype": student.dtype_policy, **kwargs, "autocast": False}
        # The constructor of the stock Distiller wants a teacher, and freezes it for good.
        super(keras.distillation.Distiller, self).__init__(name=name, **kwargs)
        self.student = student
        self.student_loss_weight = float(alpha)
        self.distillation_losses = losses
        self.distillation_loss_weights = loss_weights
        self.student_loss_tracker = keras.metrics.Mean(name="student_loss")
        self.distillation_loss_tracker = keras.metrics.Mean(name="distillation_loss")
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
        self.built = True
        self.teacher = teacher

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OUTSIDE:
            super().__setattr__(name, value)
            return
        if name == "teacher" and value is not None:
            self._check_teacher(value)
        object.__setattr__(self, name, value)
        if name == "teacher" and value is not None:
            self._create_multi_feature_extractors()
            self.supports_jit = all(layer.supports_jit for layer in keras_private.sublayers(value))

    def __dir__(self) -> list[str]:
        # Keras saves every model that it finds here.
        return [name for name in super().__dir__() if name not in _OUTSIDE]

    def make_train_function(self, force: bool = False) -> Any:
        """Makes what `fit` runs, after a check that there is something to learn from.

        Raises:
            ValueError: `compile` was given no loss though alpha is above 0, or a loaded distiller
                has no teacher.
        """
        if self.loss is None and self.student_loss_weight > 0:
            raise ValueError(
                f"alpha={self.student_loss_weight} gives weight to the student's own loss, "
                "but there is none. Pass loss= to compile(), or alpha=0 to learn from the teacher "
                "alone."
            )
        if self.teacher is None and self.student_loss_weight < 1:
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
        alpha = self.student_loss_weight
        if y_pred is None:
            y_pred = self(x, training=training)
        regularization = sum((keras.ops.sum(loss) for loss in self.losses), start=0.0)
        if self.loss is not None:
            own = super(keras.distillation.Distiller, self).compute_loss(
                x, y, y_pred, sample_weight, training
            )
        else:
            own = keras.ops.zeros(())
        if alpha < 1 and self.teacher is not None:
            distilled = self._distillation_loss(x, y_pred, sample_weight, training)
            total = alpha * own + (1 - alpha) * (distilled + regularization)
        else:
            distilled, total = keras.ops.zeros(()), own
        batch = keras.ops.shape(keras.tree.flatten(y_pred)[0])[0]
        self.student_loss_tracker.update_state(own, sample_weight=batch)
        self.distillation_loss_tracker.update_state(distilled, sample_weight=batch)
        self.total_loss_tracker.update_state(total, sample_weight=batch)
        return total

    def _distillation_loss(self, x: Any, y_pred: Any, sample_weight: Any, training: bool) -> Any:
        taught = keras.tree.map_structure(
            keras.ops.stop_gradient, self._extract_all_teacher_features(x)
        )
        learnt = {"final_output": y_pred}
        if self._student_feature_extractor is not None:
            features = self._student_feature_extractor(x, training=training)
            learnt = {**features, **learnt}
        total = 0.0
        pairs = zip(self.distillation_losses, self.distillation_loss_weights, strict=True)
        for loss, weight in pairs:
            teacher_outputs = taught[getattr(loss, "teacher_layer_name", None) or "final_output"]
            student_outputs = learnt[getattr(loss, "student_layer_name", None) or "final_output"]
            loss.validate_outputs(teacher_outputs, student_outputs)
            value = loss.compute_loss(teacher_outputs, student_outputs, sample_weight=sample_weight)
            total = total + weight * keras.ops.cast(value, "float32")
        return total

    def _check_teacher(self, teacher: Any) -> None:
        check_type("teacher", teacher, keras.Model)
        _check_built("teacher", teacher)
        if keras_private.has_graph(teacher) and keras_private.has_graph(self.student):
            for side in ("input", "output"):
                _check_same_shapes(side, teacher, self.student)
        for loss in self.distillation_losses:
            loss.validate_model_compatibility(teacher, self.student)

    def get_config(self) -> dict[str, Any]:
        """Returns student, losses and weights, serialized; the teacher is left out."""
        serialize = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "dtype": serialize(self.dtype_policy),
            "student": serialize(self.student),
            "alpha": self.student_loss_weight,
            "losses": [serialize(loss) for loss in self.distillation_losses],
            "loss_weights": list(self.distillation_loss_weights),
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


def _check_built(role: str, model: keras.Model) -> None:
    if not model.built:
        raise ValueError(
            f"Distiller needs a built {role}, but {model.name!r} has no weights yet. "
            f"Call {model.name}.build(input_shape) or run one batch first."
        )


def _check_same_shapes(side: str, teacher: keras.Model, student: keras.Model) -> None:
    shapes = [
        [tuple(tensor.shape) for tensor in getattr(model, f"{side}s")]
        for model in (teacher, student)
    ]
    same = len(shapes[0]) == len(shapes[1]) and all(
        len(a) == len(b) and all(None in (m, n) or m == n for m, n in zip(a, b, strict=True))
        for a, b in zip(*shapes, strict=True)
    )
    if not same:
        raise ValueError(
            f"Teacher and student need the same {side} shapes, but the teacher {teacher.name!r} "
            f"has {_listed(shapes[0])} and the student {student.name!r} has {_listed(shapes[1])}."
        )


def _listed(shapes: list[tuple[int | None, ...]]) -> str:
    return ", ".join(map(str, shapes))


def _loss_list(losses: Any, temperature: float | None) -> list[Any]:
    if losses is None:
        return [LogitDistillation() if temperature is None else LogitDistillation(temperature)]
    if temperature is not None:
        raise ValueError(
            f"temperature={temperature} is for the default loss, but losses= was given too. "
            "Give the temperature to the loss itself."
        )
    listed = list(losses) if isinstance(losses, (list, tuple)) else [losses]
    if not listed:
        raise ValueError("losses= is empty. Leave it out for LogitDistillation, or give a loss.")
    for loss in listed:
        check_type("losses", loss, keras.distillation.DistillationLoss)
    return listed


def _weight_list(weights: Sequence[float] | None, losses: list[Any]) -> list[float]:
    if weights is None:
        return [1.0] * len(losses)
    if len(weights) != len(losses):
        raise ValueError(
            "loss_weights needs one weight for each loss, but got "
            f"{len(weights)} for {len(losses)}."
        )
    return [float(weight) for weight in weights]
