"""Relations between the samples of a batch: similarities, distances, angles."""

import dataclasses
from typing import Any

import keras

from tfaccel.core.checks import check_number, check_type
from tfaccel.distillation.feature_losses import FeatureLoss
from tfaccel.distillation.feature_math import flattened, unit_rows

# Of the mean square distance: what is below it is rounding, and the pair one point.
_SAME_POINT = 1e-6


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class SimilarityPreserving(FeatureLoss):
    """Samples that are alike to the teacher shall be to the student (Tung & Mori 2019, eq. 4).

    loss = 1/b² · ‖G(teacher) - G(student)‖²

    G holds the dot products of all pairs of a batch's b features, flattened, each row divided by
    its length. The shapes of the features are free. A pair weighs the geometric mean of its
    samples' weights, and samples of weight 0 are as if not there (but for b).

    Args:
        teacher_layer_name: None for the model's output.
        student_layer_name: None for the model's output.
        head_name: unused; there is nothing to learn.

    >>> teacher, student = keras.ops.eye(2), keras.ops.ones((2, 3))
    >>> round(float(SimilarityPreserving().compute_loss(teacher, student)), 4)  # 1 - 1 / √2
    0.2929
    """

    def compute_loss(
        self, teacher_outputs: Any, student_outputs: Any, *, sample_weight: Any = None, **_: Any
    ) -> Any:
        """Returns the loss.

        Args:
            teacher_outputs: [batch, ...].
            student_outputs: [batch, ...].
            sample_weight: [batch] or None.

        Returns:
            [] float32.
        """
        ops = keras.ops
        weight = _weights(sample_weight, student_outputs)
        seen = ops.cast(weight > 0, "float32")
        sides = []
        for outputs in (teacher_outputs, student_outputs):
            feature = flattened(outputs)
            sides.append(unit_rows(ops.matmul(feature, ops.transpose(feature)) * seen))
        pairs = ops.sqrt(weight[:, None] * weight[None, :])
        return ops.mean(pairs * ops.square(sides[0] - sides[1]))


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class RelationalDistillation(FeatureLoss):
    """Distances and angles between samples shall be as the teacher's (RKD, Park 2019, eq. 6, 9).

    loss = distance_weight · mean over pairs of huber(d(teacher), d(student))
         + angle_weight · mean over triplets of huber(cos(teacher), cos(student))

    d is the distance of two samples' features, flattened, divided by the mean distance in the
    batch; cos is that of the angle at the second of three samples. Pairs and triplets are of
    different samples. huber is ½ x² up to |x| = 1, |x| - ½ beyond. The shapes of the features are
    free.

    Angles take memory for `vertices` · batch² numbers: in a larger batch only the first samples are
    vertices, of angles to all others. A pair or triplet weighs the geometric mean of its samples'
    weights.

    Args:
        teacher_layer_name: None for the model's output.
        student_layer_name: None for the model's output.
        head_name: unused; there is nothing to learn.
        distance_weight: 1 in the paper's RKD-DA; 25 beside a classification loss.
        angle_weight: 2 in the paper's RKD-DA; 50 beside a classification loss.
        vertices: how many samples of a batch are vertices of angles; None for all.

    Raises:
        ValueError: a weight is below 0, both are 0, or there are no vertices.

    >>> square = keras.ops.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    >>> round(float(RelationalDistillation().compute_loss(square, 5 * square)), 6)
    0.0
    """

    distance_weight: float = 1.0
    angle_weight: float = 2.0
    vertices: int | None = 128

    def __post_init__(self) -> None:
        for name in ("distance_weight", "angle_weight"):
            value = getattr(self, name)
            check_number(name, value)
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, but got {value!r}.")
        if self.distance_weight == self.angle_weight == 0:
            raise ValueError("distance_weight and angle_weight are both 0. Give weight to one.")
        if self.vertices is not None:
            check_type("vertices", self.vertices, int)
            if self.vertices < 1:
                raise ValueError(f"vertices must be 1 or more, or None, but got {self.vertices}.")

    def compute_loss(
        self, teacher_outputs: Any, student_outputs: Any, *, sample_weight: Any = None, **_: Any
    ) -> Any:
        """Returns the loss; 0 for a batch too small to have pairs or triplets.

        Args:
            teacher_outputs: [batch, ...].
            student_outputs: [batch, ...].
            sample_weight: [batch] or None.

        Returns:
            [] float32.
        """
        ops = keras.ops
        weight = _weights(sample_weight, student_outputs)
        place = ops.cumsum(ops.ones_like(weight))
        others = ops.cast(place[:, None] != place[None, :], "float32")
        pairs = others * ops.sqrt(weight[:, None] * weight[None, :])
        sides = [_Geometry(flattened(x), pairs) for x in (teacher_outputs, student_outputs)]
        total = ops.zeros(())
        if self.distance_weight:
            terms = _huber(sides[0].distances - sides[1].distances)
            loss = _quotient(ops.sum(pairs * terms), ops.sum(others))
            total = total + self.distance_weight * loss
        if self.angle_weight:
            terms = _huber(sides[0].cosines(self.vertices) - sides[1].cosines(self.vertices))
            apart = others[: self.vertices, :, None] * others[: self.vertices, None, :] * others
            root = ops.cbrt(weight)
            trios = apart * (root[: self.vertices, None, None] * root[:, None] * root)
            loss = _quotient(ops.sum(trios * terms), ops.sum(apart))
            total = total + self.angle_weight * loss
        return total


