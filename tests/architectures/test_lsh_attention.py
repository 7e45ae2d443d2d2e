"""LSH attention against full attention and against the paper's definition in numpy."""

import keras
import numpy as np
import pytest

from tests.architectures import lsh_oracle
from tfaccel.architectures.lsh_attention import LSHSelfAttention
from tfaccel.measurement import count


def inputs(batch, time, features=6, seed=0):
    return 2 * np.random.default_rng(seed).normal(size=(batch, time, features)).astype("float32")


def everything(time, causal):
    return [[j for j in range(time) if j != i and (j < i or not causal)] for i in range(time)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hashes", [1, 3])
@pytest.mark.parametrize("time", [16, 13, 1])
@pytest.mark.parametrize("correct_duplicates", [False, True])
def test_one_bucket_is_full_attention(causal, hashes, time, correct_duplicates):
    layer = LSHSelfAttention(2, 4, 16, hashes, causal=causal, correct_duplicates=correct_duplicates)
    x = inputs(3, time)
    expected = lsh_oracle.run_layer(layer_built(layer, x), x, lambda *_: [everything(time, causal)])
    np.testing.assert_allclose(layer(x), expected, atol=2e-5)


def layer_built(layer, x):
    layer.build(x.shape)
    return layer


def rounds_of_layer(layer, *, mask=None):
    """What each round of a layer finds, hashed and sorted in numpy."""
    rotations = np.asarray(layer.rotations)

    def rounds(sample, query):
        return [
            lsh_oracle.found_by_round(
                lsh_oracle.hash_vectors(query, rotations[:, number]),
                layer.bucket_size,
                causal=layer.causal,
                before=layer.chunks_before,
                after=layer.chunks_after,
                mask=None if mask is None else mask[sample],
            )
            for number in range(layer.hashes)
        ]

    return rounds


@pytest.mark.parametrize("correct_duplicates", [False, True])
@pytest.mark.parametrize(
    ("causal", "before", "after"), [(True, 1, 0), (False, 1, 0), (False, 1, 1), (True, 2, 0)]
)
def test_is_the_softmax_over_what_the_rounds_find(causal, before, after, correct_duplicates):
    layer = LSHSelfAttention(
        2,
        5,
        4,
        3,
        causal=causal,
        buckets=4,
        chunks_before=before,
        chunks_after=after,
        correct_duplicates=correct_duplicates,
        seed=1,
    )
    x = inputs(2, 22)  # not a whole number of chunks
    rounds = rounds_of_layer(layer_built(layer, x))
    expected = lsh_oracle.run_layer(layer, x, rounds, correct_duplicates=correct_duplicates)
    np.testing.assert_allclose(layer(x), expected, atol=2e-5)
    # The case is one in which the correction matters.
    other = lsh_oracle.run_layer(layer, x, rounds, correct_duplicates=not correct_duplicates)
    assert np.abs(other - expected).max() > 0.01


def test_large_logits_neither_overflow_nor_vanish():
    layer = LSHSelfAttention(1, 4, 4, 2, buckets=2, seed=0)
    x = 1000 * inputs(1, 16)
    expected = lsh_oracle.run_layer(layer_built(layer, x), x, rounds_of_layer(layer))
    np.testing.assert_allclose(layer(x), expected, rtol=1e-3, atol=1e-2)
    assert np.isfinite(np.asarray(layer(np.zeros_like(x)))).all()


def test_what_is_masked_takes_no_part():
    layer = LSHSelfAttention(2, 4, 4, 2, buckets=4, seed=0)
    x = inputs(2, 14)
    mask = np.ones((2, 14), bool)
    mask[0, 9:] = False
    mask[1, 3:6] = False
    masked = layer(x, mask=mask)
    expected = lsh_oracle.run_layer(layer, x, rounds_of_layer(layer, mask=mask))
    np.testing.assert_allclose(np.asarray(masked)[mask], expected[mask], atol=2e-5)
    np.testing.assert_allclose(masked[0, :9], layer(x[:1, :9])[0], atol=1e-5)
    assert np.isfinite(np.asarray(layer(x, mask=np.zeros_like(mask)))).all()


def test_takes_the_mask_of_an_embedding():
    tokens = keras.Input((8,), dtype="int32")
    x = keras.layers.Embedding(5, 6, mask_zero=True)(tokens)
    model = keras.Model(tokens, LSHSelfAttention(1, 4, 8, 1)(x))
    ids = np.array([[1, 2, 3, 0, 0, 0, 0, 0]])
    table = np.asarray(model.layers[1].embeddings)
    alone = model.layers[2](table[ids[:, :3]])
    np.testing.assert_allclose(model(ids)[:, :3], alone, atol=1e-6)


def test_no_value_flows_back_in_time():
    import tensorflow as tf

    layer = LSHSelfAttention(2, 4, 4, 3, causal=True, buckets=4, seed=0)
    x = tf.constant(inputs(1, 15))
    layer(x)
    for place in (0, 6, 13):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(layer(x, training=True)[:, place])
        gradient = np.abs(tape.gradient(y, x)).max(-1)[0]
        assert gradient[place + 1 :].max() == 0
        assert gradient[: place + 1].max() > 0


def test_approaches_full_attention_with_more_rounds():
    x = inputs(2, 64)

    def error(hashes, seed):
        keras.utils.set_random_seed(7)
        layer = LSHSelfAttention(2, 4, 16, hashes, seed=seed)
        out = layer(x)
        full = lsh_oracle.run_layer(layer, x, lambda *_: [everything(64, False)])
        return float(np.mean((np.asarray(out) - full) ** 2))

    errors = {hashes: np.mean([error(hashes, seed) for seed in range(3)]) for hashes in (1, 4, 16)}
    # Measured: a quarter of the error with four rounds, a sixtieth with sixteen.
    assert errors[4] < 0.6 * errors[1]
    assert errors[16] < 0.3 * errors[4]


def test_rotations_are_fixed_in_inference_and_drawn_in_training():
    layer = LSHSelfAttention(2, 4, 4, 1, buckets=8, seed=3)
    x = inputs(2, 32)
    np.testing.assert_array_equal(layer(x), layer(x))
    first, second = layer(x, training=True), layer(x, training=True)
    assert np.abs(np.asarray(first) - np.asarray(second)).max() > 0.1
    twin = LSHSelfAttention.from_config(layer.get_config())
    twin.build(x.shape)
    twin.set_weights(layer.get_weights())
    np.testing.assert_array_equal(twin(x, training=True), first)
    np.testing.assert_array_equal(twin(x, training=True), second)
    assert [w.name for w in layer.non_trainable_weights] == ["rotations"]


def test_many_buckets_are_hashed_as_pairs():
    layer = LSHSelfAttention(1, 4, 2, 1, seed=0)
    x = inputs(1, 200)
    assert layer(x).shape == x.shape
    assert layer.factors == (14, 16)
    # 7 + 8 directions in place of 100.
    assert layer.rotations.shape == (4, 1, 15)


def test_dropout_drops_weights_in_training_only():
    # One bucket: a dropped weight is all that is random.
    layer = LSHSelfAttention(1, 4, 16, 1, dropout=0.5, seed=1)
    x = inputs(1, 16)
    plain = np.asarray(layer(x))
    outputs = np.asarray(layer(np.repeat(x, 400, axis=0), training=True))
    assert np.abs(outputs[0] - plain).max() > 0.05
    np.testing.assert_allclose(np.mean(outputs, axis=0), plain[0], atol=0.25 * np.abs(plain).max())


def test_survives_save_and_load(tmp_path):
    x = keras.Input((20, 6))
    layer = LSHSelfAttention(
        2, 4, 4, 3, causal=True, buckets=(2, 4), chunks_after=1, use_bias=True, name="lsh"
    )
    model = keras.Model(x, layer(x))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    data = inputs(2, 20)
    np.testing.assert_array_equal(model(data), loaded(data))
    assert loaded.get_layer("lsh").get_config() == layer.get_config()
    assert loaded.get_layer("lsh").factors == (2, 4)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    x = inputs(2, 16)
    layer = LSHSelfAttention(2, 4, 16, 2, dtype=policy)
    y = layer(x)
    assert y.dtype == policy.removeprefix("mixed_")
    assert layer.query_dense.kernel.dtype == "float32"
    expected = lsh_oracle.run_layer(layer, x, lambda *_: [everything(16, False)])
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(y, "float32"), expected, atol=0.05 * scale)


