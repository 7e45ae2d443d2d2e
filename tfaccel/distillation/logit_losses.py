"""Losses on outputs beyond Hinton's: decoupled, of many labels, of regressions."""

import dataclasses
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.checks import check_number, check_positive, check_type
from tfaccel.distillation.labels import class_ids
from tfaccel.distillation.losses import OutputLoss, check_logits

# Stands for log 0: its exponential is 0, and its gradient is no NaN.
_NEVER = -1e30


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class DecoupledDistillation(OutputLoss):
    """Soft labels taken apart: how sure the teacher is, and what else it sees (Zhao 2022, eq. 7).

    loss = T² · mean over samples of (alpha · TCKD + beta · NCKD)

    TCKD is the divergence of (p_t, 1 - p_t), the target class against all others; NCKD that of the
    softmax over the other classes alone. With weights 1 and 1 - p_t (of the teacher) the sum is
    `LogitDistillation`, which therefore learns least from the others where the teacher is surest.

    The target class is that of the labels: ids, or one-hot (of mixed labels the largest). The paper
    raises this loss from 0 over the first 20 epochs: give the distiller a schedule as its weight.

    Args:
        alpha: weight of the target class.
        beta: weight of the other classes; the paper takes 1 to 8, more for surer teachers.
        temperature: T.

    Raises:
        ValueError: the temperature is not above 0, or a weight is below 0.

    >>> loss = DecoupledDistillation(beta=2.0, temperature=1.0)
    >>> teacher, student = keras.ops.array([[1.0, 2.0, 3.0]]), keras.ops.array([[2.0, 1.0, 3.0]])
    >>> labels = keras.ops.array([2])
    >>> round(float(loss.compute_loss(teacher, student, labels=labels)), 4)  # 2 tanh(1/2)
    0.9242
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            check_number(name, value)
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, but got {value!r}.")

    @property
    def needs_labels(self) -> bool:
        """Whether a sample without a label can teach nothing."""
        return True

    def _terms(self, teacher: Any, student: Any, labels: Any) -> Any:
        ops = keras.ops
        if labels is None:
            raise ValueError(
                "DecoupledDistillation treats the target class apart, but this batch has no "
                "labels. Give y to fit(), or learn without labels by LogitDistillation."
            )
        is_target = ops.one_hot(class_ids(labels, student), student.shape[-1], dtype="bool")
        sides = []
        for logits in (teacher, student):
            log_p = ops.log_softmax(logits / self.temperature, axis=-1)
            target = ops.sum(ops.where(is_target, log_p, 0.0), axis=-1, keepdims=True)
            # Of sums of small probabilities, since 1 - p_t would lose all digits where p_t is 1.
            others = ops.logsumexp(ops.where(is_target, _NEVER, log_p), axis=-1, keepdims=True)
            sides.append((ops.concatenate([target, others], axis=-1), log_p - others))
        (teacher_pair, teacher_others), (student_pair, student_others) = sides
        target_term = ops.sum(ops.exp(teacher_pair) * (teacher_pair - student_pair), axis=-1)
        other_p = ops.where(is_target, 0.0, ops.exp(ops.minimum(teacher_others, 0.0)))
        other_term = ops.sum(other_p * (teacher_others - student_others), axis=-1)
        return self.temperature**2 * (self.alpha * target_term + self.beta * other_term)

    def validate_model_compatibility(self, teacher: keras.Model, student: keras.Model) -> None:
        """Checks that both models give logits of two classes or more.

        Raises:
            ValueError: a model ends in softmax or sigmoid, or has one output class.
        """
        check_logits(teacher, student, classes=2)


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class MultiLabelDistillation(OutputLoss):
    """Soft labels for outputs that each say yes or no by themselves.

    loss = T² · mean over samples and labels of KL(Bernoulli(p) ‖ Bernoulli(q))
    where p = sigmoid(teacher / T), q = sigmoid(student / T)

    The divergence of Hinton (2015), of each label by itself as in one-versus-all reduction (Yang
    2023); a mean over labels, as `keras.losses.BinaryCrossentropy` takes. Also for a binary
    classifier of one logit.

    Args:
        temperature: T.

    Raises:
        ValueError: the temperature is not above 0.

    >>> teacher, student = keras.ops.array([[2.0, -1.0]]), keras.ops.array([[0.0, -1.0]])
    >>> round(float(MultiLabelDistillation(1.0).compute_loss(teacher, student)), 4)
    0.1639
    """

    temperature: float = 3.0

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)

    def _terms(self, teacher: Any, student: Any, labels: Any) -> Any:  # noqa: ARG002
        ops = keras.ops
        teacher, student = teacher / self.temperature, student / self.temperature
        yes = ops.sigmoid(teacher) * (ops.log_sigmoid(teacher) - ops.log_sigmoid(student))
        no = ops.sigmoid(-teacher) * (ops.log_sigmoid(-teacher) - ops.log_sigmoid(-student))
        return self.temperature**2 * (yes + no)

    def validate_model_compatibility(self, teacher: keras.Model, student: keras.Model) -> None:
        """Checks that both models give logits.

        Raises:
            ValueError: a model ends in softmax or sigmoid.
        """
        check_logits(teacher, student)


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class RegressionDistillation(OutputLoss):
    """The teacher's predictions of numbers, as Gaussians around them.

    loss = mean over samples and outputs of KL(N(teacher, sigma²) ‖ N(student, sigma²))
         = mean of (teacher - student)² / (2 sigma²)

    With `predicts_variance` the last axis holds means, then as many log variances v, and the
    divergence is ½ (v_s - v_t + (exp(v_t) + (m_t - m_s)²) / exp(v_s) - 1).

    With `bound` the teacher is only a bound to reach (Chen 2017, eq. 6): a sample's term is
    (label - student)² / (2 sigma²) as long as ‖label - student‖² + bound > ‖label - teacher‖², then
    nothing. A teacher that is wrong itself misleads nobody.

    Args:
        sigma: standard deviation of what is predicted, in its unit; larger means a smaller loss.
        predicts_variance: whether the outputs are means and log variances.
        bound: by how much squared error the student has to do better than the teacher; None to
            learn the teacher's predictions instead.

    Raises:
        ValueError: sigma is not above 0, bound is below 0, or an argument has no effect.

    >>> teacher, student = keras.ops.array([[1.0], [3.0]]), keras.ops.array([[2.0], [1.0]])
    >>> float(RegressionDistillation(sigma=1.0).compute_loss(teacher, student))
    1.25
    """

    sigma: float = 1.0
    predicts_variance: bool = False
    bound: float | None = None

    def __post_init__(self) -> None:
        check_positive("sigma", self.sigma)
        check_type("predicts_variance", self.predicts_variance, bool)
        if self.bound is not None:
            check_number("bound", self.bound)
            if self.bound < 0:
                raise ValueError(f"bound must be 0 or more, but got {self.bound!r}.")
        if self.predicts_variance and self.bound is not None:
            raise ValueError(
                f"bound={self.bound!r} compares errors of predictions, for which "
                "predicts_variance=True has no use. Leave out one of the two."
            )
        if self.predicts_variance and self.sigma != 1:
            raise ValueError(
                f"sigma={self.sigma!r} has no effect with predicts_variance=True, where the "
                "outputs say it. Leave out one of the two."
            )

    @property
    def needs_labels(self) -> bool:
        """Whether a sample without a label can teach nothing."""
        return self.bound is not None

    def _terms(self, teacher: Any, student: Any, labels: Any) -> Any:
        ops = keras.ops
        if self.predicts_variance:
            teacher_mean, teacher_log = ops.split(teacher, 2, axis=-1)
            mean, log_variance = ops.split(student, 2, axis=-1)
            change = teacher_log - log_variance
            apart = ops.square(teacher_mean - mean) * ops.exp(-log_variance)
            return 0.5 * (ops.exp(change) + apart - 1.0 - change)
        if self.bound is None:
            return ops.square(teacher - student) / (2 * self.sigma**2)
        if labels is None:
            raise ValueError(
                f"bound={self.bound!r} compares errors, but this batch has no labels. "
                "Give y to fit(), or leave bound out."
            )
        labels = ops.reshape(ops.cast(labels, "float32"), ops.shape(student))
        errors = [ops.square(labels - side) for side in (teacher, student)]
        # Of a sample, not of an output: the teacher is the better one or it is not.
        axis = -1 if len(student.shape) > 1 else ()
        of_teacher, of_student = (ops.sum(each, axis=axis, keepdims=True) for each in errors)
        counts = ops.cast(of_student + self.bound > of_teacher, "float32")
        return counts * errors[1] / (2 * self.sigma**2)

    def validate_model_compatibility(self, teacher: keras.Model, student: keras.Model) -> None:
        """Checks that outputs are means and log variances if they should be.

        Raises:
            ValueError: an output has an odd number of values.
        """
        if not self.predicts_variance:
            return
        for role, model in (("teacher", teacher), ("student", student)):
            outputs = model.outputs if keras_private.has_graph(model) else []
            for output in outputs:
                if output.shape[-1] is not None and output.shape[-1] % 2:
                    raise ValueError(
                        "predicts_variance=True needs outputs of means and as many log variances, "
                        f"but the {role} {model.name!r} has one of shape {tuple(output.shape)}."
                    )
