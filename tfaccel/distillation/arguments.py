"""The arguments of a distiller, checked and in one form."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import keras

from tfaccel.core.checks import check_number, check_type
from tfaccel.distillation.losses import LogitDistillation

# A number or a keras.optimizers.schedules.LearningRateSchedule; to mypy, Keras has no types.
Weight: TypeAlias = float | Any


def check_built(role: str, model: keras.Model) -> None:
    """Raises ValueError unless the teacher or student has weights."""
    if not model.built:
        raise ValueError(
            f"Distiller needs a built {role}, but {model.name!r} has no weights yet. "
            f"Call {model.name}.build(input_shape) or run one batch first."
        )


def check_same_shapes(side: str, teacher: keras.Model, student: keras.Model) -> None:
    """Raises ValueError unless two models have inputs, or outputs, of the same shapes."""
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


def list_losses(losses: Any, temperature: float | None) -> list[Any]:
    """Returns the losses as a list, `LogitDistillation` for none.

    Raises:
        TypeError: one is no `keras.distillation.DistillationLoss`.
        ValueError: there is none, or the temperature is for nothing.
    """
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


def list_weights(weights: Sequence[Weight] | None, losses: list[Any]) -> list[Weight]:
    """Returns a weight for each loss, 1 for None.

    Raises:
        TypeError: one is neither a number nor a schedule.
        ValueError: not one for each loss.
    """
    if weights is None:
        return [1.0] * len(losses)
    if len(weights) != len(losses):
        raise ValueError(
            "loss_weights needs one weight for each loss, but got "
            f"{len(weights)} for {len(losses)}."
        )
    for weight in weights:
        if not is_schedule(weight):
            check_number("loss_weights", weight)
    return [weight if is_schedule(weight) else float(weight) for weight in weights]


def is_schedule(weight: Any) -> bool:
    """Whether a weight changes with the batches seen."""
    return isinstance(weight, keras.optimizers.schedules.LearningRateSchedule)


def serialize_weight(weight: Weight) -> Any:
    """Returns a number, or a schedule's Keras config."""
    return keras.saving.serialize_keras_object(weight) if is_schedule(weight) else weight
