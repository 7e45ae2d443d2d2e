"""TinyBERT: a small Transformer that learns from each part of a large one, in two stages."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfaccel.core.checks import check_positive, check_type
from tfaccel.core.cloning import copy_state
from tfaccel.distillation.distiller import Distiller
from tfaccel.distillation.losses import LogitDistillation
from tfaccel.distillation.masked_language_model import check_encoder, warm_up_and_decay
from tfaccel.distillation.tokenization import checked_tokens
from tfaccel.distillation.transformer_losses import block_count, tinybert_losses


def distill_general(
    teacher: keras.Model,
    student: keras.Model,
    tokens: Any,
    *,
    epochs: int = 3,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int | None = None,
    jit_compile: bool | str = "auto",
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: int | str = 0,
) -> Distiller:
    """Trains a student on the inside of a pre-trained teacher, on text without labels.

    The general stage of TinyBERT (Jiao et al. 2020, section 4.2): embeddings, attention scores and
    hidden states, no prediction. AdamW, with a rate that rises over the first tenth of the steps
    and then falls to 0.

    Args:
        teacher: a pre-trained encoder, not yet trained for a task; not changed.
        student: a smaller one, of as many heads; trained in place, as `fit` does.
        tokens: int [n, length], the text.
        epochs: passes over the text.
        batch_size: texts in a step.
        learning_rate: highest rate.
        weight_decay: of AdamW.
        seed: of the order of the texts.
        jit_compile: as in `compile`.
        callbacks: as in `fit`.
        verbose: as in `fit`; nothing is shown by default.

    Returns:
        The distiller after training, with what it learned beside the student. Its `.student` is
        the one given, its `.history` what `fit` recorded.

    Raises:
        TypeError: a model is no Keras model, or a number is of the wrong type.
        ValueError: the models do not fit each other, or a number or the tokens are out of range.
    """
    check_encoder("teacher", teacher)
    check_encoder("student", student)
    distiller = Distiller(teacher, student, alpha=0.0, losses=tinybert_losses(teacher, student))
    course = _Course(epochs, batch_size, learning_rate, weight_decay, seed, jit_compile)
    course.run(distiller, checked_tokens(tokens), callbacks=list(callbacks), verbose=verbose)
    return distiller


def distill_task(
    teacher: keras.Model,
    student: keras.Model,
    tokens: Any,
    labels: Any = None,
    *,
    intermediate_epochs: int = 10,
    prediction_epochs: int = 3,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    prediction_learning_rate: float | None = None,
    weight_decay: float = 0.01,
    alpha: float = 0.0,
    temperature: float = 1.0,
    general: Distiller | None = None,
    validation_data: tuple[Any, Any] | None = None,
    seed: int | None = None,
    jit_compile: bool | str = "auto",
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: int | str = 0,
) -> Distiller:
    """Trains a student on the inside of a teacher that knows a task, then on its predictions.

    The task stage of TinyBERT (Jiao et al. 2020, section 4.2): first the same losses as in the
    general stage, then the soft cross-entropy of the logits (eq. 10). The text is best augmented
    (`augment_tokens`); labels are not needed, since the teacher says what it thinks of every text.

    Args:
        teacher: a classifier, as `tfaccel.architectures.BERT` makes it; not changed.
        student: a smaller one, of as many heads and classes; trained in place, as `fit` does. For
            both stages, begin with `with_encoder_weights(student, general.student)`.
        tokens: int [n, length], the texts of the task, augmented or not.
        labels: int [n], only needed for alpha above 0; without any, the training's accuracy is the
            agreement with the teacher.
        intermediate_epochs: passes for the inside; 0 leaves the first part out.
        prediction_epochs: passes for the logits; 0 leaves the second part out.
        batch_size: texts in a step.
        learning_rate: highest rate of the first part.
        prediction_learning_rate: of the second part; by default that of the first.
        weight_decay: of AdamW.
        alpha: weight of the labels in the second part, 0 in the paper.
        temperature: of the logits, 1 in the paper.
        general: what `distill_general` returned: its learned projections are taken over.
        validation_data: (tokens, labels) to report the student's accuracy on in the second part.
        seed: of the order of the texts.
        jit_compile: as in `compile`.
        callbacks: as in `fit`, for the second part, such as an EarlyStopping on "val_accuracy" that
            restores the best weights.
        verbose: as in `fit`; nothing is shown by default.

    Returns:
        The distiller of the second part. Its `.student` is the one given, its `.history` what `fit`
        recorded.

    Raises:
        TypeError: a model is no Keras model, or a number is of the wrong type.
        ValueError: the models do not fit each other, both numbers of epochs are 0, labels are
            missing, or a number or the tokens are out of range.
    """
    tokens = checked_tokens(tokens)
    if intermediate_epochs == prediction_epochs == 0:
        raise ValueError("Both numbers of epochs are 0. Give at least one of the parts some.")
    if alpha > 0 and labels is None:
        raise ValueError(f"alpha={alpha} gives weight to labels, but there are none. Give labels=.")
    losses = tinybert_losses(teacher, student)
    # Without what comes behind the last block: nothing tells it anything in the first part.
    inside = Distiller(_body(teacher), _body(student), alpha=0.0, losses=losses)
    prediction = Distiller(
        teacher, student, alpha=alpha, losses=LogitDistillation(temperature=temperature)
    )
    if general is not None:
        take_projections(inside, general)
    if prediction_learning_rate is None:
        prediction_learning_rate = learning_rate
    first, second = (
        _Course(epochs, batch_size, rate, weight_decay, seed, jit_compile) if epochs else None
        for epochs, rate in (
            (intermediate_epochs, learning_rate),
            (prediction_epochs, prediction_learning_rate),
        )
    )
    if first is not None:
        first.run(inside, tokens, verbose=verbose)
    if second is not None:
        logits = teacher.predict(tokens, batch_size=256, verbose=0)  # the same in each epoch
        second.run(
            prediction,
            {"inputs": tokens, "teacher_outputs": logits},
            np.argmax(logits, axis=-1) if labels is None else np.asarray(labels),
            validation_data=validation_data,
            callbacks=list(callbacks),
            verbose=verbose,
        )
    return prediction


def _body(model: keras.Model) -> keras.Model:
    """Returns a model of the same layers that ends with the last block."""
    last = f"block_{block_count('model', model) - 1}_hidden"
    return keras.Model(model.input, model.get_layer(last).output, name=f"{model.name}_body")


def take_projections(target: Distiller, source: Distiller) -> None:
    """Copies what the losses of one distiller have learned to those of another, of equal losses.

    Raises:
        ValueError: they have learned other things, or for other widths.
    """
    shapes = [
        [tuple(weight.shape) for head in distiller.heads for weight in head.weights]
        for distiller in (target, source)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"The projections of {source.name!r} are {shapes[1]}, but {shapes[0]} are needed here. "
            "Both stages need teachers of one width, and students of one width."
        )
    for new, old in zip(target.heads, source.heads, strict=True):
        copy_state(old, new)


def with_encoder_weights(model: keras.Model, encoder: keras.Model) -> keras.Model:
    """Returns a copy of a model that has the weights of an encoder, layer by layer of equal names.

    So a classifier begins with what its encoder learned in pre-training or in the general stage.

    Args:
        model: as `tfaccel.architectures.BERT` makes it, mostly with classes; not changed.
        encoder: another of the same sizes, mostly without classes; not changed.

    Returns:
        A new model; layers that the encoder lacks have the model's own weights.

    Raises:
        TypeError: one is no Keras model.
        ValueError: the encoder has a layer that the model lacks, or of another shape.
    """
    check_type("model", model, keras.Model)
    check_type("encoder", encoder, keras.Model)
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    targets = {layer.name: layer for layer in copy.layers}
    for layer in encoder.layers:
        if not layer.weights:
            continue
        target = targets.get(layer.name)
        shapes = [tuple(weight.shape) for weight in layer.weights]
        found = None if target is None else [tuple(weight.shape) for weight in target.weights]
        if target is None or found != shapes:
            raise ValueError(
                f"{layer.name!r} of the encoder {encoder.name!r} has weights {shapes}, but "
                f"{model.name!r} has {found or 'no such layer'}. Build both with the same sizes."
            )
        target.set_weights(layer.get_weights())
    return copy


@dataclasses.dataclass(frozen=True)
class _Course:
    """How to train in one part of a stage."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int | None
    jit_compile: bool | str

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate"):
            check_positive(name, getattr(self, name))
        for name in ("epochs", "batch_size"):
            check_type(name, getattr(self, name), int)

    def run(self, distiller: Distiller, x: Any, y: Any = None, **options: Any) -> None:
        """Compiles and fits."""
        batches = _Shuffled(x, y, self.batch_size, self.seed)
        rate = warm_up_and_decay(self.learning_rate, self.epochs * batches.num_batches)
        distiller.compile(
            keras.optimizers.AdamW(rate, weight_decay=self.weight_decay),
            None if y is None else keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=None if y is None else ["accuracy"],
            jit_compile=self.jit_compile,
        )
        distiller.fit(batches, epochs=self.epochs, **options)


class _Shuffled(keras.utils.PyDataset):
    """Batches in an order that follows from a seed, another one in each epoch."""

    def __init__(self, x: Any, y: Any, batch_size: int, seed: int | None) -> None:
        super().__init__()
        self._data = (x,) if y is None else (x, y)
        self._size = len(keras.tree.flatten(x)[0])
        self._batch_size = batch_size
        self._random = np.random.default_rng(seed)
        self._order = self._random.permutation(self._size)

    @property
    def num_batches(self) -> int:
        return math.ceil(self._size / self._batch_size)

    def on_epoch_end(self) -> None:
        self._order = self._random.permutation(self._size)

    def __getitem__(self, index: int) -> Any:
        chosen = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        return keras.tree.map_structure(lambda array: array[chosen], self._data)
