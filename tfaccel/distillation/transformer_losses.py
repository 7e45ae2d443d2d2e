"""What TinyBERT compares inside two Transformers, and which layer with which."""

import dataclasses
from typing import Any

import keras

from tfaccel.core.checks import check_positive, check_type
from tfaccel.distillation.feature_losses import FeatureLoss
from tfaccel.distillation.losses import weighted_mean

_EMBEDDINGS = "embeddings"
# Below it a score is no score but the mark of a pair of which one is padding.
_MARK = -1e2


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class HiddenStateLoss(FeatureLoss):
    """How far projected hidden states are from the teacher's (Jiao et al. 2020, eqs. 8 and 9).

    loss = mean over tokens and features of (student · W - teacher)²

    W is learned, [student's width, teacher's width], without a bias. What is 0 in both, as padding
    is in `architectures.BERT`, adds nothing.

    Args:
        teacher_layer_name: of the hidden states.
        student_layer_name: likewise.
        head_name: losses that give the same name share one W.

    >>> loss = HiddenStateLoss("block_3_hidden", "block_0_hidden", "hidden")
    >>> tuple(loss.make_head((None, 7, 6), (None, 7, 4)).kernel.shape)
    (4, 6)
    """

    def make_head(self, teacher_shape: Any, student_shape: Any) -> keras.layers.Layer:
        """Returns the projection."""
        head = keras.layers.Dense(
            teacher_shape[-1], use_bias=False, dtype="float32", name="projection"
        )
        head.build(student_shape)
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
            teacher_outputs: [batch, length, teacher's width].
            student_outputs: [batch, length, student's width].
            head: the projection; None for equal widths without one.
            sample_weight: [batch] or None.

        Returns:
            [] float32.
        """
        teacher = keras.ops.cast(teacher_outputs, "float32")
        student = keras.ops.cast(student_outputs, "float32")
        if head is not None:
            student = head(student)
        return weighted_mean(keras.ops.square(student - teacher), sample_weight)


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class AttentionScoresLoss(FeatureLoss):
    """How far attention scores are from the teacher's, before the softmax (Jiao 2020, eq. 7).

    loss = mean over heads and pairs of tokens of (student's score - teacher's score)²

    A score of -100 or less marks padding, where models add a large negative number, and counts as
    0, as in the paper's own code.

    Args:
        teacher_layer_name: of the scores.
        student_layer_name: likewise.
        head_name: of no use here.
    """

    def compute_loss(
        self, teacher_outputs: Any, student_outputs: Any, *, sample_weight: Any = None, **_: Any
    ) -> Any:
        """Returns the loss.

        Args:
            teacher_outputs: [batch, heads, length, length].
            student_outputs: of the same shape.
            sample_weight: [batch] or None.

        Returns:
            [] float32.

        Raises:
            ValueError: the shapes differ.
        """
        if tuple(teacher_outputs.shape[1:]) != tuple(student_outputs.shape[1:]):
            raise ValueError(
                "Attention scores need as many heads and tokens in both, but the teacher has "
                f"{tuple(teacher_outputs.shape)} and the student {tuple(student_outputs.shape)} "
                "([batch, heads, length, length]). Give the student the teacher's heads."
            )
        teacher, student = map(_without_marks, (teacher_outputs, student_outputs))
        return weighted_mean(keras.ops.square(student - teacher), sample_weight)


def _without_marks(scores: Any) -> Any:
    scores = keras.ops.cast(scores, "float32")
    return keras.ops.where(scores <= _MARK, 0.0, scores)


def layer_map(student_depth: int, teacher_depth: int) -> tuple[int, ...]:
    """Returns from which of the teacher's layers each of the student's learns.

    g(m) = m · N / M for m = 1 .. M (Jiao et al. 2020, section 4.1, "uniform"): the last one learns
    from the last.

    Args:
        student_depth: M.
        teacher_depth: N.

    Returns:
        g(1) .. g(M), counted from 1.

    Raises:
        TypeError: a depth is no integer.
        ValueError: M does not divide N, or a depth is not above 0.

    >>> layer_map(4, 12)
    (3, 6, 9, 12)
    """
    for name, depth in (("student_depth", student_depth), ("teacher_depth", teacher_depth)):
        check_positive(name, depth)
        check_type(name, depth, int)
    if teacher_depth % student_depth:
        fits = [depth for depth in range(1, teacher_depth + 1) if teacher_depth % depth == 0]
        raise ValueError(
            f"student_depth must divide the teacher's {teacher_depth} layers, but got "
            f"{student_depth}. Take one of {fits}."
        )
    step = teacher_depth // student_depth
    return tuple(step * number for number in range(1, student_depth + 1))


def tinybert_losses(teacher: keras.Model, student: keras.Model) -> list[FeatureLoss]:
    """Returns what a student learns from a teacher's inside (Jiao et al. 2020, eq. 11, T > 0).

    The embeddings, and for each of the student's blocks m the attention scores and hidden states of
    the teacher's block g(m). Embeddings have a projection of their own; hidden states share one.

    Args:
        teacher: as `tfaccel.architectures.BERT` makes it, with or without classes.
        student: likewise, of a depth that divides the teacher's, and as many heads.

    Returns:
        2 M + 1 losses for a `Distiller`.

    Raises:
        ValueError: the depths or heads do not fit, or a model has no such layers.
    """
    depths = [
        block_count(role, model) for role, model in (("teacher", teacher), ("student", student))
    ]
    shapes = [
        tuple(model.get_layer("block_0_scores").output.shape)[1:] for model in (teacher, student)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "Attention scores are compared head by head, so teacher and student need as many heads "
            f"and the same length, but have scores {shapes[0]} and {shapes[1]} ([heads, length, "
            "length]). Build the student with the teacher's heads and length."
        )
    losses: list[FeatureLoss] = [
        HiddenStateLoss(_EMBEDDINGS, _EMBEDDINGS, head_name="embedding_projection")
    ]
    for number, taught_by in enumerate(layer_map(depths[1], depths[0])):
        pair = f"block_{taught_by - 1}", f"block_{number}"
        losses += [
            AttentionScoresLoss(*(f"{block}_scores" for block in pair)),
            HiddenStateLoss(*(f"{block}_hidden" for block in pair), head_name="hidden_projection"),
        ]
    return losses


def block_count(role: str, model: keras.Model) -> int:
    """Returns how many blocks a Transformer has that TinyBERT can look into.

    Raises:
        TypeError: it is no Keras model.
        ValueError: it has none.
    """
    check_type(role, model, keras.Model)
    names = {layer.name for layer in model.layers}
    depth = 0
    while {f"block_{depth}_hidden", f"block_{depth}_scores"} <= names:
        depth += 1
    if depth == 0 or _EMBEDDINGS not in names:
        raise ValueError(
            f"The {role} {model.name!r} has no layers 'embeddings', 'block_0_scores' and "
            "'block_0_hidden', which TinyBERT compares. Make it with architectures.BERT(...)."
        )
    return depth
