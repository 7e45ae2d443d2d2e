"""Reversible blocks: the same as with all activations kept, in memory that stays flat."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tfaccel.architectures.lsh_attention import LSHSelfAttention
from tfaccel.architectures.reversible import ReversibleBlocks
from tfaccel.measurement import count

ROOT = pathlib.Path(__file__).parents[2]
SHAPE = (24, 8)


def make_blocks(depth):
    def attention(seed):
        lsh = LSHSelfAttention(2, 4, 8, 2, causal=True, dropout=0.2, seed=seed)
        norm = layers.LayerNormalization()
        return keras.Sequential([norm, lsh, layers.Dropout(0.3, seed=seed + 50)])

    def feed(seed):
        dense = [layers.Dense(16, "tanh"), layers.BatchNormalization(), layers.Dense(8)]
        return keras.Sequential([*dense, layers.Dropout(0.3, seed=seed)])

    return [(attention(i), feed(100 + i)) for i in range(depth)]


def make_model(depth=3, *, recompute=True, dtype=None):
    keras.utils.set_random_seed(1)
    x = keras.Input(SHAPE)
    blocks = ReversibleBlocks(make_blocks(depth), recompute=recompute, dtype=dtype, name="blocks")
    return keras.Model(x, layers.Dense(3)(layers.Concatenate()(blocks([x, x]))))


def data(seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(4, *SHAPE)).astype("float32")
    return x, random.normal(size=(4, SHAPE[0], 3)).astype("float32")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_gradients_are_those_of_kept_activations(mode):
    x, y = data()
    results = []
    for recompute in (True, False):
        model = make_model(recompute=recompute)

        def step(x, y, model=model):
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            return loss, tape.gradient(loss, [x, *model.trainable_variables])

        if mode != "eager":
            step = tf.function(step, jit_compile=mode == "xla")
        outcomes = [step(tf.constant(x), tf.constant(y)) for _ in range(2)]
        results.append((outcomes, [np.array(v) for v in model.variables]))
    (ours, our_state), (plain, plain_state) = results
    for (loss, gradients), (plain_loss, plain_gradients) in zip(ours, plain, strict=True):
        assert float(loss) == pytest.approx(float(plain_loss), rel=1e-6)
        assert len(gradients) == 1 + 3 * (2 + 3 + 4 + 2) + 2  # input, blocks, head
        for ours_, theirs in zip(gradients, plain_gradients, strict=True):
            np.testing.assert_allclose(ours_, theirs, rtol=1e-5, atol=2e-6)
        assert all(np.abs(np.asarray(g)).max() > 1e-7 for g in (gradients[0], gradients[-1]))
    # Batch-norm statistics and seeds have moved on once for each step, not again on the way back.
    for ours_, theirs in zip(our_state, plain_state, strict=True):
        np.testing.assert_allclose(ours_, theirs, rtol=1e-6)
    # The second step has other masks and hashes than the first.
    assert float(ours[0][0]) != pytest.approx(float(ours[1][0]), rel=1e-3)


def test_the_input_follows_from_the_output():
    blocks = ReversibleBlocks(make_blocks(4))
    x1, x2 = data()[0], data(1)[0]
    y1, y2 = blocks([x1, x2])
    for f, g in reversed(blocks.pairs):
        y2 = y2 - g(y1)
        y1 = y1 - f(y2)
    np.testing.assert_allclose(y1, x1, atol=1e-5)
    np.testing.assert_allclose(y2, x2, atol=1e-5)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("jit", [True, False])
def test_fits_as_with_kept_activations(jit):
    x, y = data()
    losses = []
    for recompute in (True, False):
        model = make_model(1, recompute=recompute)
        model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=jit)
        history = model.fit(x, y, batch_size=2, epochs=3, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    assert losses[0][-1] != losses[0][0]


def test_streams_stay_in_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = make_model(2)
        plain = make_model(2, recompute=False)
    finally:
        keras.config.set_dtype_policy("float32")
    blocks = model.get_layer("blocks")
    assert blocks.compute_dtype == "float32"
    assert blocks.functions[0].layers[1].compute_dtype == "float16"
    x = tf.constant(data()[0])
    gradients = []
    for each in (model, plain):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.cast(each(x, training=True), "float32") ** 2)
        gradients.append(tape.gradient(loss, each.trainable_variables))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == "float32"
        spread = np.abs(np.asarray(theirs)).max()
        np.testing.assert_allclose(ours, theirs, atol=0.01 * spread + 1e-5)


def test_one_layer_may_stand_in_several_blocks():
    shared = layers.Dense(8, "tanh")
    gradients = []
    x = tf.constant(data()[0])
    for recompute in (True, False):
        blocks = ReversibleBlocks([(shared, layers.Identity()), (shared, shared)])
        blocks.recompute = recompute
        with tf.GradientTape() as tape:
            y1, y2 = blocks([x, x], training=True)
            loss = tf.reduce_sum(y1 * y2)
        gradients.append(tape.gradient(loss, blocks.trainable_variables))
    assert len(gradients[0]) == 2
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_a_frozen_layer_gets_no_gradient_and_passes_it_on():
    blocks = ReversibleBlocks([(layers.Dense(8), layers.Dense(8))])
    blocks.build([(None, *SHAPE)] * 2)
    blocks.functions[1].trainable = False
    x = tf.constant(data()[0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(blocks([x, x], training=True)[1] ** 2)
    gradients = tape.gradient(loss, [x, *blocks.trainable_variables])
    assert len(gradients) == 3
    assert all(np.abs(np.asarray(g)).max() > 0 for g in gradients)


@keras.saving.register_keras_serializable("test_reversible")
class TakesMask(layers.Layer):
    """Adds one where the mask is true; knows only what it is handed."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs, mask=None):
        return keras.ops.zeros_like(inputs) + keras.ops.cast(mask, inputs.dtype)[..., None]


