"""Scenarios for the workers of tests/distributed/worker.py: callbacks and the ends of data."""

import warnings

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

import tfaccel.distributed as hvd
from tests.distributed.worker import (
    BATCH,
    CLASSES,
    FEATURES,
    error_of,
    fit,
    make_data,
    make_model,
    weights_of,
)


class Score(keras.callbacks.Callback):
    """Gives each rank a metric of its own: by epochs, for each rank."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def on_epoch_end(self, epoch, logs=None):
        scores = self.scores[hvd.rank()]
        if scores is not None:
            logs["score"] = scores[epoch]


class Watch(keras.callbacks.Callback):
    """Notes the learning rate of every batch."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def on_train_batch_begin(self, batch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate))


def fit_with(callbacks, epochs, batches=2, rate=0.01):
    model = make_model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(rate))
    data = make_data(BATCH * batches, seed=hvd.rank())
    return model, fit(model, optimizer, data, BATCH, epochs=epochs, callbacks=callbacks)


def warmup():
    watch = Watch()
    callbacks = [hvd.callbacks.LearningRateWarmupCallback(0.8, warmup_epochs=2, verbose=1), watch]
    _, history = fit_with(callbacks, 3)
    return {"rates": watch.rates, "history": history["lr"]}


def agreements(folder):
    """Rank 0 gets better and better, rank 1 worse and worse: together they are best in epoch 1."""
    scores = ([3.0, 2.0, 1.0, 0.0], [3.0, 3.0, 5.0, 7.0])
    best = folder / f"best{hvd.rank()}.keras"
    watch = Watch()
    callbacks = [
        Score(scores),
        hvd.callbacks.ReduceLROnPlateau(
            monitor="score", mode="min", factor=0.5, patience=1, min_delta=0
        ),
        hvd.callbacks.ModelCheckpoint(best, monitor="score", mode="min", save_best_only=True),
        hvd.callbacks.EarlyStopping(monitor="score", mode="min", patience=2),
        watch,
    ]
    model, history = fit_with(callbacks, 4)

    class StopAlone(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(batch)
            if hvd.rank() == 1 and batch == 1:
                self.model.stop_training = True

    seen = []
    fit_with([StopAlone(), hvd.callbacks.StopTogetherCallback()], 2, batches=4)
    return {
        "epochs": len(history["loss"]),
        "rates": watch.rates,
        "saved": best.exists(),
        "weights": weights_of(model).tolist(),
        "stopped after": seen,
        "on some": error_of(
            lambda: fit_with(
                [Score((None, [1.0])), hvd.callbacks.EarlyStopping("score", mode="min")], 1
            )
        ),
        "on_rank_0": len(hvd.on_rank_0(Watch(), Watch())),
        "run": hvd.run_on_rank_0(lambda: {"rank": hvd.rank()}),
        "run fails": error_of(lambda: hvd.run_on_rank_0(int, "no number")),
    }


def no_exchange():
    """An optimizer that nobody made a DistributedOptimizer of, on other data on each rank."""
    broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback()

    def train(seed):
        data = make_data(BATCH * 3, seed=seed)
        fit(make_model(), keras.optimizers.SGD(0.1), data, BATCH, callbacks=[broadcast])

    return [error_of(lambda: train(hvd.rank())), error_of(lambda: train(0))]


def unequal_data():
    """Five batches on rank 0 and three on rank 1, and nobody knows beforehand."""
    lengths = []

    def batches():
        for seed in range((5, 3)[hvd.rank()]):
            x, y = make_data(BATCH, seed=seed + 10 * hvd.rank())
            yield {"features": x}, y

    spec = tf.TensorSpec((None, FEATURES)), tf.TensorSpec((None, CLASSES))
    data = tf.data.Dataset.from_generator(
        batches, output_signature=({"features": spec[0]}, spec[1])
    )

    class Count(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            lengths.append(0)

        def on_train_batch_end(self, batch, logs=None):
            lengths[-1] += 1

    keras.utils.set_random_seed(1)
    inputs = keras.Input((FEATURES,), name="features")
    model = keras.Model({"features": inputs}, keras.layers.Dense(CLASSES)(inputs))
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    with warnings.catch_warnings():
        # Keras says so of all data whose length it cannot know, as the first epoch ends.
        warnings.filterwarnings("ignore", "Your input ran out of data")
        model.fit(hvd.end_together(data), epochs=2, shuffle=False, verbose=0, callbacks=[Count()])
    return {"lengths": lengths, "weights": weights_of(model).tolist()}


def digits_example(folder):
    """Horovod's Keras example, written anew: a small network for digits, rates scaled by ranks."""
    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8, 1).astype("float32") / 16
    train = tf.data.Dataset.from_tensor_slices((x[:1500], y[:1500]))
    train = train.shard(hvd.size(), hvd.rank()).repeat().shuffle(1000, seed=1).batch(32)

    model = keras.Sequential(
        [
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    rate = 0.002 * hvd.size()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(rate))
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(),
        optimizer=optimizer,
        metrics=["accuracy"],
    )
    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.LearningRateWarmupCallback(initial_lr=rate, warmup_epochs=2, verbose=1),
    ]
    if hvd.rank() == 0:
        callbacks.append(keras.callbacks.ModelCheckpoint(str(folder / "digits-{epoch}.keras")))
    steps = 120 // hvd.size()
    history = model.fit(
        train,
        steps_per_epoch=steps,
        shuffle=False,
        callbacks=callbacks,
        epochs=3,
        verbose=1 if hvd.rank() == 0 else 0,
    ).history
    return {
        "accuracy": history["accuracy"],
        "test": float(model.evaluate(x[1500:], y[1500:], verbose=0)[1]),
        "saved": sorted(path.name for path in folder.glob("digits-*.keras")),
        "weights": weights_of(model)[:5].tolist(),
    }
