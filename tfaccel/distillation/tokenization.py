"""Words of a text as numbers."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from tfaccel.core.checks import check_type

PADDING, UNKNOWN, FIRST, MASK = range(4)
WORDS_BEGIN = 4
"""Tokens below are special: padding, unknown word, [CLS] and [MASK]."""

_SPECIAL_WORDS = ("[CLS]", "[MASK]")


def word_vectorizer(
    texts: Sequence[str],
    vocabulary: int = 10_000,
    length: int = 128,
    *,
    standardize: str | None = "lower_and_strip_punctuation",
) -> keras.layers.TextVectorization:
    """Returns a Keras layer that turns texts into tokens, one for each word, learned from texts.

    A word is what stands between white space. Token 0 is padding, 1 is any word that is not in the
    vocabulary, 2 stands for [CLS] and 3 for [MASK]; the most frequent word is 4. `text_tokens` puts
    [CLS] in front.

    Args:
        texts: what the vocabulary is taken from.
        vocabulary: tokens at most, special ones among them; rarer words are unknown.
        length: tokens of a text with [CLS]; longer ones are cut off, shorter ones padded.
        standardize: as in `keras.layers.TextVectorization`: "lower_and_strip_punctuation", "lower"
            (for texts whose punctuation is set apart by spaces already) or None.

    Raises:
        TypeError: `texts` is one string, or a number is of the wrong type.
        ValueError: there are no texts, or a number leaves no room for words.

    >>> vectorizer = word_vectorizer(["a good film", "a bad film"], 100, 5)
    >>> list(map(str, vectorizer.get_vocabulary()))
    ['', '[UNK]', '[CLS]', '[MASK]', 'film', 'a', 'good', 'bad']
    >>> text_tokens(vectorizer, ["A good joke."]).tolist()
    [[2, 5, 6, 1, 0]]
    """
    texts = _checked_texts(texts)
    for name, number, least in (("vocabulary", vocabulary, WORDS_BEGIN), ("length", length, 1)):
        check_type(name, number, int)
        if number <= least:
            raise ValueError(f"{name} must be above {least}, but got {number}.")
    counting = layers.TextVectorization(
        vocabulary - len(_SPECIAL_WORDS), standardize=standardize, name="counting"
    )
    counting.adapt(texts)
    words = [word for word in counting.get_vocabulary()[2:] if word not in _SPECIAL_WORDS]
    return layers.TextVectorization(
        standardize=standardize,
        output_sequence_length=length - 1,
        vocabulary=[*_SPECIAL_WORDS, *words],
        name="words",
    )


def text_tokens(
    vectorizer: keras.layers.TextVectorization, texts: Sequence[str]
) -> "np.ndarray[Any, np.dtype[np.int32]]":
    """Returns the tokens of texts, [CLS] in front.

    Args:
        vectorizer: as `word_vectorizer` makes it.
        texts: n strings.

    Returns:
        int32 [n, length].

    Raises:
        TypeError: `texts` is one string.
        ValueError: there are no texts, or the vectorizer is of another kind.
    """
    check_type("vectorizer", vectorizer, layers.TextVectorization)
    if tuple(vectorizer.get_vocabulary()[FIRST:WORDS_BEGIN]) != _SPECIAL_WORDS:
        raise ValueError(
            f"The vocabulary of {vectorizer.name!r} has no [CLS] and [MASK]. Make the layer with "
            "word_vectorizer(texts)."
        )
    words = np.asarray(vectorizer(np.array(_checked_texts(texts))))
    first = np.full((len(words), 1), FIRST)
    return np.concatenate([first, words], axis=1).astype(np.int32)


def _checked_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"texts must be several strings, but got one: {texts!r}. Put it in a list.")
    listed = [str(text) for text in texts]
    if not listed:
        raise ValueError("texts is empty. Give at least one.")
    return listed


def checked_tokens(tokens: Any, vocabulary: int | None = None) -> Any:
    """Returns tokens as int32 [n, length].

    Raises:
        ValueError: they have another shape, are no integers, or are out of range.
    """
    array = np.asarray(tokens)
    if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"tokens must be integers [texts, length], but got {array.dtype} {array.shape}. Make "
            "them with text_tokens(vectorizer, texts)."
        )
    if array.min() < 0 or (vocabulary is not None and array.max() >= vocabulary):
        raise ValueError(
            f"tokens must be in 0..{'' if vocabulary is None else vocabulary - 1}, but got "
            f"{array.min()} to {array.max()}. Give the encoder the size of the vectorizer's "
            "vocabulary."
        )
    return array.astype(np.int32)
