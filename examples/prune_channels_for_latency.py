"""Take channels out until a network is fast enough, by its latency as measured in TFLite.

The target is a cost of your own: here milliseconds on this machine; on a phone or board, whatever
you measure there. Channels go in three steps, with some training after each.
"""

import sys
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits

import tfaccel
from tfaccel.export import to_tflite
from tfaccel.pruning import prune_channels

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "models")
EPOCHS = int(sys.argv[2]) if len(sys.argv) > 2 else 8
KEPT = 0.5  # of the latency
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def load() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns (x, y) to train on and (x, y) to measure on; images are blown up to 32 x 32."""
    digits = load_digits()
    x = np.kron(digits.images, np.ones((1, 4, 4)))[..., np.newaxis].astype("float32") / 16
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1400], order[1400:]
    return (x[train], digits.target[train]), (x[test], digits.target[test])


def build() -> keras.Model:
    """Returns a network that gives logits."""
    inputs = x = keras.Input((32, 32, 1))
    for channels in (32, 64, 96):
        x = keras.layers.Conv2D(channels, 3, strides=2, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9)(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10)(x), name="digits")


def fit(model: keras.Model, epochs: int, learning_rate: float) -> None:
    """Compiles and fits, as with any Keras model."""
    model.compile(keras.optimizers.Adam(learning_rate), LOSS, jit_compile=False)
    model.fit(*train, batch_size=32, epochs=epochs, verbose=0)


def latency(model: keras.Model) -> float:
    """Returns milliseconds for one image, median of many calls."""
    artifact = to_tflite(model, FOLDER / "candidate.tflite")
    return tfaccel.measure(artifact.path, runs=200, min_seconds=0.1).latency_ms


keras.utils.set_random_seed(0)
FOLDER.mkdir(parents=True, exist_ok=True)
train, test = load()

model = build()
fit(model, EPOCHS, 3e-3)

fast = prune_channels(
    model,
    {"cost": KEPT},
    "taylor",
    train,
    cost=latency,
    loss=LOSS,
    steps=3,
    fine_tune=lambda smaller: fit(smaller, max(1, EPOCHS // 4), 1e-3),
)
fit(fast, EPOCHS, 1e-3)

for name, stage in {"whole": model, "fast": fast}.items():
    artifact = to_tflite(stage, FOLDER / f"{name}.tflite", verify_data=test[0][:32])
    result = tfaccel.measure(artifact.path, data=test, runs=300)
    print(
        f"{name:6} {result.accuracy:7.2%} {result.latency_ms:8.4f} ms "
        f"{result.macs / 1e6:6.2f} M MACs {result.size_bytes / 1e3:7.1f} kB"
    )
