"""What every worker of the tests' Horovod jobs runs: the named scenarios, results to JSON.

    horovodrun -np 2 -H localhost:2 python worker.py FOLDER scenario...

Rank r writes FOLDER/r.json: {scenario: what its function returned}.
"""

import functools
import importlib
import inspect
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
from tfaccel.distillation import Distiller, HintLoss, LogitDistillation

BATCH, STEPS, FEATURES, CLASSES = 8, 6, 6, 3

# In fit; every optimizer of Keras is tried in optimizer_scenarios.py.
OPTIMIZERS = {
    "adamw_accumulated": lambda: keras.optimizers.AdamW(
        0.01, weight_decay=0.1, gradient_accumulation_steps=2
    ),
    "adam_ema": lambda: keras.optimizers.Adam(
        0.01, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2
    ),
}


def make_data(samples, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(samples, FEATURES)).astype("float32")
    return x, random.normal(size=(samples, CLASSES)).astype("float32")


def make_model(seed=1):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(8, activation="tanh", name="hidden"),
            keras.layers.Dense(CLASSES, name="out"),
        ]
    )


def make_token_model(seed=1):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(50, 5, name="embedding"),
            keras.layers.Flatten(),
            keras.layers.Dense(CLASSES, name="out"),
        ]
    )


def weights_of(model):
    return np.concatenate([np.asarray(w, np.float64).ravel() for w in model.get_weights()])


def fit(model, optimizer, data, batch, *, epochs=1, callbacks=(), loss="mse", **compiled):
    model.compile(optimizer, loss, **compiled)
    return model.fit(
        *data, batch, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks)
    ).history


def compare(make, make_optimizer, data, *, wrap=hvd.DistributedOptimizer, **options):
    """Largest difference of a weight between 2 ranks of batch B and one process of 2B."""
    ours, plain = make(), make()
    before = weights_of(plain)
    size = hvd.size()
    fit(ours, wrap(make_optimizer()), hvd.shard(data), BATCH, **options)
    if hvd.rank() == 0:  # tracing takes longest, and one reference serves both
        fit(plain, make_optimizer(), data, BATCH * size, **options)
    expected = hvd.broadcast_object(weights_of(plain))
    return {
        "error": float(np.abs(weights_of(ours) - expected).max()),
        "moved": float(np.abs(expected - before).max()),
    }


def equality():
    data = make_data(BATCH * hvd.size() * STEPS)
    return {name: compare(make_model, make, data) for name, make in OPTIMIZERS.items()}


def sparse():
    random = np.random.default_rng(3)
    samples = BATCH * hvd.size() * STEPS
    tokens = random.integers(0, 50, (samples, 4))
    data = (tokens, random.normal(size=(samples, CLASSES)).astype("float32"))
    kinds = []

    def wrap(optimizer):
        clip = optimizer._clip_gradients

        def see(grads):
            kinds.extend(type(grad).__name__ for grad in grads)
            return clip(grads)

        optimizer._clip_gradients = see
        return hvd.DistributedOptimizer(optimizer)

    result = compare(make_token_model, lambda: keras.optimizers.Adam(0.01), data, wrap=wrap)
    return {**result, "kinds": sorted(set(kinds))}


def several_steps():
    data = make_data(BATCH * hvd.size() * STEPS)
    return compare(
        make_model, lambda: keras.optimizers.Adam(0.01), data, epochs=2, steps_per_execution=3
    )


def make_distiller(seed=1):
    """A student with a learned projection of its features, and a weight that changes by batch."""
    student = make_model(seed)
    hint = HintLoss("hidden", "hidden", regressor="linear")
    schedule = keras.optimizers.schedules.PolynomialDecay(0.2, STEPS, 0.8, power=1.0)
    keras.utils.set_random_seed(seed)
    return Distiller(
        make_model(7), student, alpha=schedule, losses=[LogitDistillation(), hint], name="distiller"
    )


def distillation():
    data = make_data(BATCH * hvd.size() * STEPS)
    return compare(make_distiller, lambda: keras.optimizers.Adam(0.01), data, epochs=2)


def custom_loops():
    """Eager steps, compiled steps and one process agree."""
    size, (x, y) = hvd.size(), make_data(BATCH * hvd.size() * 4)
    mine_x, mine_y = hvd.shard((x, y))

    def run(optimizer, inputs, targets, batch, compiled):
        model = make_model()

        def step(inputs, targets):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(inputs) - targets) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

        step = tf.function(step) if compiled else step
        for start in range(0, len(inputs), batch):
            step(
                tf.constant(inputs[start : start + batch]),
                tf.constant(targets[start : start + batch]),
            )
        return weights_of(model)

    plain = run(keras.optimizers.Adam(0.01), x, y, BATCH * size, compiled=True)
    errors = {}
    for compiled in (False, True):
        optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01))
        ours = run(optimizer, mine_x, mine_y, BATCH, compiled)
        errors["compiled" if compiled else "eager"] = float(np.abs(ours - plain).max())
    return errors


