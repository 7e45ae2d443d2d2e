"""Train a classifier on two workers of this machine; then load it where there is no Horovod.

`python train_on_two_workers.py` starts the workers itself. On several machines the same file runs
by `horovodrun -np 4 -H first:2,second:2 python train_on_two_workers.py models 12`.
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits

import tfaccel.distributed as hvd

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "models")
EPOCHS = int(sys.argv[2]) if len(sys.argv) > 2 else 12
WORKERS = 2
BATCH_SIZE = 32  # of each worker
RATE = 0.002  # of one worker


def load() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns (x, y) to train on and (x, y) to measure on."""
    digits = load_digits()
    x = (digits.images[..., np.newaxis] / 16).astype("float32")
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1400], order[1400:]
    return (x[train], digits.target[train]), (x[test], digits.target[test])


def build() -> keras.Model:
    """A small network for digits of 8 by 8 pixels."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def work() -> None:
    """What each worker does."""
    hvd.init()
    keras.utils.set_random_seed(hvd.rank())  # rank 0's weights are broadcast
    train, test = load()
    model = build()
    rate = RATE * hvd.size()
    model.compile(
        hvd.DistributedOptimizer(keras.optimizers.Adam(rate)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.LearningRateWarmupCallback(rate, warmup_epochs=2),
        hvd.callbacks.ModelCheckpoint(FOLDER / "digits.keras", monitor="loss"),
    ]
    # Each worker takes every second sample.
    x, y = hvd.shard(train)
    model.fit(x, y, BATCH_SIZE, epochs=EPOCHS, callbacks=callbacks, verbose=0)
    if hvd.rank() == 0:
        accuracy = model.evaluate(*test, verbose=0)[1]
        result = {"workers": hvd.size(), "samples": len(x), "accuracy": accuracy}
        (FOLDER / "result.json").write_text(json.dumps(result))
    hvd.shutdown()


def main() -> None:
    """Starts the workers, and uses what they trained."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, str(FOLDER), str(EPOCHS)]
    hvd.run_workers(command, WORKERS, log=FOLDER / "workers.log")
    result = json.loads((FOLDER / "result.json").read_text())
    share = f"{result['workers']} workers with {result['samples']} samples each"
    print(f"trained  {100 * result['accuracy']:5.1f} %  {share}")
    model = keras.saving.load_model(FOLDER / "digits.keras")
    accuracy = model.evaluate(*load()[1], verbose=0)[1]
    print(f"loaded   {100 * accuracy:5.1f} %  {type(model.optimizer).__name__}, plain Keras")


if __name__ == "__main__":
    if hvd.is_launched():
        work()
    else:
        main()
