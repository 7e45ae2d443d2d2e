"""Words as tokens: which number a word gets, what is special."""

import keras
import numpy as np
import pytest

from tfaccel.distillation.tokenization import (
    FIRST,
    PADDING,
    UNKNOWN,
    text_tokens,
    word_vectorizer,
)

TEXTS = ["the cat sat", "the cat ran off", "the dog , sat"]


def test_words_become_tokens():
    vectorizer = word_vectorizer(TEXTS, 8, 5, standardize="lower")
    words = vectorizer.get_vocabulary()
    assert words[:5] == ["", "[UNK]", "[CLS]", "[MASK]", "the"]
    assert len(words) == 8
    assert set(words[5:7]) == {"cat", "sat"}  # twice each, all others once
    the, cat, sat = (words.index(word) for word in ("the", "cat", "sat"))
    found = text_tokens(vectorizer, ["The cat flew", "sat", "the cat sat the cat sat"])
    assert found.dtype == np.int32
    assert found.tolist() == [
        [FIRST, the, cat, UNKNOWN, PADDING],
        [FIRST, sat, PADDING, PADDING, PADDING],
        [FIRST, the, cat, sat, the],
    ]


def test_special_words_in_the_text_are_no_special_tokens_twice():
    texts = ["[CLS] a [MASK] b"] * 3
    vectorizer = word_vectorizer(texts, 20, 6, standardize=None)
    assert vectorizer.get_vocabulary()[2:4] == ["[CLS]", "[MASK]"]
    assert sorted(vectorizer.get_vocabulary()[4:]) == ["a", "b"]


def test_the_vectorizer_survives_its_config():
    vectorizer = word_vectorizer(TEXTS, 20, 5)
    again = keras.layers.TextVectorization.from_config(vectorizer.get_config())
    np.testing.assert_array_equal(text_tokens(again, TEXTS), text_tokens(vectorizer, TEXTS))


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: word_vectorizer("one text"), TypeError, "several strings"),
        (lambda: word_vectorizer([]), ValueError, "empty"),
        (lambda: word_vectorizer(TEXTS, 4), ValueError, "vocabulary must be above 4"),
        (lambda: word_vectorizer(TEXTS, length=1), ValueError, "length must be above 1"),
        (
            lambda: text_tokens(keras.layers.TextVectorization(vocabulary=["a", "b"]), TEXTS),
            ValueError,
            r"no \[CLS\]",
        ),
    ],
)
def test_text_errors(call, error, told):
    with pytest.raises(error, match=told):
        call()
