"""Scenarios for the workers of tests/distributed/worker.py: optimizers and tapes."""

import inspect

import keras
import numpy as np
import tensorflow as tf

import tfaccel.distributed as hvd
from tests.distributed.worker import (
    BATCH,
    CLASSES,
    FEATURES,
    STEPS,
    error_of,
    fit,
    make_data,
    weights_of,
)

# What moves the weights of a small network visibly in a few steps.
RATES = {"Adadelta": 1.0, "Lion": 0.003, "SGD": 0.1, "Ftrl": 0.1}
OPTIONS = {
    "SGD": {"momentum": 0.9, "nesterov": True, "global_clipnorm": 0.05},
    "Adam": {"amsgrad": True, "use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 2},
    "RMSprop": {"momentum": 0.9, "centered": True, "clipvalue": 0.02},
    "Adagrad": {"weight_decay": 0.1, "clipnorm": 0.05},
    "Lion": {"clipnorm": 0.1},
    "Nadam": {"gradient_accumulation_steps": 2},
}


def optimizer_names():
    """Every optimizer of Keras that is not made of others."""
    made_of_others = {"Optimizer", "LossScaleOptimizer", "MultiOptimizer"}
    return sorted(
        name
        for name, value in vars(keras.optimizers).items()
        if inspect.isclass(value)
        and issubclass(value, keras.optimizers.Optimizer)
        and name not in made_of_others
    )


def make_optimizer(name):
    if name == "MultiOptimizer":
        parts = keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.01)
        return keras.optimizers.MultiOptimizer(lambda v: parts["kernel" in v.path])
    if name == "LossScaleOptimizer":
        return keras.optimizers.LossScaleOptimizer(make_optimizer("Adam"), initial_scale=8.0)
    rate = RATES.get(name, 0.01)
    return getattr(keras.optimizers, name)(rate, **OPTIONS.get(name, {}))


def make_variables():
    random = np.random.default_rng(5)
    shapes = {"kernel": (FEATURES, 8), "bias": (8,), "kernel_out": (8, CLASSES)}
    return [
        keras.Variable(0.5 * random.normal(size=shape), dtype="float32", name=name)
        for name, shape in shapes.items()
    ]


def train(optimizer, data, batch, wrap=lambda tape: tape):
    """Trains a small network without Keras's layers, eagerly; returns its weights."""
    variables = make_variables()
    kernel, bias, out = variables
    x, y = data
    for start in range(0, len(x), batch):
        with tf.GradientTape() as tape:
            hidden = tf.tanh(x[start : start + batch] @ kernel.value + bias.value)
            loss = tf.reduce_mean((hidden @ out.value - y[start : start + batch]) ** 2)
            loss = optimizer.scale_loss(loss)
        gradients = wrap(tape).gradient(loss, [v.value for v in variables])
        optimizer.apply(gradients, variables)
    optimizer.finalize_variable_values(variables)
    return np.concatenate([np.asarray(v, np.float64).ravel() for v in variables])


def every_optimizer():
    data = make_data(BATCH * hvd.size() * 4)
    before = np.concatenate([np.asarray(v).ravel() for v in make_variables()])
    names = [*optimizer_names(), "MultiOptimizer", "LossScaleOptimizer"]
    plain = hvd.run_on_rank_0(
        lambda: {name: train(make_optimizer(name), data, BATCH * hvd.size()) for name in names}
    )
    found = {}
    for name in names:
        ours = train(hvd.DistributedOptimizer(make_optimizer(name)), hvd.shard(data), BATCH)
        found[name] = {
            "error": float(np.abs(ours - plain[name]).max()),
            "moved": float(np.abs(plain[name] - before).max()),
        }
    return found


def options():
    """Horovod's arguments, each against what it stands for."""
    data = make_data(BATCH * hvd.size() * STEPS)
    plain = train(keras.optimizers.SGD(0.1), data, BATCH * hvd.size())

    def error(rate=0.1, **arguments):
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(rate), **arguments)
        ours = train(optimizer, hvd.shard(data), BATCH)
        return float(np.abs(ours - plain).max())

    twice = train(
        keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), data, BATCH * hvd.size()
    )
    summed = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.05), backward_passes_per_step=2, average_aggregated_gradients=False
    )
    summed = train(summed, hvd.shard(data), BATCH)
    passes = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), backward_passes_per_step=2)
    passes = train(passes, hvd.shard(data), BATCH)
    return {
        "sum": error(rate=0.1 / hvd.size(), op=hvd.Sum),
        "backward passes": float(np.abs(passes - twice).max()),
        "predivided": error(gradient_predivide_factor=2.0),
        "groups": error(groups=2),
        "num_groups": error(num_groups=5),
        "name": error(name="mine"),
        "fp16": error(compression=hvd.Compression.fp16),
        "bf16": error(compression=hvd.Compression.bf16),
        "adasum": error(op=hvd.Adasum),
        "summed passes": float(np.abs(summed - twice).max()),
        "alone": error(process_set=hvd.ProcessSet([1 - hvd.rank()])),
    }