def test_open_time_needs_a_number_of_buckets():
    x = keras.Input((None, 6))
    with pytest.raises(ValueError, match="follows from the length"):
        LSHSelfAttention(1, 4)(x)
    layer = LSHSelfAttention(1, 4, 4, 2, buckets=4, seed=0)
    model = keras.Model(x, layer(x))
    assert model.output_shape == (None, None, 6)
    for time in (3, 9, 16):
        data = inputs(2, time)
        expected = lsh_oracle.run_layer(layer, data, rounds_of_layer(layer))
        np.testing.assert_allclose(model.predict(data, verbose=0), expected, atol=2e-5)


def test_macs_by_hand():
    x = keras.Input((20, 6))
    model = keras.Model(x, LSHSelfAttention(2, 4, 8, 3)(x))
    # 20 positions in 3 chunks of 8, each looking at 16; 2 * ceil(20 / 8) = 6 buckets.
    projections = 3 * 20 * 6 * 8
    hashing = 20 * 2 * 4 * 3 * 3
    attention = 3 * 2 * 24 * 16 * (4 + 4)
    assert count(model).macs == projections + hashing + attention


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heads": 0}, ValueError, "heads must be above 0"),
        ({"key_dim": 2.5}, TypeError, "key_dim must be int"),
        ({"hashes": -1}, ValueError, "hashes must be above 0"),
        ({"bucket_size": 0}, ValueError, "bucket_size must be above 0"),
        ({"dropout": 1.0}, ValueError, "dropout must be a fraction"),
        ({"buckets": 3}, ValueError, "buckets must be 1, an even number"),
        ({"buckets": (4, 1)}, ValueError, "buckets must be 1, an even number"),
        ({"chunks_before": -1}, ValueError, "chunks_before must not be negative"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        LSHSelfAttention(**{"heads": 1, "key_dim": 4, **arguments})


def test_refuses_other_inputs():
    with pytest.raises(ValueError, match=r"needs inputs \[batch, time, features\]"):
        LSHSelfAttention(1, 4).build((None, 4))
    with pytest.raises(ValueError, match="too many to sort"):
        LSHSelfAttention(1, 4).build((None, 2**19, 4))
