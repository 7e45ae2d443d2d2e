"""Make a trained classifier light: low-rank layers for half of the MACs, fine-tuned; then export.

print(tfaccel.diff(folded, light)) says what changed, layer by layer.
"""

import sys
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits

import tfaccel
from tfaccel.architectures import VGG11
from tfaccel.export import to_tflite
from tfaccel.rewriting import factorize, fold_batch_norm

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "models")
EPOCHS = int(sys.argv[2]) if len(sys.argv) > 2 else 12
BATCH_SIZE = 32


def load() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns (x, y) to train on and (x, y) to measure on."""
    digits = load_digits()
    x = (digits.images[..., np.newaxis] / 16).astype("float32")
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1400], order[1400:]
    return (x[train], digits.target[train]), (x[test], digits.target[test])


def fit(model: keras.Model, data: tuple, learning_rate: float, epochs: int) -> None:
    """Compiles and fits, as with any Keras model."""
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(*data, batch_size=BATCH_SIZE, epochs=epochs, verbose=0)


keras.utils.set_random_seed(0)
train, test = load()

model = VGG11((8, 8, 1), 10, width=0.25, hidden=(64,), batch_norm=True)
for layer in model.layers:
    if isinstance(layer, keras.layers.BatchNormalization):
        layer.momentum = 0.9  # so short a training has few steps to follow
fit(model, train, 2e-3, EPOCHS)

# With batch norm folded each convolution is what it will be on the device.
folded = fold_batch_norm(model)
light = factorize(folded, macs=0.5, data=train[0][:256])
tuned = keras.models.clone_model(light)
tuned.set_weights(light.get_weights())
fit(tuned, train, 5e-4, max(1, EPOCHS // 4))

FOLDER.mkdir(parents=True, exist_ok=True)
for name, stage in {"trained": folded, "factorized": light, "fine-tuned": tuned}.items():
    result = tfaccel.measure(to_tflite(stage, FOLDER / f"{name}.tflite").path, data=test)
    print(
        f"{name:11} {result.accuracy:7.2%} {result.macs / 1e6:6.2f} M MACs "
        f"{result.size_bytes / 1e3:8.1f} kB {result.latency_ms:7.3f} ms"
    )
