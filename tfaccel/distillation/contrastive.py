"""Contrastive representation distillation: which teacher's feature belongs to which student's."""

import dataclasses
import math
from typing import Any

import keras

from tfaccel.core.checks import check_fraction, check_in, check_positive, check_type
from tfaccel.distillation.contrastive_memory import NEVER, ContrastiveHead
from tfaccel.distillation.feature_losses import FeatureLoss
from tfaccel.distillation.labels import class_ids
from tfaccel.distillation.losses import weighted_mean

_NEGATIVES = ("memory", "batch")


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class ContrastiveRepresentation(FeatureLoss):
    """The student tells the teacher's feature of a sample from those of others (CRD, Tian 2020).

    Both features go through a learned linear map to `dimensions` numbers of length 1; s is the dot
    product of a student's and a teacher's, divided by the temperature. Each side is the anchor
    once, and the two losses are added.

    negatives="memory" (the paper's): the embeddings of all training samples are remembered, as a
    mean that moves with `momentum`, and each anchor meets its sample's memory of the other side and
    `draws` memories of other samples. With k = draws and n = samples,
        loss = mean over anchors of -log h(s₊) - k · mean over negatives of log(1 - h(s₋)),
        h(s) = exp(s) / (exp(s) + Z k / n)
    where Z, which the first batch fixes, is n times its mean of exp(s). The draws are uniform, and
    one set serves all anchors of a batch: drawing for each alone takes batch times the memory for
    the same expectation. x has to bring `sample_index` (`{"inputs": x, "sample_index": index}`).
    The memory takes 2 · samples · dimensions float32 numbers and is saved with the distiller; in
    distributed training each process has its own. Evaluation, whose samples have no memory,
    compares the two embeddings of a sample, and remembers nothing.

    negatives="batch": the other samples of the batch, without memory; the loss is that of InfoNCE,
        mean over anchors of -log (exp(s₊) / (exp(s₊) + sum over negatives of exp(s₋))).

    Given labels (class ids or one-hot), samples of the anchor's class are no negatives; the rest of
    the draws then count for all. The classes of samples that are not yet remembered are unknown.

    Feature maps and sequences are averaged over their positions first. The paper takes the outputs
    of the layers before the classifiers.

    Args:
        teacher_layer_name: None for the model's output.
        student_layer_name: None for the model's output.
        head_name: losses that give the same name share one head.
        negatives: "memory" or "batch".
        samples: how many training samples there are; for "memory" alone.
        draws: negatives of each anchor; for "memory" alone.
        dimensions: of the embeddings.
        temperature: 0.07 in the paper.
        momentum: the part of the old memory that stays.
        same_class: whether samples of the anchor's class are negatives too; for labels that are no
            classes.
        seed: of the memory and the draws.

    Raises:
        ValueError: an argument makes no sense, or samples= is missing or without effect.

    >>> loss = ContrastiveRepresentation(negatives="batch", dimensions=8)
    >>> head = loss.make_head((None, 64), (None, 4, 4, 16))
    >>> [tuple(variable.shape) for variable in head.trainable_variables]
    [(64, 8), (8,), (16, 8), (8,)]
    """

    negatives: str = "memory"
    samples: int | None = None
    draws: int = 16384
    dimensions: int = 128
    temperature: float = 0.07
    momentum: float = 0.5
    same_class: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        check_in("negatives", self.negatives, _NEGATIVES)
        check_positive("temperature", self.temperature)
        check_fraction("momentum", self.momentum)
        check_type("same_class", self.same_class, bool)
        check_type("seed", self.seed, (int, type(None)))
        for name, least in (("draws", 1), ("dimensions", 1), ("samples", 2)):
            value = getattr(self, name)
            if name == "samples" and value is None:
                continue
            check_type(name, value, int)
            if value < least:
                raise ValueError(f"{name} must be {least} or more, but got {value}.")
        if (self.negatives == "memory") != (self.samples is not None):
            raise ValueError(
                f"negatives={self.negatives!r} with samples={self.samples}: a memory needs the "
                "number of training samples, samples=len(x), and negatives of the batch none."
            )

    def make_head(self, teacher_shape: Any, student_shape: Any) -> keras.layers.Layer:
        """Returns the embeddings of both sides and their memory, a `ContrastiveHead`.

        Raises:
            ValueError: a feature is not one tensor of known width.
        """
        for role, shape in (("teacher", teacher_shape), ("student", student_shape)):
            if not isinstance(shape, tuple) or len(shape) < 2 or not isinstance(shape[-1], int):
                raise ValueError(
                    f"The {role}'s feature must be one tensor [batch, ..., channels], but has the "
                    f"shape {shape}. Name another layer."
                )
        return ContrastiveHead(
            teacher_shape[-1], student_shape[-1], self.dimensions, self.samples, self.seed
        )

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
        """Returns the loss, and in training remembers the batch.

        Args:
            teacher_outputs: [batch, ..., channels].
            student_outputs: [batch, ..., channels].
            head: what `make_head` returned.
            sample_weight: [batch], of anchors, or None.
            labels: class ids or one-hot, or None.
            sample_index: [batch] int in [0, samples), for the memory in training.
            training: whether to remember, and to compare with what is remembered.

        Returns:
            [] float32.

        Raises:
            ValueError: there is no head, or no sample_index where there has to be.
        """
        if head is None:
            raise ValueError(
                "ContrastiveRepresentation learns embeddings. Pass head=loss.make_head(...) of the "
                "features' shapes, as the Distiller does."
            )
        teacher, student = head.embed(teacher_outputs, student_outputs)
        classes = None if labels is None or self.same_class else class_ids(labels)
        if self.negatives == "batch":
            terms = self._in_batch(teacher, student, classes)
        elif training and sample_index is None:
            raise ValueError(
                'negatives="memory" needs to know which training sample is which. Let x be '
                '{"inputs": x, "sample_index": numpy.arange(len(x))}, or take negatives="batch".'
            )
        else:
            index = None
            if training:
                index = keras.ops.reshape(keras.ops.cast(sample_index, "int32"), (-1,))
            terms = self._from_memory(head, teacher, student, index, classes)
            if training:
                head.remember(teacher, student, index, classes, self.momentum)
        return weighted_mean(terms, sample_weight)

    def _in_batch(self, teacher: Any, student: Any, classes: Any) -> Any:
        ops = keras.ops
        scores = ops.matmul(student, ops.transpose(teacher)) / self.temperature
        if classes is not None:
            place = ops.cumsum(ops.ones_like(classes))
            fits = (classes[:, None] != classes[None, :]) | (place[:, None] == place[None, :])
            scores = ops.where(fits, scores, NEVER)
        matches = ops.sum(teacher * student, axis=-1) / self.temperature
        return sum(ops.logsumexp(scores, axis=axis) - matches for axis in (1, 0))

    def _from_memory(
        self, head: "ContrastiveHead", teacher: Any, student: Any, index: Any, classes: Any
    ) -> Any:
        ops = keras.ops
        drawn = head.draw(self.draws)
        counts = head.are_negatives(drawn, index, classes)
        shift = math.log(self.draws) - head.log_samples
        terms: Any = 0.0
        for anchor, other, side in ((student, teacher, "teacher"), (teacher, student, "student")):
            memory = head.memory(side)
            positive = other if index is None else ops.take(memory, index, axis=0)
            match = ops.sum(anchor * positive, axis=-1) / self.temperature
            scores = ops.matmul(anchor, ops.transpose(ops.take(memory, drawn, axis=0)))
            scores = scores / self.temperature
            log_z = head.log_normalizer(side, match, scores, fix=index is not None)
            # h is a sigmoid, which also says that none of this over- or underflows.
            attracted = -ops.log_sigmoid(match - log_z - shift)
            repelled = -ops.log_sigmoid(log_z + shift - scores)
            terms = terms + attracted + self.draws * _masked_mean(repelled, counts)
        return terms


def _masked_mean(values: Any, counts: Any) -> Any:
    """Returns the mean along the last axis of what counts; 0 where nothing does."""
    ops = keras.ops
    counts = ops.broadcast_to(counts, ops.shape(values))
    number = ops.sum(counts, axis=-1)
    return ops.sum(values * counts, axis=-1) / ops.maximum(number, 1.0)
