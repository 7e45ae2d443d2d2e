"""Pre-training on text: tokens, masks, the model, its training."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from tfaccel.architectures.bert import BERT
from tfaccel.core.artifacts import load_model
from tfaccel.distillation.masked_language_model import (
    MaskedLanguageModel,
    MaskedTokens,
    pretrain,
)
from tfaccel.distillation.tokenization import FIRST, MASK, PADDING, WORDS_BEGIN

SIZES = {"depth": 1, "width": 8, "heads": 2, "dropout": 0.0, "seed": 0}


def encoder(vocabulary=12, length=6, **options):
    return BERT(vocabulary, length, **{**SIZES, **options})


def some_tokens(batch=64, length=6, vocabulary=12):
    random = np.random.default_rng(0)
    ids = random.integers(WORDS_BEGIN, vocabulary, (batch, length)).astype("int32")
    ids[np.arange(length)[None] >= random.integers(3, length + 1, (batch, 1))] = PADDING
    ids[:, 0] = FIRST
    return ids


@settings(max_examples=30)
@given(
    length=st.integers(2, 30),
    share=st.floats(0.05, 0.9),
    seed=st.integers(0, 2**31 - 1),
    batch=st.integers(1, 9),
)
def test_masks_keep_what_they_must(length, share, seed, batch):
    random = np.random.default_rng(seed)
    ids = random.integers(0, 50, (7, length)).astype("int32")
    batches = MaskedTokens(ids, 50, batch, mask_share=share, seed=seed)
    seen = []
    for number in range(batches.num_batches):
        inputs, targets, weights = batches[number]
        shown, positions = inputs["tokens"], inputs["positions"]
        for row in range(len(shown)):
            chosen = positions[row][weights[row] > 0]
            original = shown[row].copy()
            original[chosen] = targets[row][weights[row] > 0]
            seen.append(original)
            words = original >= WORDS_BEGIN
            wanted = 0 if not words.any() else max(1, round(share * words.sum()))
            places = max(1, round(share * length))
            assert len(chosen) == len(set(chosen)) == min(wanted, places)
            assert words[chosen].all()
            assert ((shown[row][chosen] == MASK) | (shown[row][chosen] >= WORDS_BEGIN)).all()
    assert sorted(map(tuple, seen)) == sorted(map(tuple, ids))  # all else is as it was, each once


def test_masks_are_80_10_10_and_new_in_each_epoch():
    random = np.random.default_rng(0)
    ids = random.integers(WORDS_BEGIN, 1004, (1000, 100)).astype("int32")
    batches = MaskedTokens(ids, 1004, 1000, seed=3)
    inputs, targets, weights = batches[0]
    assert weights.mean() == 1.0
    assert targets.shape == (1000, 15)
    shown = np.take_along_axis(inputs["tokens"], inputs["positions"], axis=1)
    # Four standard deviations of 15,000 draws; a random word is the old one in 1 of 1,000 cases.
    assert (shown == MASK).mean() == pytest.approx(0.8, abs=0.013)
    assert (shown == targets).mean() == pytest.approx(0.1 + 0.1 / 1000, abs=0.01)
    assert np.bincount(inputs["positions"].ravel(), minlength=100).min() > 100  # of 150
    again = MaskedTokens(ids, 1004, 1000, seed=3)
    np.testing.assert_array_equal(again[0][0]["tokens"], inputs["tokens"])
    again.on_epoch_end()
    assert (again[0][0]["tokens"] != inputs["tokens"]).mean() > 0.5


def test_logits_are_those_of_the_formula_with_the_encoders_own_table():
    body = encoder()
    random = np.random.default_rng(2)
    model = MaskedLanguageModel(body)
    model.set_weights([random.normal(size=w.shape) for w in model.get_weights()])
    ids, positions = some_tokens(3), np.array([[1, 2], [2, 1], [1, 1]], "int32")
    hidden = np.take_along_axis(np.asarray(body(ids), "float64"), positions[..., None], axis=1)
    kernel, bias = model.transform.get_weights()
    x = hidden @ kernel + bias
    x = x * 0.5 * (1 + erf(x / np.sqrt(2)))
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    gamma, beta = model.norm.get_weights()
    table = body.get_layer("token_embedding").get_weights()[0]
    expected = (x * gamma + beta) @ table.T + np.asarray(model.word_bias)
    found = model({"tokens": ids, "positions": positions})
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    # Tied: no second table.
    extra = 8 * 8 + 8 + 2 * 8 + 12
    assert model.count_params() == body.count_params() + extra


def test_pretraining_learns_what_follows_from_the_neighbours():
    """Texts of one word over and over: what is masked stands beside it."""
    words = np.random.default_rng(0).integers(WORDS_BEGIN, 12, (256, 1))
    ids = np.repeat(words, 6, axis=1).astype("int32")
    ids[:, 0] = FIRST
    body = encoder(width=16)
    before = body.get_weights()[0].copy()
    model = pretrain(
        body, ids, epochs=15, batch_size=32, learning_rate=1e-2, seed=1, jit_compile=False
    )
    assert model.encoder is body
    history = model.history.history
    assert history["loss"][0] > 1.5  # guessing: log 8 = 2.08
    assert history["loss"][-1] < 0.8
    assert history["accuracy"][-1] > 0.8
    assert np.abs(body.get_weights()[0] - before).max() > 0.01
    check_loss(model)


def check_loss(model):
    """What `pretrain` compiled is the mean over masked words, and over nothing else."""
    batches = MaskedTokens(some_tokens(16), 12, 16, mask_share=0.4, seed=5)
    inputs, targets, weights = batches[0]
    assert 0 < weights.mean() < 1
    logits = np.asarray(model(inputs), "float64")
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    expected = -(chosen * weights).sum() / weights.sum()
    found = model.compute_loss(y=targets, y_pred=model(inputs), sample_weight=weights)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_the_model_survives_save_and_load(tmp_path):
    model = MaskedLanguageModel(encoder())
    inputs = MaskedTokens(some_tokens(8), 12, 8)[0][0]
    model.save(tmp_path / "m.keras")
    loaded = load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(inputs), model(inputs))
    assert loaded.encoder.get_layer("block_0_hidden").output.shape == (None, 6, 8)


def test_mixed_precision_gives_float32_logits():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        body = encoder()
    finally:
        keras.config.set_dtype_policy("float32")
    model = pretrain(body, some_tokens(16), epochs=1, batch_size=8, jit_compile=False)
    inputs = MaskedTokens(some_tokens(8), 12, 8)[0][0]
    assert keras.backend.standardize_dtype(model(inputs).dtype) == "float32"
    assert np.isfinite(model.history.history["loss"][0])
    assert model.transform.compute_dtype == "float16"


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: MaskedLanguageModel(encoder(classes=2)), ValueError, "hidden states"),
        (lambda: MaskedLanguageModel("bert"), TypeError, "encoder must be Model"),
        (lambda: pretrain(encoder(), some_tokens(vocabulary=20)), ValueError, r"in 0\.\.11"),
        (lambda: pretrain(encoder(), some_tokens(), epochs=0), ValueError, "epochs"),
        (lambda: pretrain(encoder(), some_tokens()[0]), ValueError, r"\[texts, length\]"),
        (lambda: MaskedTokens(some_tokens(), 12, mask_share=0.0), ValueError, "mask_share"),
        (lambda: MaskedTokens(some_tokens().astype(float), 12), ValueError, "integers"),
    ],
)
def test_errors(call, error, told):
    with pytest.raises(error, match=told):
        call()