def tapes():
    """A tape of Horovod's around a plain optimizer, eagerly and compiled, with all kinds of it."""
    data = make_data(BATCH * hvd.size() * STEPS)
    plain = train(keras.optimizers.Adam(0.01), data, BATCH * hvd.size())
    ours = train(keras.optimizers.Adam(0.01), hvd.shard(data), BATCH, hvd.DistributedGradientTape)
    table, unused = tf.Variable(tf.ones((4, 2))), tf.Variable(1.0)

    @tf.function
    def gradients(rows, as_dense):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(table, rows) * 2.0)
        tape = hvd.DistributedGradientTape(tape, sparse_as_dense=as_dense)
        return tape.gradient(loss, {"table": table, "unused": unused})

    sparse = gradients(tf.constant([hvd.rank(), 3]), False)
    dense = gradients(tf.constant([hvd.rank(), 3]), True)
    layer = keras.layers.Dense(1, use_bias=False)
    layer.build((None, 1))
    with tf.GradientTape() as tape:
        loss = (1.0 + hvd.rank()) * (table[0, 0] + layer.kernel.value[0, 0])
    tape = hvd.PartialDistributedGradientTape(tape, local_layers=layer)
    partial = tape.gradient(loss, [table, layer.kernel])
    with hvd.DistributedGradientTape(tf.GradientTape(persistent=True)) as tape:
        loss = table[0, 0] * (1.0 + hvd.rank())
    first = tape.gradient(loss, table)
    return {
        "error": float(np.abs(ours - plain).max()),
        "kinds": [type(sparse["table"]).__name__, str(sparse["unused"])],
        "sparse": tf.convert_to_tensor(sparse["table"]).numpy().tolist(),
        "dense": dense["table"].numpy().tolist(),
        "partial": [float(tf.convert_to_tensor(g)[0, 0]) for g in partial],
        "persistent": [
            float(tf.convert_to_tensor(g)[0, 0]) for g in (first, tape.gradient(loss, table))
        ],
    }


def unlike_models():
    """Ranks whose models differ learn it before their first exchange, in fit and in loops."""
    rank, (x, y) = hvd.rank(), make_data(BATCH * 2)

    def narrower():
        model = keras.Sequential(
            [keras.Input((FEATURES,)), keras.layers.Dense(8 + rank, name="hidden")]
        )
        model.add(keras.layers.Dense(CLASSES, name="out"))
        fit(model, hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), (x, y), BATCH)

    def other_type():
        variable = keras.Variable([1.0], dtype=("float32", "float64")[rank], name="scale")
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
        optimizer.apply([tf.ones(1, ("float32", "float64")[rank])], [variable])

    def other_kind():
        variables = [keras.Variable(np.ones((2, 1)), dtype="float32", name="table")]
        gradient = tf.IndexedSlices(tf.ones((1, 1)), tf.constant([0]), tf.constant([2, 1]))
        gradient = gradient if rank else tf.convert_to_tensor(gradient)
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)).apply([gradient], variables)

    def other_op():
        op = hvd.Sum if rank else hvd.Average
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), op=op)
        optimizer.apply([tf.ones(1)], [keras.Variable([1.0])])

    def other_order():
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), name=("one", "two")[rank])
        optimizer.apply([tf.ones(1)], [keras.Variable([1.0])])

    actions = (narrower, other_type, other_kind, other_op, other_order)
    return {action.__name__: error_of(action) for action in actions}


def local_layers():
    """A layer of which each rank has its own, and the rest in common."""
    keras.utils.set_random_seed(1)
    shared = keras.layers.Dense(4, use_bias=False, name="shared")
    own = keras.layers.Dense(CLASSES, use_bias=False, name="own")
    model = keras.Sequential([keras.Input((FEATURES,)), shared, own])
    own.kernel.assign(own.kernel * (1.0 + hvd.rank()))
    x, y = make_data(BATCH, seed=hvd.rank())
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x) - y) ** 2)
    gradients = tape.gradient(loss, [shared.kernel.value, own.kernel.value])
    expected = [
        shared.kernel.numpy() - 0.5 * hvd.allreduce(gradients[0]).numpy(),
        own.kernel.numpy() - 0.5 * gradients[1].numpy() / hvd.size(),
    ]
    optimizer = hvd.PartialDistributedOptimizer(keras.optimizers.SGD(0.5), local_layers=own)
    broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=own.weights)
    fit(model, optimizer, (x, y), BATCH, callbacks=[broadcast])
    found = [shared.kernel.numpy(), own.kernel.numpy()]
    # Twice more: the ranks' weights are compared, but not those of the local layer.
    model.fit(x, y, BATCH, epochs=2, verbose=0)
    return {
        "errors": [float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)],
        "shared": shared.kernel.numpy().tolist(),
        "own": own.kernel.numpy().tolist(),
    }


def batch_norm():
    """Statistics of all ranks, values masked on one of them, and a layer used twice."""
    x, y = make_data(BATCH * hvd.size() * STEPS)
    x = x * 3.0 + 100.0  # far from zero, where differences of squares would lose their digits
    batch = BATCH * hvd.size()

    def make(normalization):
        keras.utils.set_random_seed(2)
        inputs = keras.Input((FEATURES,))
        hidden = normalization(keras.layers.Dense(8)(normalization(inputs)[:, :FEATURES])[:, :6])
        return keras.Model(inputs, keras.layers.Dense(CLASSES)(hidden))

    plain = make(keras.layers.BatchNormalization(momentum=0.5))
    before = weights_of(plain)
    if hvd.rank() == 0:
        fit(plain, keras.optimizers.SGD(0.1), (x, y), batch)
    expected = hvd.broadcast_object(weights_of(plain))
    ours = make(keras.layers.BatchNormalization(momentum=0.5))
    assert hvd.synchronize_batch_norm(ours) is ours
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    fit(ours, optimizer, hvd.shard((x, y)), BATCH)
    layer = hvd.SyncBatchNormalization(momentum=0.0)
    values = np.array([[1.0], [3.0], [50.0]], "float32") + 10.0 * hvd.rank()
    layer(values, mask=np.array([True, hvd.rank() == 0, False]), training=True)
    return {
        "error": float(np.abs(weights_of(ours) - expected).max()),
        "moved": float(np.abs(expected - before).max()),
        "masked": [float(layer.moving_mean[0]), float(layer.moving_variance[0])],
    }
