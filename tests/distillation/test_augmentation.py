"""Augmentation by masked words: which candidates, which words, how many."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfaccel.architectures.bert import BERT
from tfaccel.distillation.augmentation import augment_tokens, substitute, word_candidates
from tfaccel.distillation.masked_language_model import MaskedLanguageModel
from tfaccel.distillation.tokenization import MASK, WORDS_BEGIN

VOCABULARY, LENGTH = 20, 6
TOKENS = np.array([[2, 5, 9, 1, 4, 0], [2, 19, 0, 0, 0, 0], [2, 7, 7, 7, 7, 7]], "int32")


@pytest.fixture(scope="module")
def model():
    found = MaskedLanguageModel(BERT(VOCABULARY, LENGTH, depth=1, width=8, heads=2, dropout=0.0))
    random = np.random.default_rng(0)
    found.set_weights([random.normal(size=w.shape) for w in found.get_weights()])
    return found


@pytest.mark.parametrize("batch_size", [4, 64])
def test_candidates_are_the_likeliest_words_at_a_place_masked_alone(model, batch_size):
    found = word_candidates(model, TOKENS, 5, batch_size=batch_size)
    assert found.shape == (3, LENGTH, 5)
    assert found.dtype == np.int32
    for text, place in np.ndindex(*TOKENS.shape):
        if TOKENS[text, place] < WORDS_BEGIN:
            assert (found[text, place] == TOKENS[text, place]).all()
            continue
        masked = TOKENS[text : text + 1].copy()
        masked[0, place] = MASK
        inputs = {"tokens": masked, "positions": np.array([[place]], "int32")}
        logits = np.asarray(model(inputs))[0, 0]
        expected = [word for word in np.argsort(-logits) if word >= WORDS_BEGIN][:5]
        assert found[text, place].tolist() == expected


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31 - 1),
    copies=st.integers(1, 5),
    probability=st.floats(0, 1),
    kinds=st.integers(1, 4),
)
def test_only_words_change_and_only_into_their_candidates(seed, copies, probability, kinds):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 12, (4, 5)).astype("int32")
    candidates = random.integers(100, 200, (4, 5, kinds))
    found = substitute(tokens, candidates, copies=copies, probability=probability, seed=seed)
    assert found.shape == (4 * copies, 5)
    for row, text in enumerate(found):
        original = row // copies
        changed = text != tokens[original]
        assert (tokens[original][changed] >= WORDS_BEGIN).all()
        for place in np.nonzero(changed)[0]:
            assert text[place] in candidates[original, place]
        if probability == 1:
            assert (changed == (tokens[original] >= WORDS_BEGIN)).all()
        if probability == 0:
            assert not changed.any()
    again = substitute(tokens, candidates, copies=copies, probability=probability, seed=seed)
    np.testing.assert_array_equal(found, again)


def test_how_often_words_change_and_into_what():
    tokens = np.full((2000, 10), 50, "int32")
    candidates = np.tile(np.arange(100, 115), (2000, 10, 1))
    found = substitute(tokens, candidates, copies=1, seed=1)
    changed = found != 50
    # Four standard deviations of 20,000 draws with p = 0.4.
    assert changed.mean() == pytest.approx(0.4, abs=0.014)
    counts = np.bincount(found[changed] - 100, minlength=15)
    assert np.abs(counts / changed.sum() - 1 / 15).max() < 0.012
    other = substitute(tokens, candidates, copies=1, seed=2)
    assert (found != other).any()


def test_copies_follow_their_text_and_nothing_given_is_changed(model):
    before = TOKENS.copy()
    found = augment_tokens(model, TOKENS, copies=3, probability=1.0, candidates=4, seed=0)
    np.testing.assert_array_equal(TOKENS, before)
    np.testing.assert_array_equal(found < WORDS_BEGIN, np.repeat(TOKENS, 3, axis=0) < WORDS_BEGIN)
    candidates = word_candidates(model, TOKENS, 4)
    for row, text in enumerate(found):
        for place, word in enumerate(text):
            assert word in candidates[row // 3, place]


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"copies": 0}, ValueError, "copies"),
        ({"probability": 1.5}, ValueError, "probability"),
        ({"candidates": 17}, ValueError, "at most the 16 words"),
        ({"candidates": 2.0}, TypeError, "candidates"),
        ({"batch_size": 0}, ValueError, "batch_size"),
    ],
)
def test_errors(model, options, error, told):
    with pytest.raises(error, match=told):
        augment_tokens(model, TOKENS, **options)


def test_more_errors(model):
    with pytest.raises(TypeError, match="MaskedLanguageModel"):
        augment_tokens(model.encoder, TOKENS)
    with pytest.raises(ValueError, match=r"for tokens \(3, 6\)"):
        substitute(TOKENS, np.zeros((2, 6, 4), int))
