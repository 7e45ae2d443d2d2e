"""How long each layer of a model takes, forward and backward, for cutting it evenly."""

import time
from typing import Any

import keras

from tfaccel.distributed.arguments import check_count
from tfaccel.distributed.cutting import Calls

_REPEATS = 5


def measure_layers(model: keras.Model, samples: int = 32) -> dict[str, float]:
    """Times every layer of a model by itself, on random data.

    Args:
        model: a built Functional or Sequential model.
        samples: of the batch.

    Returns:
        {name: seconds of a forward and a backward pass}; a layer called several times has their
        mean. The fastest of five counts, so that other work on the machine matters little.
    """
    check_count("samples", samples)
    return time_calls(Calls(model), samples)


def time_calls(calls: Calls, samples: int) -> dict[str, float]:
    """As `measure_layers`, for calls that were read already."""
    found: dict[str, list[float]] = {}
    for node in calls.calls:
        found.setdefault(node.name, []).append(_time_call(node, samples))
    return {name: sum(times) / len(times) for name, times in found.items()}


def _time_call(node: Any, samples: int) -> float:
    import tensorflow as tf

    from tfaccel.core.nodes import is_tensor, map_tree

    places = {id(tensor): i for i, tensor in enumerate(node.inputs)}
    inputs = [_sample(tensor, samples) for tensor in node.inputs]
    weights = node.layer.trainable_weights if node.layer is not None else []
    variables = [variable.value for variable in weights]

    def call(values: Any) -> Any:
        def value_of(leaf: Any) -> Any:
            return values[places[id(leaf)]] if is_tensor(leaf) else leaf

        # Not in training mode: timing must leave statistics and random states as they are.
        return node.operation(*map_tree(value_of, node.args), **map_tree(value_of, node.kwargs))

    @tf.function(autograph=False)
    def there_and_back(values: Any) -> Any:
        with tf.GradientTape() as tape:
            floats = [value for value in values if value.dtype.is_floating]
            tape.watch(floats)
            outputs = [
                output for output in keras.tree.flatten(call(values)) if output.dtype.is_floating
            ]
        gradients = tape.gradient(outputs, [*floats, *variables]) if outputs else []
        return outputs, [tf.convert_to_tensor(g) for g in gradients if g is not None]

    there_and_back(inputs)
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        there_and_back(inputs)
        times.append(time.perf_counter() - begin)
    return min(times)


def _sample(tensor: Any, samples: int) -> Any:
    import tensorflow as tf

    shape = [samples, *(size or 16 for size in tensor.shape[1:])]
    dtype = tf.as_dtype(tensor.dtype)
    if not dtype.is_floating:
        return tf.zeros(shape, dtype)
    return tf.cast(tf.random.stateless_uniform(shape, [0, 0]), dtype)
