"""What each of two ranks runs for test_compression_job.py; results to JSON.

horovodrun -np 2 -H localhost:2 python compression_worker.py FOLDER
"""

import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ["TF_NUM_INTRAOP_THREADS"] = "1"

import keras
import numpy as np
import tensorflow as tf

import tfaccel.distributed as hvd
from tfaccel.distributed.horovod_channel import HorovodChannel

BATCH, STEPS, FEATURES = 8, 5, 40
RATE = 0.05

COMPRESSORS = {
    "fp16": hvd.FP16(),
    "bf16": hvd.BFloat16(),
    "topk": hvd.ErrorFeedback(hvd.TopK(0.05)),
    "randomk": hvd.ErrorFeedback(hvd.RandomK(0.1, seed=3)),
    "threshold": hvd.ErrorFeedback(hvd.Threshold(0.05)),
    "qsgd": hvd.QSGD(4, 64, seed=1),
    "int8": hvd.ErrorFeedback(hvd.Int8(8, 64)),
    "efsignsgd": hvd.EFSignSGD(),
    "powersgd": hvd.PowerSGD(2),
    # A ring carries the first quarter of the warm-up at 32 bits and none of the others.
    "dgc": hvd.DGC(0.9, 0.95, warmup_steps=4, clip_norm=1.0),
    "dgc_by_turns": hvd.DGC(0.9, 0.99, warmup_steps=4, value_bits=32, dense_bits=32),
}
IN_A_GRAPH = ("dgc_by_turns", "powersgd")


def make_data(rank, samples=BATCH * STEPS):
    random = np.random.default_rng(100 + rank)
    x = random.normal(size=(samples, FEATURES)).astype("float32")
    return x, random.normal(size=(samples, 32)).astype("float32")


def make_model(seed=1):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(40, activation="tanh", name="hidden"),
            keras.layers.Dense(32, name="out"),
        ]
    )


def flat(model):
    return np.concatenate([w.ravel() for w in model.get_weights()]).tolist()


