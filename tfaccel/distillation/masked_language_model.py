"""Pre-training of an encoder on text without labels, by words that it must guess."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from tfaccel.core.checks import check_fraction, check_positive, check_type
from tfaccel.distillation.tokenization import MASK, WORDS_BEGIN, checked_tokens

# Devlin et al. 2019, section 3.1: what becomes of a token that is to be guessed.
_TO_MASK, _TO_RANDOM = 0.8, 0.1


@keras.saving.register_keras_serializable("tfaccel")
class MaskedLanguageModel(keras.Model):
    """Guesses words of a text from the others (Devlin et al. 2019, section 3.1).

    On the encoder's hidden states: a dense layer, GELU, layer normalization, and the product with
    the encoder's own table of embeddings, plus a bias for each word. Only places that are asked for
    are computed.

    Inputs: {"tokens": int [batch, length], "positions": int [batch, places]}. Output: logits
    [batch, places, vocabulary].

    Args:
        encoder: as `tfaccel.architectures.BERT` makes it, without classes. It is a part of this
            model: what trains one trains the other.
        name: of the model.
        kwargs: `dtype` of a Keras model.

    Raises:
        TypeError: the encoder is no Keras model.
        ValueError: it has no "token_embedding", or its outputs are no hidden states.
    """

    def __init__(
        self, encoder: keras.Model, *, name: str = "masked_language_model", **kwargs: Any
    ) -> None:
        check_encoder("encoder", encoder)
        super().__init__(name=name, **kwargs)
        self.encoder = encoder
        width = encoder.output_shape[-1]
        self.transform = layers.Dense(width, "gelu", name="transform", dtype=self.dtype_policy)
        self.norm = layers.LayerNormalization(epsilon=1e-12, name="norm", dtype=self.dtype_policy)
        self.transform.build((None, None, width))
        self.norm.build((None, None, width))
        self.word_bias = self.add_weight(
            shape=(self.vocabulary,), initializer="zeros", name="word_bias"
        )
        self.built = True

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return int(self.encoder.get_layer("token_embedding").input_dim)

    def call(self, inputs: Mapping[str, Any], training: bool | None = None) -> Any:
        """Returns [batch, places, vocabulary]."""
        hidden = self.encoder(inputs["tokens"], training=training)
        places = ops.cast(inputs["positions"], "int32")[..., None]
        x = self.norm(self.transform(ops.take_along_axis(hidden, places, axis=1)))
        table = ops.cast(self.encoder.get_layer("token_embedding").embeddings, x.dtype)
        logits = ops.matmul(x, ops.transpose(table))
        return ops.cast(logits, "float32") + ops.cast(self.word_bias, "float32")

    def get_config(self) -> dict[str, Any]:
        """Returns the encoder, serialized, and the name."""
        return {
            "name": self.name,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            "encoder": keras.saving.serialize_keras_object(self.encoder),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> "MaskedLanguageModel":
        """Returns the model that `get_config` described."""
        restored = {
            key: keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
            if isinstance(value, dict)
            else value
            for key, value in config.items()
        }
        return cls(**restored)


def check_encoder(name: str, encoder: Any) -> None:
    """Checks that `encoder` is an encoder as `BERT` makes it.

    Raises:
        TypeError: it is no Keras model.
        ValueError: it has no "token_embedding", or its outputs are no hidden states.
    """
    check_type(name, encoder, keras.Model)
    names = [layer.name for layer in encoder.layers]
    if "token_embedding" not in names or len(encoder.output_shape) != 3:
        raise ValueError(
            f"{name} must give hidden states [batch, length, width] of tokens, but {encoder.name!r}"
            f" gives {encoder.output_shape}. Make it with architectures.BERT(vocabulary, length), "
            "without classes."
        )


class MaskedTokens(keras.utils.PyDataset):
    """Batches for a `MaskedLanguageModel`, masked anew in each epoch (RoBERTa's dynamic masking).

    Of each text, a share of the words (at least one) is to be guessed: of these, 80 % are replaced
    by [MASK], 10 % by a random word and 10 % are left (Devlin et al. 2019, section 3.1). Special
    tokens are neither asked for nor changed. Texts without any word have the weight 0.

    Args:
        tokens: int [n, length], as `text_tokens` makes them.
        vocabulary: number of different tokens.
        batch_size: texts in a batch.
        mask_share: share of the words to guess.
        seed: of everything that is random.
        kwargs: of `keras.utils.PyDataset`.

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: the tokens have another shape or are out of range, or a number is.
    """

    def __init__(
        self,
        tokens: Any,
        vocabulary: int,
        batch_size: int = 64,
        *,
        mask_share: float = 0.15,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._tokens = checked_tokens(tokens, vocabulary)
        check_positive("batch_size", batch_size)
        check_type("batch_size", batch_size, int)
        check_fraction("mask_share", mask_share)
        check_positive("mask_share", mask_share)
        self._vocabulary = vocabulary
        self._batch_size = batch_size
        self._share = mask_share
        # Masks follow from seed, epoch and batch, in whatever order batches are asked for.
        self._seed = int(np.random.default_rng(seed).integers(2**31))
        self._epoch = 0
        self._order = self._shuffled()

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return math.ceil(len(self._tokens) / self._batch_size)

    def on_epoch_end(self) -> None:
        """Goes on to another order and other masks."""
        self._epoch += 1
        self._order = self._shuffled()

    def _shuffled(self) -> Any:
        return self._random(0).permutation(len(self._tokens))

    def _random(self, place: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, self._epoch, place])

    def __getitem__(self, index: int) -> tuple[dict[str, Any], Any, Any]:
        """Returns a batch: inputs, tokens to guess [batch, places], and their weights."""
        chosen = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        tokens, random = self._tokens[chosen], self._random(1 + index)
        words = tokens >= WORDS_BEGIN
        # As many places for each batch: a graph is made for one shape only.
        places = max(1, round(self._share * tokens.shape[1]))
        keys = np.where(words, random.random(tokens.shape), 2.0)
        positions = np.argsort(keys, axis=1)[:, :places]
        count = words.sum(axis=1)
        wanted = np.minimum(count, np.maximum(1, np.round(self._share * count)))
        weights = np.arange(places) < wanted[:, None]

        targets = np.take_along_axis(tokens, positions, axis=1)
        fate = random.random(targets.shape)
        others = random.integers(WORDS_BEGIN, self._vocabulary, targets.shape)
        shown = np.where(
            fate < _TO_MASK, MASK, np.where(fate < _TO_MASK + _TO_RANDOM, others, targets)
        )
        masked = tokens.copy()
        np.put_along_axis(masked, positions, np.where(weights, shown, targets), axis=1)
        inputs = {"tokens": masked, "positions": positions.astype(np.int32)}
        return inputs, targets, weights.astype(np.float32)


def pretrain(
    encoder: keras.Model,
    tokens: Any,
    *,
    epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    mask_share: float = 0.15,
    seed: int | None = None,
    jit_compile: bool | str = "auto",
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: int | str = 0,
) -> MaskedLanguageModel:
    """Trains an encoder on text without labels: it guesses masked words (Devlin et al. 2019).

    loss = - mean over masked words of log p(word | the other words)

    AdamW, with a rate that rises over the first tenth of the steps and then falls to 0 along a
    cosine. For another course, compile and fit a `MaskedLanguageModel` on `MaskedTokens` yourself.

    Args:
        encoder: as `tfaccel.architectures.BERT` makes it, without classes; trained in place, as
            `fit` does.
        tokens: int [n, length], as `text_tokens` makes them.
        epochs: passes over all texts.
        batch_size: texts in a step.
        learning_rate: highest rate.
        weight_decay: of AdamW.
        mask_share: share of the words to guess.
        seed: of masks and order.
        jit_compile: as in `compile`.
        callbacks: as in `fit`.
        verbose: as in `fit`; nothing is shown by default.

    Returns:
        The whole model, whose `.encoder` is the one given. Its `.history` is what `fit` recorded.

    Raises:
        TypeError: the encoder is no Keras model, or a number is of the wrong type.
        ValueError: the encoder gives no hidden states, or a number or the tokens are out of range.
    """
    check_positive("epochs", epochs)
    check_type("epochs", epochs, int)
    check_positive("learning_rate", learning_rate)
    model = MaskedLanguageModel(encoder, dtype=encoder.dtype_policy)
    batches = MaskedTokens(tokens, model.vocabulary, batch_size, mask_share=mask_share, seed=seed)
    rate = warm_up_and_decay(learning_rate, epochs * batches.num_batches)
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=weight_decay),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=["accuracy"],
        jit_compile=jit_compile,
    )
    model.fit(batches, epochs=epochs, callbacks=list(callbacks), verbose=verbose)
    return model


def warm_up_and_decay(
    learning_rate: float, steps: int
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Returns a rate that rises over a tenth of the steps, then falls to 0 along a cosine."""
    warm_up = max(1, steps // 10)
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        decay_steps=max(1, steps - warm_up),
        warmup_target=learning_rate,
        warmup_steps=warm_up,
    )
