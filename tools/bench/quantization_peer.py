"""TFMOT's QAT on tf_keras, from the weights of a Keras 3 model: the peer of quantization.py.

    python tools/bench/quantization_peer.py START.keras OUT.tflite --dataset cifar10 --images 10000
        --tuning 2 --seed 101 [--cifar10 CIFAR.npz]

A process of its own, because TensorFlow has to be told before it is loaded that its Keras is
tf_keras. Data, batches, optimizer and learning rates are those of quantization.py. Prints a row as
JSON.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_USE_LEGACY_KERAS"] = "1"

import keras
import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from small_images import read_data

from tfaccel.core.graph import Graph

BATCH = 128
# What a layer is made of; all else is left at its default, which is the same in both.
FIELDS = {
    "Conv2D": ("filters", "kernel_size", "strides", "padding", "use_bias", "dilation_rate"),
    "DepthwiseConv2D": ("kernel_size", "strides", "padding", "use_bias", "depth_multiplier"),
    "BatchNormalization": ("momentum", "epsilon"),
    "ReLU": ("max_value",),
    "Add": (),
    "GlobalAveragePooling2D": ("keepdims",),
    "Dense": ("units", "use_bias"),
}


def to_tf_keras(model: keras.Model) -> tf_keras.Model:
    """Returns the same network in tf_keras, with the same weights.

    Raises:
        ValueError: it has a layer that is not listed here.
    """
    graph = Graph.read(model)
    values: dict[int, Any] = {}
    pairs = []
    for node in graph.nodes:
        if node.is_input:
            value = tf_keras.Input(node.outputs[0].shape[1:])
        else:
            kind = type(node.operation).__name__
            if kind not in FIELDS:
                raise ValueError(f"{kind} is not translated; known are {', '.join(FIELDS)}.")
            config = node.operation.get_config()
            arguments = {field: config[field] for field in FIELDS[kind]}
            layer = getattr(tf_keras.layers, kind)(name=node.operation.name, **arguments)
            read = [values[id(tensor)] for tensor in node.inputs]
            value = layer(read if len(read) > 1 else read[0])
            pairs.append((layer, node.operation))
        values[id(node.outputs[0])] = value
    inputs, outputs = ([values[id(t)] for t in end] for end in (graph.inputs, graph.outputs))
    made = tf_keras.Model(inputs, outputs, name=model.name)
    for layer, source in pairs:
        layer.set_weights(source.get_weights())
    sample = np.random.default_rng(0).normal(size=(8, *model.input_shape[1:])).astype("float32")
    np.testing.assert_allclose(
        made(sample), keras.ops.convert_to_numpy(model(sample)), rtol=1e-3, atol=1e-3
    )
    return made


def train(model: tf_keras.Model, x: Any, y: Any, epochs: int) -> list[float]:
    """Trains as quantization.py does; returns the seconds of each step of the last epoch."""
    batch = min(BATCH, len(x))
    steps = len(x) // batch * epochs
    flow = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=1)
    flow = flow.batch(batch, drop_remainder=True)
    flow = flow.map(lambda a, b: (tf.image.random_flip_left_right(a, seed=1), b)).prefetch(2)
    rate = tf_keras.optimizers.schedules.CosineDecay(1e-3, max(steps, 1))
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf_keras.optimizers.Adam(rate), loss)
    times: list[float] = []
    began = [0.0]

    def begin(batch: int, logs: Any) -> None:  # noqa: ARG001
        began[0] = time.perf_counter()

    def end(batch: int, logs: Any) -> None:  # noqa: ARG001
        times.append(time.perf_counter() - began[0])

    watch = tf_keras.callbacks.LambdaCallback(on_batch_begin=begin, on_batch_end=end)
    model.fit(flow, epochs=epochs, shuffle=False, verbose=0, callbacks=[watch])
    return times[-(steps // epochs) :]


def main() -> None:
    """Trains, converts, and prints the row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("start", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--tuning", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    x, y, *_ = read_data(options.dataset, options.cifar10, options.images)
    tf_keras.utils.set_random_seed(options.seed)
    source = keras.models.load_model(options.start, compile=False)
    model = tfmot.quantization.keras.quantize_model(to_tf_keras(source))
    seconds = train(model, x, y, options.tuning)
    # Batch one, as the other files have it.
    model.input.set_shape((1, *model.input.shape[1:]))
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    options.out.write_bytes(converter.convert())
    print(json.dumps({"step_ms": float(np.median(seconds) * 1e3)}))


if __name__ == "__main__":
    main()
