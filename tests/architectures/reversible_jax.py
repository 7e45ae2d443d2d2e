"""Gradients of reversible blocks on JAX, against those with all activations kept."""

import keras
import numpy as np
from keras import layers

from tfaccel.architectures.chunked_feed_forward import ChunkedFeedForward
from tfaccel.architectures.lsh_attention import LSHSelfAttention
from tfaccel.architectures.reversible import ReversibleBlocks


def compare():
    """Trains the same model twice; raises AssertionError if the losses differ."""
    assert keras.backend.backend() == "jax"
    random = np.random.default_rng(0)
    x = random.normal(size=(4, 24, 8)).astype("float32")
    losses = []
    for recompute in (True, False):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((24, 8))
        blocks = [
            (
                LSHSelfAttention(2, 4, 8, 2, causal=True, dropout=0.2, seed=i),
                keras.Sequential(
                    [
                        ChunkedFeedForward(16, 3, recompute=recompute),
                        layers.Dropout(0.3, seed=i),
                    ]
                ),
            )
            for i in range(2)
        ]
        y = layers.Add()(ReversibleBlocks(blocks, recompute=recompute)([inputs, inputs]))
        model = keras.Model(inputs, y)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        losses.append(model.fit(x, -x, epochs=4, verbose=0).history["loss"])
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
