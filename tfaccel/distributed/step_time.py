"""What the planner needs of a model: its gradients' shapes, and how long a step takes here."""

import time

import keras

from tfaccel.core.checks import check_model
from tfaccel.distributed.arguments import check_count
from tfaccel.distributed.compression_costs import Shape

_ROUNDS = 7


def gradient_shapes(model: keras.Model) -> list[Shape]:
    """Returns the shapes of a model's gradients."""
    check_model(model, "plan-cluster")
    return [tuple(variable.shape) for variable in model.trainable_variables]


def measure_step(model: keras.Model, batch_size: int = 32) -> float:
    """Times a training step of a model on random data, on one worker.

    Args:
        model: a built Functional or Sequential model; its weights are not changed.
        batch_size: samples of the step.

    Returns:
        Milliseconds of a forward and backward pass, the median of seven.
    """
    import tensorflow as tf

    check_model(model, "plan-cluster")
    check_count("batch_size", batch_size)
    inputs = [
        keras.random.uniform((batch_size, *(size or 16 for size in tensor.shape[1:])), seed=0)
        if "float" in tensor.dtype
        else keras.ops.zeros((batch_size, *(size or 16 for size in tensor.shape[1:])), tensor.dtype)
        for tensor in model.inputs
    ]
    variables = [variable.value for variable in model.trainable_variables]

    @tf.function(autograph=False)
    def step(values: list[tf.Tensor]) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            # Not in training mode: that would change statistics and random states of the model.
            outputs = keras.tree.flatten(model(values if len(values) > 1 else values[0]))
            loss = tf.add_n([tf.reduce_mean(tf.cast(o, tf.float32) ** 2) for o in outputs])
        gradients = tape.gradient(loss, variables)
        return [tf.convert_to_tensor(g) for g in gradients if g is not None]

    step(inputs)
    times = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        step(inputs)
        times.append(time.perf_counter() - begin)
    return 1e3 * sorted(times)[_ROUNDS // 2]