def mixed_precision():
    data = make_data(BATCH * hvd.size() * STEPS)
    found = {}
    for policy in ("mixed_bfloat16", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        try:
            make = functools.partial(keras.optimizers.SGD, 0.1, momentum=0.9)
            found[policy] = compare(make_model, make, data)
        finally:
            keras.config.set_dtype_policy("float32")
    return found


def overflow_on_one_rank():
    """Rank 1 alone meets an infinite gradient in step 2: all ranks skip it, none waits."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        results = {}
        for way in ("compile wraps it", "wrapped before", "wrapped after"):
            x, y = make_data(BATCH * 4, seed=hvd.rank())
            if hvd.rank() == 1:
                y[BATCH * 2 : BATCH * 2 + 1] = np.inf
            optimizer = keras.optimizers.SGD(0.1)
            if way == "wrapped before":
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0)
            optimizer = hvd.DistributedOptimizer(optimizer)
            if way == "wrapped after":
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0)
            model = make_model()
            fit(model, optimizer, (x, y), BATCH)
            outer = model.optimizer
            results[way] = {
                "class": type(outer).__name__,
                "updates": int(outer.iterations),
                "scale": float(outer.dynamic_scale) / float(outer.initial_scale),
                "weights": weights_of(model).tolist(),
            }
        return results
    finally:
        keras.config.set_dtype_policy("float32")


def half_variables():
    """Variables that are bfloat16 or float16 themselves."""
    found = {}
    for dtype in ("bfloat16", "float16"):
        keras.config.set_dtype_policy(dtype)
        try:
            x, y = make_data(BATCH * 3, seed=hvd.rank())
            model = make_model()
            optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
            fit(model, optimizer, (x, y), BATCH)
            found[dtype] = weights_of(model).tolist()
        finally:
            keras.config.set_dtype_policy("float32")
    return found


def broadcast_callback():
    """Ranks begin with other weights and other optimizer states; rank 1's are taken."""
    data = make_data(BATCH * 3, seed=hvd.rank())
    model = make_model(seed=10 + hvd.rank())
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01 * (1 + hvd.rank())))
    start = weights_of(model)

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 0:
                self.rate = float(self.model.optimizer.learning_rate)

    watch = Watch()
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(1), watch]
    fit(model, optimizer, data, BATCH, callbacks=callbacks)
    unbuilt = keras.Sequential([keras.layers.Dense(CLASSES)])
    late = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    keras.utils.set_random_seed(50 + hvd.rank())
    fit(unbuilt, hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), data, BATCH, callbacks=late)
    return {
        "start": start.tolist(),
        "end": weights_of(model).tolist(),
        "rate": watch.rate,
        "unbuilt": weights_of(unbuilt).tolist(),
    }


def metric_average():
    own = {}

    class Peek(keras.callbacks.Callback):
        def __init__(self, key):
            super().__init__()
            self.key = key

        def on_epoch_end(self, epoch, logs=None):
            own[self.key] = dict(logs)

    model = make_model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.0))
    data = make_data(BATCH * 2, seed=hvd.rank())
    callbacks = [Peek("own"), hvd.callbacks.MetricAverageCallback(), Peek("seen")]
    history = fit(model, optimizer, data, BATCH, callbacks=callbacks, metrics=["mae"])
    return {**own, "history": {name: values[-1] for name, values in history.items()}}