class _Geometry:
    """Distances and angles of a batch's features, all from their dot products.

    Differences of all pairs would take batch² · features numbers.
    """

    def __init__(self, feature: Any, pairs: Any) -> None:
        ops = keras.ops
        # Neither distances nor angles change by it, and small numbers lose fewer digits.
        feature = feature - ops.mean(feature, axis=0)
        self.dots = ops.matmul(feature, ops.transpose(feature))
        self.norms = ops.diagonal(self.dots)
        square = self.norms[:, None] + self.norms[None, :] - 2 * self.dots
        apart = square > _SAME_POINT * ops.mean(ops.stop_gradient(square))
        # The gradient of a square root at 0 is infinite.
        self.lengths = ops.where(apart, ops.sqrt(ops.where(apart, square, 1.0)), 0.0)
        self.inverse = ops.where(apart, 1 / ops.where(apart, self.lengths, 1.0), 0.0)
        mean = _quotient(ops.sum(pairs * self.lengths), ops.sum(pairs))
        self.distances = _quotient(self.lengths, mean)

    def cosines(self, vertices: int | None) -> Any:
        """Returns [vertex, sample, sample], the cosine of the angle at the vertex."""
        at = slice(vertices)
        dots = (
            self.dots - self.dots[at, :, None] - self.dots[at, None, :] + self.norms[at, None, None]
        )
        return dots * self.inverse[at, :, None] * self.inverse[at, None, :]


def _weights(sample_weight: Any, outputs: Any) -> Any:
    ops = keras.ops
    ones = ops.ones_like(flattened(outputs)[:, 0])
    if sample_weight is None:
        return ones
    if any(size not in (1, None) for size in sample_weight.shape[1:]):
        raise ValueError(
            "Relations are between samples, so that sample_weight has to be [batch], but it has "
            f"the shape {tuple(sample_weight.shape)}."
        )
    return ones * ops.reshape(ops.cast(sample_weight, "float32"), (-1,))


def _huber(difference: Any) -> Any:
    ops = keras.ops
    size = ops.abs(difference)
    return ops.where(size <= 1.0, 0.5 * ops.square(difference), size - 0.5)


def _quotient(value: Any, by: Any) -> Any:
    """Returns value / by, 0 where `by` is."""
    ops = keras.ops
    return ops.where(by > 0, value / ops.where(by > 0, by, 1.0), 0.0)