@pytest.mark.parametrize("training", [True, False])
def test_hands_the_mask_on(training):
    ids = np.array([[3, 0, 5]])
    tokens = keras.Input((3,), dtype="int32")
    x = layers.Embedding(7, 4, mask_zero=True)(tokens)
    blocks = ReversibleBlocks([(TakesMask(), layers.Dense(4)), (TakesMask(), TakesMask())])
    y1, y2 = blocks([x, x])
    model = keras.Model(tokens, [x, y1, y2])
    start, out, _ = model(ids, training=training)
    np.testing.assert_allclose(out - start, [[[2] * 4, [0] * 4, [2] * 4]], atol=1e-5)


def test_survives_save_and_load(tmp_path):
    model = make_model(2)
    x, y = data()
    model.compile("adam", "mse")
    model.train_on_batch(x, y)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(model(x), loaded(x))
    kernels = [np.array(v) for v in loaded.trainable_variables]
    loaded.train_on_batch(x, y)
    assert all(
        (a != b).any()
        for a, b in zip(kernels, map(np.array, loaded.trainable_variables), strict=True)
    )
    assert loaded.get_layer("blocks").recompute is True


def test_macs_are_those_of_the_layers_inside():
    x = keras.Input((5, 8))
    blocks = [(layers.Dense(8), LSHSelfAttention(1, 4, 8, 1)), (layers.Dense(8), layers.Dense(8))]
    model = keras.Model(x, ReversibleBlocks(blocks)([x, x]))
    attention = 3 * 5 * 8 * 4 + 8 * 8 * (4 + 4)
    assert count(model).macs == 3 * 5 * 8 * 8 + attention


def test_refuses_what_is_no_block():
    dense = layers.Dense(4)
    with pytest.raises(ValueError, match="pairs"):
        ReversibleBlocks([])
    with pytest.raises(ValueError, match="pairs"):
        ReversibleBlocks([(dense, dense, dense)])
    with pytest.raises(TypeError, match="each f and g"):
        ReversibleBlocks([(dense, "dense")])
    with pytest.raises(ValueError, match="a pair of tensors of the same shape"):
        ReversibleBlocks([(dense, dense)]).build([(None, 3, 4), (None, 3, 5)])
    noisy = layers.Dense(4, activity_regularizer="l2", name="noisy")
    x = np.ones((1, 3, 4), "float32")
    with pytest.raises(ValueError, match="recompute=False"):
        ReversibleBlocks([(noisy, dense)])([x, x], training=True)


@pytest.mark.exhaustive
def test_gradients_on_jax():
    code = """
from tests.architectures.reversible_jax import compare
compare()
"""
    env = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def probe(depth, kind, mode, folder):
    folder.mkdir()
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text" if mode == "xla" else ""
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    script = pathlib.Path(__file__).with_name("memory_probe.py")
    done = subprocess.run(
        [sys.executable, script, str(depth), kind, mode, folder],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.exhaustive
def test_memory_of_a_training_step_stays_flat_in_depth(tmp_path):
    """XLA's own plan, which is exact; tools/bench/reformer.py has what a process holds."""

    def growth(kind):
        sizes = [probe(n, kind, "xla", tmp_path / f"{kind}{n}")["planned"] for n in (1, 3)]
        return (sizes[1] - sizes[0]) / 2

    plain, reversible = growth("plain"), growth("reversible")
    # One hidden activation of 4 x 1024 x 1024 floats: a plain block keeps at least that.
    hidden = 4 * 1024 * 1024 * 4
    assert plain > hidden
    assert reversible < 0.4 * plain, (reversible, plain)
    assert reversible < 0.5 * hidden, (reversible, hidden)
