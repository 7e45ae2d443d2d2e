"""Prune a classifier to half of its weights, train it for int8, and measure what that brought.

Nothing but model.fit: each technique is a function from model to model, and at most one callback.
"""

import sys
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits

import tfaccel
from tfaccel.core.schedules import PolynomialDecay
from tfaccel.export import to_tflite
from tfaccel.pruning import UpdatePruning, prune
from tfaccel.quantization import quantize_aware

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "models")
EPOCHS = int(sys.argv[2]) if len(sys.argv) > 2 else 8
BATCH_SIZE = 32


def load() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns (x, y) to train on and (x, y) to measure on."""
    digits = load_digits()
    x = (digits.images[..., np.newaxis] / 16).astype("float32")
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1400], order[1400:]
    return (x[train], digits.target[train]), (x[test], digits.target[test])


def build() -> keras.Model:
    """Returns a small network that gives logits."""
    layers = [keras.Input((8, 8, 1))]
    for channels in (16, 32):
        layers += [
            keras.layers.Conv2D(channels, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
        ]
    layers += [keras.layers.Flatten(), keras.layers.Dense(10)]
    return keras.Sequential(layers, name="digits")


def fit(model: keras.Model, data: tuple, learning_rate: float, callbacks: tuple = ()) -> None:
    """Compiles and fits, as with any Keras model."""
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(*data, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=0, callbacks=list(callbacks))


keras.utils.set_random_seed(0)
train, test = load()
steps = EPOCHS * len(train[0]) // BATCH_SIZE

model = build()
fit(model, train, 3e-3)

pruned = prune(model, PolynomialDecay(0.0, 0.5, begin_step=0, end_step=steps // 2, frequency=5))
fit(pruned, train, 1e-3, [UpdatePruning()])

quantized = quantize_aware(pruned)
fit(quantized, train, 5e-4)

FOLDER.mkdir(parents=True, exist_ok=True)
for name, stage in {"float": model, "pruned": pruned, "int8": quantized}.items():
    artifact = to_tflite(stage, FOLDER / f"{name}.tflite", verify_data=test[0][:32])
    result = tfaccel.measure(artifact.path, data=test)
    print(
        f"{name:7} {result.accuracy:7.2%} {result.size_bytes / 1e3:7.1f} kB "
        f"{result.gzip_bytes / 1e3:7.1f} kB gzipped {result.latency_ms:7.3f} ms"
    )
