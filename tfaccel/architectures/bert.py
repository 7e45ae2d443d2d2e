"""BERT: a Transformer encoder whose inside can be looked at."""

import itertools
from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from tfaccel.architectures.attention_parts import (
    AttentionMix,
    AttentionScores,
    FirstToken,
    PositionEmbedding,
    TokenMask,
)
from tfaccel.core.checks import check_fraction, check_positive, check_type

# Both as in the paper's code.
_EPSILON = 1e-12
_SPREAD = 0.02


def BERT(  # noqa: N802  named as in keras.applications
    vocabulary: int,
    length: int,
    *,
    depth: int = 12,
    width: int = 768,
    heads: int = 12,
    feed_forward: int | None = None,
    segments: int = 0,
    classes: int | None = None,
    dropout: float = 0.1,
    seed: int | None = None,
    name: str = "bert",
) -> keras.Model:
    """Builds a BERT encoder (Devlin et al. 2019), of base size by default.

    Embeddings of tokens and learned positions, then blocks of self-attention and feed-forward
    (GELU), each with a residual around it and layer normalization behind it. What a distillation
    compares is the output of a layer each, found by `model.get_layer(name)`:

    - "embeddings": [batch, length, width], what goes into the first block
    - "block_0_scores", "block_1_scores", ...: attention scores before the softmax,
      [batch, heads, length, length]
    - "block_0_hidden", "block_1_hidden", ...: what comes out of a block, [batch, length, width]

    Token 0 is padding: nobody attends to it, and all of these are 0 there.

    Args:
        vocabulary: number of different tokens, padding among them.
        length: tokens in a sequence, the first of them [CLS].
        depth: blocks.
        width: features of a token.
        heads: attention heads, of width / heads features each.
        feed_forward: width of the hidden layer of feed-forward; by default 4 * width.
        segments: kinds of segments (BERT has 2, for pairs of sentences), told by a second input
            [batch, length] of integers; 0 for no such input.
        classes: None for the hidden states of the last block; else logits of so many classes, from
            the first token through a dense layer with tanh (the pooler).
        dropout: share of features dropped behind the embeddings and all parts of a block, and of
            attention, in training.
        seed: of initial weights and dropout.
        name: name of the model.

    Returns:
        A new model from tokens, int32 [batch, length], to hidden states [batch, length, width] or
        logits [batch, classes].

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: an argument is out of range, or the heads do not divide the width.

    >>> model = BERT(100, 16, depth=2, width=8, heads=2, classes=3)
    >>> model.output_shape, model.get_layer("block_1_scores").output.shape
    ((None, 3), (None, 2, 16, 16))
    """
    feed_forward = 4 * width if feed_forward is None else feed_forward
    sizes = {
        "vocabulary": vocabulary,
        "length": length,
        "depth": depth,
        "width": width,
        "heads": heads,
        "feed_forward": feed_forward,
        **({} if classes is None else {"classes": classes}),
        **({} if segments == 0 else {"segments": segments}),
    }
    for size_name, size in sizes.items():
        check_positive(size_name, size)
        check_type(size_name, size, int)
    check_fraction("dropout", dropout)
    if width % heads:
        raise ValueError(f"heads must divide the width, but got {heads} heads of {width} features.")

    next_seed = _seeds(seed)
    tokens = keras.Input((length,), dtype="int32", name="tokens")
    inputs = [tokens]
    mask = TokenMask(name="mask")(tokens)
    x = layers.Embedding(vocabulary, width, _normal(next_seed()), name="token_embedding")(tokens)
    if segments:
        inputs.append(keras.Input((length,), dtype="int32", name="segments"))
        table = layers.Embedding(segments, width, _normal(next_seed()), name="segment_embedding")
        x = layers.Add(name="with_segments")([x, table(inputs[-1])])
    x = PositionEmbedding(_normal(next_seed()), name="position_embedding")(x)
    x = layers.LayerNormalization(epsilon=_EPSILON, name="embedding_norm")(x)
    x = layers.Multiply(name="embeddings")([x, mask])
    x = _drop(x, dropout, next_seed, "embedding_dropout")
    for number in range(depth):
        x = _block(x, mask, heads, feed_forward, dropout, next_seed, f"block_{number}")
    if classes is not None:
        x = FirstToken(name="first_token")(x)
        x = layers.Dense(width, kernel_initializer=_normal(next_seed()), name="pooler")(x)
        x = layers.Activation("tanh", name="pooler_tanh")(x)
        x = _drop(x, dropout, next_seed, "pooler_dropout")
        x = layers.Dense(classes, kernel_initializer=_normal(next_seed()), name="logits")(x)
    return keras.Model(inputs if segments else tokens, x, name=name)


def _block(
    x: Any,
    mask: Any,
    heads: int,
    feed_forward: int,
    dropout: float,
    next_seed: Callable[[], int | None],
    name: str,
) -> Any:
    """Self-attention and feed-forward.

    Args:
        x: [batch, length, width].
        mask: [batch, length, 1].
        heads: attention heads.
        feed_forward: width of the hidden layer.
        dropout: share dropped.
        next_seed: gives a new seed with each call.
        name: beginning of all names.

    Returns:
        [batch, length, width].
    """
    width = x.shape[-1]

    def dense(units: int, part: str, inputs: Any) -> Any:
        initializer = _normal(next_seed())
        return layers.Dense(units, kernel_initializer=initializer, name=f"{name}_{part}")(inputs)

    query, key, value = (dense(width, part, x) for part in ("query", "key", "value"))
    scores = AttentionScores(heads, name=f"{name}_scores")([query, key, mask])
    mix = AttentionMix(dropout, seed=next_seed(), name=f"{name}_mix")
    y = dense(width, "attention", mix([scores, value, mask]))
    y = _drop(y, dropout, next_seed, f"{name}_attention_dropout")
    x = layers.Add(name=f"{name}_attention_sum")([x, y])
    x = layers.LayerNormalization(epsilon=_EPSILON, name=f"{name}_attention_norm")(x)
    y = dense(feed_forward, "expand", x)
    y = layers.Activation("gelu", name=f"{name}_gelu")(y)
    y = _drop(dense(width, "shrink", y), dropout, next_seed, f"{name}_dropout")
    x = layers.Add(name=f"{name}_sum")([x, y])
    x = layers.LayerNormalization(epsilon=_EPSILON, name=f"{name}_norm")(x)
    return layers.Multiply(name=f"{name}_hidden")([x, mask])


def _drop(x: Any, dropout: float, next_seed: Callable[[], int | None], name: str) -> Any:
    return layers.Dropout(dropout, seed=next_seed(), name=name)(x) if dropout else x


def _normal(seed: int | None) -> keras.initializers.Initializer:
    return keras.initializers.TruncatedNormal(stddev=_SPREAD, seed=seed)


def _seeds(seed: int | None) -> Callable[[], int | None]:
    """Returns a function that gives another seed with each call, all decided by the first."""
    numbers = itertools.count()
    return lambda: None if seed is None else 1000 * seed + next(numbers)
