import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tfaccel.architectures.chunked_feed_forward import ChunkedFeedForward
from tfaccel.measurement import count


def two_dense(layer):
    """The same function of two Dense layers, on the layer's weights."""
    hidden_kernel, hidden_bias, out_kernel, out_bias = layer.get_weights()
    hidden = layers.Dense(layer.units, layer.activation)
    out = layers.Dense(out_kernel.shape[1])
    model = keras.Sequential([keras.Input((None, len(hidden_kernel))), hidden, out])
    model.set_weights([hidden_kernel, hidden_bias, out_kernel, out_bias])
    return model


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize(("time", "chunks"), [(12, 4), (13, 4), (5, 4), (3, 7), (6, 1)])
def test_equals_two_dense_layers_and_their_gradients(mode, time, chunks):
    layer = ChunkedFeedForward(7, chunks, activation="gelu")
    x = tf.constant(np.random.default_rng(0).normal(size=(2, time, 5)).astype("float32"))
    layer(x)
    layer.set_weights([np.random.default_rng(1).normal(size=w.shape) for w in layer.get_weights()])
    plain = two_dense(layer)

    def step(model, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x, training=True)
            loss = tf.reduce_sum(y * tf.sin(y))
        return y, tape.gradient(loss, [x, *model.trainable_variables])

    if mode != "eager":
        step = tf.function(step, jit_compile=mode == "xla")
    ours, theirs = step(layer, x), step(plain, x)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer(x), theirs[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(ours[1], theirs[1], strict=True):
        spread = np.abs(np.asarray(other)).max()
        np.testing.assert_allclose(one, other, atol=1e-5 * spread)


def test_the_hidden_layer_exists_one_chunk_at_a_time():
    """What the largest tensor of a training step's graph is, forwards and backwards."""
    for recompute, largest in ((True, 2 * 10 * 30), (False, 2 * 10 * 30)):
        layer = ChunkedFeedForward(30, 4, recompute=recompute)
        layer.build((2, 40, 3))

        @tf.function
        def step(x, layer=layer):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(layer(x, training=True) ** 2)
            return tape.gradient(loss, layer.trainable_variables)

        graph = step.get_concrete_function(tf.TensorSpec((2, 40, 3))).graph
        sizes = [
            t.shape.num_elements() for op in graph.get_operations() for t in op.outputs if t.shape
        ]
        assert max(size for size in sizes if size) == largest
        hidden = [op for op in graph.get_operations() if op.type == "Relu"]
        # Four chunks, and when computed again each in its turn behind the gradients of the last.
        assert len(hidden) == (8 if recompute else 4)
        if recompute:
            waits = [op for op in graph.get_operations() if op.control_inputs]
            assert len(waits) >= 3 + 3


def test_fits_and_survives_save_and_load(tmp_path):
    x = np.random.default_rng(0).normal(size=(8, 10, 4)).astype("float32")
    inputs = keras.Input((10, 4))
    model = keras.Model(inputs, ChunkedFeedForward(16, 3, activation="tanh", name="ff")(inputs))
    model.compile(keras.optimizers.Adam(0.02), "mse")
    losses = model.fit(x, x, epochs=30, verbose=0).history["loss"]
    assert losses[-1] < 0.3 * losses[0]
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(model(x), loaded(x))
    assert loaded.get_layer("ff").get_config() == model.get_layer("ff").get_config()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    layer = ChunkedFeedForward(8, 3, dtype=policy)
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 7, 4)).astype("float32"))
    with tf.GradientTape() as tape:
        y = layer(x, training=True)
        loss = tf.reduce_sum(tf.cast(y, "float32") ** 2)
    assert y.dtype == policy.removeprefix("mixed_")
    np.testing.assert_allclose(np.asarray(y, "float32"), two_dense(layer)(x), atol=0.05)
    assert {g.dtype for g in tape.gradient(loss, layer.trainable_variables)} == {tf.float32}


def test_macs_and_shapes():
    inputs = keras.Input((10, 4))
    model = keras.Model(inputs, ChunkedFeedForward(6, 3)(inputs))
    assert model.output_shape == (None, 10, 4)
    assert count(model).macs == 10 * 4 * 6 + 10 * 6 * 4
    assert count(model).parameters == 4 * 6 + 6 + 6 * 4 + 4


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="units must be above 0"):
        ChunkedFeedForward(0)
    with pytest.raises(TypeError, match="chunks must be int"):
        ChunkedFeedForward(4, 2.5)
    with pytest.raises(ValueError, match="their number is not known"):
        ChunkedFeedForward(4, 2)(keras.Input((None, 3)))
    with pytest.raises(ValueError, match=r"\[batch, time, features\]"):
        ChunkedFeedForward(4, 2)(keras.Input((3,)))
    assert ChunkedFeedForward(4, 1)(keras.Input((None, 3))).shape == (None, None, 3)