def error_of(action):
    """The error's class and words."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
        return [type(error).__name__, "".join(traceback.format_exception(error))]
    return None


def train(model, optimizer, data, **compiled):
    if optimizer is not None:
        model.compile(optimizer, "mse", **compiled)
    model.fit(*data, BATCH, shuffle=False, verbose=0)


def every_compressor(folder):
    found = {}
    for name, compressor in COMPRESSORS.items():
        model = make_model()
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE), compression=compressor)
        # A graph takes a second to be made; other_ways() compares it with steps made eagerly.
        train(model, optimizer, make_data(hvd.rank()), run_eagerly=name not in IN_A_GRAPH)
        found[name] = flat(model)
    return found


def channel(folder):
    """The operations that compressors are made of, with messages of different lengths."""
    sender = HorovodChannel("channel")
    own = tf.range(5, dtype=tf.float32) + 10.0 * hvd.rank()
    message = tf.fill([3 + 2 * hvd.rank()], tf.cast(hvd.rank() + 1, tf.uint8))
    return {
        "who": [sender.rank, sender.size],
        "mean": sender.mean(own, "a").numpy().tolist(),
        "half": sender.mean_half(tf.cast(own, tf.bfloat16), "b").numpy().astype(float).tolist(),
        "gathered": sender.gather(message, "c").numpy().tolist(),
        "nothing": sender.gather(message[:0], "d").numpy().tolist(),
    }


def resume(folder):
    """Five updates; two, a checkpoint, and three more; and a checkpoint that does not fit."""

    def make():
        return hvd.DistributedOptimizer(keras.optimizers.SGD(RATE), compression=hvd.DGC(0.9, 0.95))

    x, y = make_data(hvd.rank())
    unbroken = make_model()
    train(unbroken, make(), (x, y))
    begun = make_model()
    begun.compile(make(), "mse")
    path = folder / "checkpoint-1.keras"
    half = 2 * BATCH
    saver = hvd.CompressionCheckpoint(folder / "checkpoint-{epoch}.keras")
    begun.fit(x[:half], y[:half], BATCH, shuffle=False, verbose=0, callbacks=[saver])
    if hvd.rank() == 0:
        begun.save(path)
    hvd.barrier()
    weights = {}
    for way in ("restored", "forgotten"):
        loaded = keras.saving.load_model(path)
        optimizer = hvd.DistributedOptimizer(loaded.optimizer, compression=hvd.DGC(0.9, 0.95))
        if way == "restored":
            hvd.restore_compression_state(optimizer, path)
        loaded.fit(x[half:], y[half:], BATCH, shuffle=False, verbose=0)
        weights[way] = flat(loaded)
    late = error_of(lambda: hvd.restore_compression_state(optimizer, path))
    fresh = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE), compression="topk")
    return {
        "unbroken": flat(unbroken),
        **weights,
        "files": sorted(file.name for file in folder.glob("*.npz")),
        "late": late,
        "missing": error_of(lambda: hvd.restore_compression_state(fresh, folder / "none.keras")),
        "kept": [hvd.save_compression_state(keras.optimizers.SGD(), path) is None],
    }


def other_ways(folder):
    """Accumulation, mixed precision, sparse gradients, a tape, several steps at once."""
    found = {}
    data = make_data(hvd.rank(), BATCH * 4)
    for name, options, compiled in (
        ("accumulated", {"backward_passes_per_step": 2}, {}),
        ("summed", {"op": hvd.Sum}, {}),
        ("eagerly", {}, {"run_eagerly": True}),
        ("several steps", {}, {"steps_per_execution": 2}),
        ("graph", {}, {}),
    ):
        model = make_model()
        rate = RATE / hvd.size() if name == "summed" else RATE
        optimizer = keras.optimizers.SGD(rate)
        compression = hvd.ErrorFeedback("topk") if name == "summed" else hvd.DGC(0.9, 0.95)
        optimizer = hvd.DistributedOptimizer(optimizer, compression=compression, **options)
        train(model, optimizer, data, **compiled)
        found[name] = flat(model)
    for policy in ("mixed_bfloat16", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        try:
            model = make_model()
            optimizer = keras.optimizers.SGD(RATE)
            train(model, hvd.DistributedOptimizer(optimizer, compression=hvd.DGC()), data)
            found[policy] = flat(model)
        finally:
            keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(1)
    tokens = np.random.default_rng(hvd.rank()).integers(0, 100, (BATCH * 4, 3))
    embedding = keras.layers.Embedding(100, 12)
    model = keras.Sequential([keras.Input((3,), dtype="int32"), embedding, keras.layers.Flatten()])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=hvd.DGC(0.9, 0.9))
    train(model, optimizer, (tokens, np.ones((BATCH * 4, 36), "float32")))
    found["embedding"] = flat(model)
    found["tape"] = with_a_tape(data)
    return found


def with_a_tape(data):
    model, optimizer = make_model(), keras.optimizers.SGD(RATE)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        tape = hvd.DistributedGradientTape(tape, compression=hvd.DGC(0.9, 0.95))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    for start in range(0, len(data[0]), BATCH):
        step(*(tf.constant(part[start : start + BATCH]) for part in data))
    return flat(model)


def local_sgd(folder):
    found = {}
    for name, options in (
        ("every 2", {"every": 2}),
        ("every 1", {"every": 1, "average_optimizer": True}),
        ("post local", {"every": 4, "post_local_from": 2}),
        ("never alone", {"every": 100}),
    ):
        model = make_model(seed=1 + 7 * hvd.rank())
        compiled = name == "every 2"  # by XLA, which takes its time
        model.compile(keras.optimizers.SGD(RATE, momentum=0.9), "mse", jit_compile=compiled)
        callback = hvd.LocalSGD(**options)
        data = make_data(hvd.rank(), BATCH * 4)
        model.fit(*data, BATCH, shuffle=False, verbose=0, callbacks=[callback])
        found[name] = flat(model)
    model = make_model()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(RATE)), "mse")
    found["twice"] = error_of(lambda: model.fit(*data, verbose=0, callbacks=[hvd.LocalSGD()]))
    model.compile("sgd", "mse")
    short = [part[: BATCH * (2 + hvd.rank())] for part in data]
    found["uneven"] = error_of(
        lambda: model.fit(*short, BATCH, verbose=0, callbacks=[hvd.LocalSGD()])
    )
    return found


def disagreement(folder):
    """Each rank has another compressor: an error on both, and no waiting."""
    ratio = 0.01 * (1 + hvd.rank())
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(RATE), compression=hvd.ErrorFeedback(hvd.TopK(ratio))
    )
    return error_of(lambda: train(make_model(), optimizer, make_data(0)))


def main():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy")
    folder = Path(sys.argv[1])
    hvd.init()
    results = {}
    for scenario in (every_compressor, channel, resume, other_ways, local_sgd, disagreement):
        begin = time.process_time()
        results[scenario.__name__] = scenario(folder)
        results[scenario.__name__ + " CPU seconds"] = time.process_time() - begin
        (folder / f"{hvd.rank()}.json").write_text(json.dumps(results))
    hvd.shutdown()


if __name__ == "__main__":
    main()
