"""Several teachers as one."""

from collections.abc import Sequence
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.checks import check_in, check_model, check_positive, check_type
from tfaccel.distillation.losses import LogitDistillation

_COMBINE = ("mean", "mean_logits", "confidence")
_LEAST_ENTROPY = 1e-7  # nats; where all teachers are sure, they count alike


def ensemble(
    teachers: Sequence[keras.Model],
    combine: str = "mean",
    temperature: float = 1.0,
    *,
    name: str = "ensemble",
) -> keras.Model:
    """Returns a model whose logits are what several teachers say together.

    mean: T · log(mean of softmax(zₖ / T)) (Hinton 2015, the arithmetic mean of the distributions)
    mean_logits: mean of zₖ (the geometric mean, at every temperature alike)
    confidence: T · log(Σ wₖ softmax(zₖ / T)), wₖ = (1 - Hₖ / ΣH) / (K - 1)

    Hₖ is the entropy of softmax(zₖ), so that for each sample the sure teachers count more (Kwon
    2020, "Adaptive Knowledge Distillation Based on Entropy", in the form that Zhang 2022 compares
    with). The weights of Zhang 2022 itself come from each teacher's cross-entropy and need the
    labels, which a model does not see.

    The mean of softened distributions is not the softened mean of distributions. With the
    temperature of the loss, `LogitDistillation(T)` teaches exactly the mean of the softened ones;
    with 1, softmax of these logits is the mean of the teachers' probabilities, as for predictions.

    The model shares the teachers' weights and changes nothing about them. All is computed in
    float32, from logarithms.

    Args:
        teachers: two or more Functional or Sequential models of the same inputs, which give logits,
            [batch, ..., classes], of the same shapes. Several outputs are combined each by itself.
        combine: "mean", "mean_logits" or "confidence".
        temperature: T, that of the loss which learns from these logits.
        name: of the model.

    Raises:
        TypeError: a teacher is no Functional or Sequential model.
        ValueError: there are fewer than two, they differ in inputs or outputs, one gives
            probabilities instead of logits, or an argument makes no sense.

    >>> teachers = [keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]) for _ in "ab"]
    >>> ensemble(teachers, "confidence").output_shape
    (None, 3)
    """
    check_in("combine", combine, _COMBINE)
    check_positive("temperature", temperature)
    check_type("teachers", teachers, (list, tuple))
    if len(teachers) < 2:
        raise ValueError(
            f"ensemble() needs two teachers or more, but got {len(teachers)}. "
            "One teacher is a Distiller's teacher by itself."
        )
    for teacher in teachers:
        check_model(teacher, "ensemble")
        LogitDistillation().validate_model_compatibility(teacher, teacher)
        _check_alike("inputs", teachers[0], teacher)
        _check_alike("outputs", teachers[0], teacher)
    inputs = keras.tree.map_structure(
        lambda tensor: keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name),
        keras_private.functional_of(teachers[0]).input,
    )
    said = [keras.tree.flatten(teacher(inputs)) for teacher in _with_own_names(teachers)]
    combined = [
        CombinedLogits(combine, temperature, name=f"{name}_logits_{place}" if place else None)(
            list(logits)
        )
        for place, logits in enumerate(zip(*said, strict=True))
    ]
    structure = keras_private.functional_of(teachers[0]).output
    return keras.Model(inputs, keras.tree.pack_sequence_as(structure, combined), name=name)


@keras.saving.register_keras_serializable("tfaccel")
class CombinedLogits(keras.layers.Layer):
    """Logits of several teachers made one, as `ensemble` describes it.

    Args:
        combine: "mean", "mean_logits" or "confidence".
        temperature: T.
    """

    def __init__(self, combine: str = "mean", temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.combine = combine
        self.temperature = float(temperature)

    def call(self, inputs: Sequence[Any]) -> Any:
        """Returns the combined logits.

        Args:
            inputs: logits of each teacher, [batch, ..., classes].

        Returns:
            [batch, ..., classes] float32.
        """
        ops = keras.ops
        logits = ops.stack([ops.cast(each, "float32") for each in inputs])
        if self.combine == "mean_logits":
            return ops.mean(logits, axis=0)
        said = ops.log_softmax(logits / self.temperature, axis=-1)
        if self.combine == "confidence":
            said = said + ops.log(_confidence(logits))
        else:
            said = said - ops.log(ops.cast(len(inputs), "float32"))
        return self.temperature * ops.logsumexp(said, axis=0)

    def compute_output_shape(self, input_shape: Sequence[Any]) -> tuple[int | None, ...]:
        """Returns the shape of one teacher's logits."""
        return tuple(input_shape[0])

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "combine": self.combine,
            "temperature": self.temperature,
        }


def _confidence(logits: Any) -> Any:
    """Returns the teachers' weights, [teachers, batch, ..., 1], with sum 1 over the teachers."""
    ops = keras.ops
    logs = ops.log_softmax(logits, axis=-1)
    entropy = -ops.sum(ops.exp(logs) * logs, axis=-1, keepdims=True)
    entropy = ops.maximum(entropy, 0.0) + _LEAST_ENTROPY
    others = ops.sum(entropy, axis=0, keepdims=True) - entropy
    return others / ops.sum(others, axis=0, keepdims=True)


def _with_own_names(teachers: Sequence[keras.Model]) -> list[keras.Model]:
    """Returns the teachers, those of a taken name as models of another name of the same layers."""
    taken: set[str] = set()
    named = []
    for teacher in teachers:
        name, count = teacher.name, 1
        while name in taken:
            count += 1
            name = f"{teacher.name}_{count}"
        taken.add(name)
        if name != teacher.name:
            functional = keras_private.functional_of(teacher)
            teacher = keras.Model(functional.input, functional.output, name=name)  # noqa: PLW2901
        named.append(teacher)
    return named


def _check_alike(side: str, first: keras.Model, other: keras.Model) -> None:
    one, two = (
        getattr(keras_private.functional_of(model), side.removesuffix("s"))
        for model in (first, other)
    )
    same = _names(one) == _names(two) and all(
        tuple(a.shape) == tuple(b.shape) and (side == "outputs" or a.dtype == b.dtype)
        for a, b in zip(keras.tree.flatten(one), keras.tree.flatten(two), strict=True)
    )
    if not same:
        raise ValueError(
            f"The teachers of an ensemble need the same {side}, but {first.name!r} has "
            f"{_described(one)} and {other.name!r} has {_described(two)}. Adapt one of them with a "
            "model of its own around it."
        )


def _names(tensors: Any) -> Any:
    """Returns the structure of tensors alone: the keys of a dict, the places of a list."""
    if isinstance(tensors, dict):
        return {key: _names(each) for key, each in tensors.items()}
    if isinstance(tensors, (list, tuple)):
        return [_names(each) for each in tensors]
    return None


def _described(tensors: Any) -> str:
    return str(keras.tree.map_structure(lambda t: f"{tuple(t.shape)} {t.dtype}", tensors))
