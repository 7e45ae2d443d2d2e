"""More text for a student to learn from: words replaced by others that would fit."""

from typing import Any

import numpy as np

from tfaccel.core.checks import check_fraction, check_positive, check_type
from tfaccel.distillation.masked_language_model import MaskedLanguageModel
from tfaccel.distillation.tokenization import MASK, WORDS_BEGIN, checked_tokens


def word_candidates(
    model: MaskedLanguageModel, tokens: Any, candidates: int = 15, *, batch_size: int = 256
) -> Any:
    """Returns the words that a masked language model finds most likely at each place of each text.

    Each word alone is masked, all others stay. Special tokens are no candidates.

    Args:
        model: as `pretrain` returns it.
        tokens: int [n, length], as `text_tokens` makes them.
        candidates: K, words for each place, the likeliest first.
        batch_size: masked texts that the model sees at once.

    Returns:
        int32 [n, length, candidates]. At special tokens there is the token itself only.

    Raises:
        TypeError: the model is of another kind, or a number is of the wrong type.
        ValueError: a number or the tokens are out of range.
    """
    check_type("model", model, MaskedLanguageModel)
    tokens = checked_tokens(tokens, model.vocabulary)
    for name, number in (("candidates", candidates), ("batch_size", batch_size)):
        check_positive(name, number)
        check_type(name, number, int)
    words = model.vocabulary - WORDS_BEGIN
    if candidates > words:
        raise ValueError(
            f"candidates must be at most the {words} words that the model knows, but got "
            f"{candidates}."
        )
    found = np.repeat(tokens[:, :, None], candidates, axis=2)
    texts, places = np.nonzero(tokens >= WORDS_BEGIN)
    for begin in range(0, len(texts), batch_size):
        rows, columns = texts[begin : begin + batch_size], places[begin : begin + batch_size]
        found[rows, columns] = _likeliest(model, tokens[rows], columns, candidates, batch_size)
    return found


def _likeliest(
    model: MaskedLanguageModel, tokens: Any, places: Any, candidates: int, batch_size: int
) -> Any:
    """Returns the likeliest words at one place of each text, int [texts, candidates]."""
    count = len(tokens)
    # The last batch is filled up, since another shape would mean another graph.
    fill = np.arange(batch_size) % count
    masked, places = tokens[fill], places[fill].astype(np.int32)
    masked[np.arange(batch_size), places] = MASK
    inputs = {"tokens": masked, "positions": places[:, None]}
    logits = np.asarray(model.predict_on_batch(inputs))[:count, 0, WORDS_BEGIN:]
    top = np.argpartition(-logits, candidates - 1, axis=1)[:, :candidates]
    order = np.argsort(-np.take_along_axis(logits, top, axis=1), axis=1, kind="stable")
    return WORDS_BEGIN + np.take_along_axis(top, order, axis=1)


def substitute(
    tokens: Any,
    candidates: Any,
    *,
    copies: int = 20,
    probability: float = 0.4,
    seed: int | None = None,
) -> Any:
    """Returns copies of texts in which some words are replaced by one of their candidates.

    The second half of algorithm 1 of Jiao et al. 2020: each word is replaced with a probability, by
    any of its candidates alike.

    Args:
        tokens: int [n, length].
        candidates: int [n, length, K], as `word_candidates` returns them.
        copies: N_a, of each text.
        probability: p_t, of a word to be replaced.
        seed: of the choice.

    Returns:
        int32 [n * copies, length]; the copies of a text follow each other, so that their labels are
        `numpy.repeat(labels, copies)`.

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: a number or the tokens are out of range, or the candidates are for other texts.
    """
    tokens = checked_tokens(tokens)
    candidates = np.asarray(candidates)
    check_positive("copies", copies)
    check_type("copies", copies, int)
    check_fraction("probability", probability, closed_right=True)
    if candidates.ndim != 3 or candidates.shape[:2] != tokens.shape:
        raise ValueError(
            f"candidates must be [texts, length, K] for tokens {tokens.shape}, but got "
            f"{candidates.shape}. Make them with word_candidates(model, tokens)."
        )
    random = np.random.default_rng(seed)
    copied = np.repeat(tokens, copies, axis=0)
    replaced = (random.random(copied.shape) < probability) & (copied >= WORDS_BEGIN)
    rows, columns = np.nonzero(replaced)
    choice = random.integers(candidates.shape[2], size=len(rows))
    copied[rows, columns] = candidates[rows // copies, columns, choice]
    return copied


def augment_tokens(
    model: MaskedLanguageModel,
    tokens: Any,
    *,
    copies: int = 20,
    probability: float = 0.4,
    candidates: int = 15,
    batch_size: int = 256,
    seed: int | None = None,
) -> Any:
    """Returns copies of texts with words replaced by what a masked language model would put there.

    Algorithm 1 of Jiao et al. 2020, "TinyBERT". All tokens here are whole words, so that the
    paper's second source of candidates, word vectors for words of several pieces, has no part in
    it. What a masked word's candidates are does not depend on the copy, so they are found once.

    Args:
        model: as `pretrain` returns it.
        tokens: int [n, length], as `text_tokens` makes them.
        copies: N_a, of each text.
        probability: p_t, of a word to be replaced.
        candidates: K, likeliest words that one is drawn from.
        batch_size: masked texts that the model sees at once.
        seed: of the choice.

    Returns:
        int32 [n * copies, length], without the texts themselves; the copies of a text follow each
        other, so that their labels are `numpy.repeat(labels, copies)`.

    Raises:
        TypeError: the model is of another kind, or a number is of the wrong type.
        ValueError: a number or the tokens are out of range.
    """
    check_positive("copies", copies)
    check_fraction("probability", probability, closed_right=True)
    found = word_candidates(model, tokens, candidates, batch_size=batch_size)
    return substitute(tokens, found, copies=copies, probability=probability, seed=seed)