def error_of(action):
    """The error's class and words."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
        return [type(error).__name__, "".join(traceback.format_exception(error))]
    return None


def drift():
    """No broadcast and other seeds: an error on every rank, in fit and in an eager loop."""

    def train(**compiled):
        data = make_data(BATCH * 4, seed=hvd.rank())
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
        fit(make_model(seed=hvd.rank()), optimizer, data, BATCH, **compiled)

    return {
        "fit": error_of(train),
        "several steps": error_of(lambda: train(steps_per_execution=2)),
        "eagerly": error_of(lambda: train(run_eagerly=True)),
    }


def late_drift():
    """Weights that change on one rank only, after a fair start."""

    class Spoil(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 5 and hvd.rank() == 1:
                self.model.layers[1].bias.assign_add(np.full(CLASSES, 1e-3, "float32"))

    data = make_data(BATCH * 14, seed=hvd.rank())
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01))
    return error_of(lambda: fit(make_model(), optimizer, data, BATCH, callbacks=[Spoil()]))


def compiled_by_xla():
    data = make_data(BATCH * 2)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback()]
    return error_of(
        lambda: fit(make_model(), optimizer, data, BATCH, callbacks=callbacks, jit_compile=True)
    )


def mismatches():
    """Things that differ between ranks, named instead of waited for."""
    variables = [tf.Variable(np.zeros(3, np.float32), name="a")]
    variables += [tf.Variable(np.zeros(2 + hvd.rank(), np.float32), name="b")]
    names = {"loss": 1.0} if hvd.rank() == 0 else {"loss": 1.0, "val_loss": 2.0}
    average = hvd.callbacks.MetricAverageCallback()
    return {
        "shape": error_of(lambda: hvd.broadcast_variables(variables)),
        "number": error_of(lambda: hvd.broadcast_variables(variables[: 1 + hvd.rank()])),
        "metrics": error_of(lambda: average.on_epoch_end(0, names)),
        "root": error_of(lambda: hvd.broadcast(np.zeros(1), root_rank=2)),
        "twice": error_of(
            lambda: hvd.DistributedOptimizer(hvd.DistributedOptimizer(keras.optimizers.SGD()))
        ),
        "traced": error_of(tf.function(lambda: hvd.broadcast_variables(variables))),
    }


def collectives():
    rank = hvd.rank()
    own = np.arange(3, dtype=np.float32) + 10 * rank
    variables = [
        keras.Variable(own, name="a"),
        tf.Variable([bool(rank), not rank]),
        tf.Variable(tf.cast(own, tf.bfloat16)),
        tf.Variable(rank, dtype=tf.int64),
    ]
    hvd.broadcast_variables(variables, root_rank=1)
    rows = tf.IndexedSlices(tf.constant([[1.0 + rank]]), tf.constant([rank]), tf.constant([3, 1]))
    slices = hvd.allreduce(rows)
    hvd.barrier()
    return {
        "who": [hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), hvd.cross_rank()],
        "average": hvd.allreduce(own).numpy().tolist(),
        "sum": hvd.allreduce(own, op=hvd.Sum).numpy().tolist(),
        "min": hvd.allreduce(own, op=hvd.Min).numpy().tolist(),
        "max": hvd.allreduce(own, op=hvd.Max).numpy().tolist(),
        "bfloat16": str(hvd.allreduce(tf.cast(own, tf.bfloat16))),
        "slices": tf.convert_to_tensor(slices).numpy().tolist(),
        "gathered": hvd.allgather(np.full((rank + 1, 2), rank)).numpy().tolist(),
        "broadcast": hvd.broadcast(own, root_rank=1).numpy().tolist(),
        "object": hvd.broadcast_object({"from": 0} if rank == 0 else None),
        "variables": [np.asarray(v).astype(float).tolist() for v in variables],
        "ops": [int(getattr(sys.modules["horovod.tensorflow"], op.name)) for op in hvd.ReduceOp],
    }


def save(folder):
    """Rank 0 saves what was trained; the other reports the outputs it would have."""
    x, y = make_data(BATCH * 4)
    model = make_model(seed=hvd.rank())
    optimizer = hvd.DistributedOptimizer(keras.optimizers.AdamW(0.01), backward_passes_per_step=2)
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    fit(model, optimizer, (x, y), BATCH, callbacks=callbacks)
    keras.config.set_dtype_policy("mixed_float16")
    scaled = make_model()
    fit(scaled, hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), (x, y), BATCH)
    keras.config.set_dtype_policy("float32")
    if hvd.rank() == 0:
        model.save(folder / "model.keras")
        scaled.save(folder / "scaled.keras")
    hvd.barrier()
    return {"outputs": model.predict(x, verbose=0).tolist(), "updates": int(optimizer.iterations)}


def resume(folder):
    """Goes on from a saved model, optimizer state and all."""
    model = hvd.load_model(folder / "model.keras")
    optimizer = model.optimizer
    before = int(optimizer.iterations)
    model.fit(*make_data(BATCH * 4, seed=hvd.rank()), BATCH, verbose=0)
    return {"before": before, "after": int(optimizer.iterations), "end": weights_of(model).tolist()}


def main():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy")
    folder = Path(sys.argv[1])
    sys.path.insert(0, str(Path(__file__).parents[2]))
    hvd.init(process_sets="dynamic")
    results = {}
    for scenario in sys.argv[2:]:
        # "module.function", or a function of this file
        module, _, name = scenario.rpartition(".")
        place = vars(
            importlib.import_module(
                f"tests.distributed.{module}_scenarios" if module else "__main__"
            )
        )
        arguments = [folder] if inspect.signature(place[name]).parameters else []
        begin = time.process_time()
        results[name] = place[name](*arguments)
        results[name + " seconds"] = time.process_time() - begin
        (folder / f"{hvd.rank()}.json").write_text(json.dumps(results))
    hvd.shutdown()


if __name__ == "__main__":
    main()
