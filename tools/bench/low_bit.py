"""What weights of one and two bits do to accuracy and size, and what bits bring in speed.

    python tools/bench/low_bit.py WORK [--cifar10 CIFAR.npz] [--images 20000] [--epochs 8]
        [--tuning 8] [--seeds 1 2 3] [--markdown TABLE]
    python tools/bench/low_bit.py WORK --speed [--markdown TABLE]

ResNet-20 (He et al. 2016) on Fashion-MNIST (from Keras, KERAS_HOME) and on CIFAR-10 (`x_train`,
`y_train`, `x_test`, `y_test` in an .npz; without one by Keras). A float network is trained for each
seed; every arm goes on from it for the same number of steps, the float one too. First and last
layer stay in float. Low-bit arms end as a packed file, which is read back, and what was read is
scored. WORK keeps models and rows: a killed run goes on. At its defaults it takes hours on two
cores.

With --speed, single binary layers of 64 to 512 channels, batch 1, are timed in turns: packed words
in NumPy (signs packed each time), the same layer in Keras (a compiled function in float32, with
TensorFlow's own threads), and its float32 .tflite file on one thread.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from rich.console import Console
from small_images import Data, read_data, resnet20

import tfaccel
from tfaccel.core.artifacts import write_aside, write_json
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.quantization.low_bit import low_bit
from tfaccel.quantization.low_bit_weights import XNORNet
from tfaccel.quantization.packing import load_packed, save_packed
from tfaccel.quantization.popcount import PackedNetwork

BATCH = 128
ROUNDS = 7
THREADS = sorted({1, os.cpu_count() or 1})
ARMS: dict[str, tuple[str, Any]] = {
    "float": ("float32", None),
    "binary_connect": ("BinaryConnect, 1 bit", "binary_connect"),
    "bwn": ("XNOR-Net's weights alone, 1 bit", XNORNet(binary_inputs=False)),
    "twn": ("TWN, 2 bits", "twn"),
    "ttq": ("TTQ, 2 bits", "ttq"),
    "binary_net": ("BinaryNet, 1 bit, inputs too", "binary_net"),
    "xnor": ("XNOR-Net, 1 bit, inputs too", "xnor"),
    "xnor_k": ("XNOR-Net with K, 1 bit, inputs too", XNORNet(input_scale=True)),
}
# Channels in, channels out, image size (0: dense), window.
LAYERS = [
    (64, 64, 32, 3),
    (256, 256, 14, 3),
    (512, 512, 7, 3),
    (512, 512, 0, 0),
    (4096, 4096, 0, 0),
]


def train(model: keras.Model, data: Data, epochs: int, rate: float) -> None:
    """Trains with Adam, the rate falling to zero as a cosine; half of the images are mirrored."""
    x, y, *_ = data
    batch = min(BATCH, len(x))
    steps = len(x) // batch * epochs
    flow = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=1)
    flow = flow.batch(batch, drop_remainder=True)
    flow = flow.map(lambda a, b: (tf.image.random_flip_left_right(a, seed=1), b)).prefetch(2)
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # On a CPU, XLA compiles for longer than these runs take, and its steps are slower.
    model.compile(optimizer, loss, jit_compile=False)
    model.fit(flow, epochs=epochs, shuffle=False, verbose=0)


def accuracy_of(model: keras.Model, data: Data) -> float:
    """Returns the share of test images that a model gets right."""
    logits = model.predict(data[2], batch_size=500, verbose=0)
    return float((logits.argmax(1) == data[3]).mean())


def run_arm(start: Path, how: Any, data: Data, epochs: int, seed: int, stem: Path) -> None:
    """Trains one arm from the float network, and writes its file and its row."""
    keras.utils.set_random_seed(100 + seed)
    model = keras.models.load_model(start, compile=False)
    if how is not None:
        model = low_bit(model, how, seed=seed)
    train(model, data, epochs, 1e-3)
    row: dict[str, Any] = {"accuracy_in_training_form": accuracy_of(model, data)}
    if how is None:
        weights = sum(np.asarray(v).nbytes for v in model.weights)
        row |= {"accuracy": row["accuracy_in_training_form"], "size_bytes": weights}
    else:
        size = save_packed(model, stem.with_suffix(".packed"))
        row |= {
            "accuracy": accuracy_of(load_packed(size.path), data),
            "size_bytes": size.size_bytes - size.header_bytes,
            "header_bytes": size.header_bytes,
            "code_bytes": size.code_bytes + size.scale_bytes,
        }
    write_json(stem.with_suffix(".json"), row)


def train_all(options: argparse.Namespace, console: Console) -> str:
    """Trains what is not trained yet; returns the table."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for dataset in options.datasets:
        x, y, x_test, y_test = read_data(dataset, options.cifar10, options.images)
        data = x, y, x_test[: options.test], y_test[: options.test]
        for seed in options.seeds:
            start = options.work / f"{dataset}-{seed}.keras"
            if not start.exists():
                keras.utils.set_random_seed(seed)
                model = resnet20(data[0].shape[1:], 10)
                train(model, data, options.epochs, 3e-3)
                with write_aside(start) as aside:
                    model.save(aside)
            for key in options.arms:
                stem = options.work / f"{dataset}-{seed}-{key}"
                if not stem.with_suffix(".json").exists():
                    run_arm(start, ARMS[key][1], data, options.tuning, seed, stem)
                row = json.loads(stem.with_suffix(".json").read_text())
                console.print(stem.name, row)
                rows.setdefault((dataset, key), []).append(row)
    lines = [
        "| data | weights | accuracy | lowest to highest | weights [kB] |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for (dataset, key), seeds in rows.items():
        found = [row["accuracy"] for row in seeds]
        lines.append(
            f"| {dataset} | {ARMS[key][0]} | {np.mean(found):.1%} | "
            f"{min(found):.1%} to {max(found):.1%} | {seeds[0]['size_bytes'] / 1e3:.1f} |"
        )
    return "\n".join(lines) + "\n"


def binary_layer(channels: int, outputs: int, size: int, window: int) -> keras.Model:
    """Returns one binary layer on signs, as a low-bit model."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((size, size, channels) if size else (channels,))
    if size:
        layer = layers.Conv2D(outputs, window, padding="same", use_bias=False, name="binary")
    else:
        layer = layers.Dense(outputs, use_bias=False, name="binary")
    model = keras.Model(inputs, layer(inputs))
    return low_bit(model, "xnor", include="binary", batch_norm=False)


def time_all(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Returns the median over rounds of each one's fastest call, in milliseconds."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            run()
            times = []
            for _ in range(5):
                begin = time.perf_counter()
                run()
                times.append(time.perf_counter() - begin)
            found[name].append(min(times) * 1e3)
    return {name: float(np.median(times)) for name, times in found.items()}


def measure_speed(options: argparse.Namespace, console: Console) -> str:
    """Times single layers; returns the table."""
    lines = [
        "| layer | "
        + " | ".join(f"bits, {n} thread{'s' * (n > 1)} [ms]" for n in THREADS)
        + " | Keras float32 [ms] | TFLite float32, 1 thread [ms] | kernel in bits [kB] "
        "| in float32 [kB] |",
        "| --- |" + " ---: |" * (4 + len(THREADS)),
    ]
    for channels, outputs, size, window in LAYERS:
        title = f"{window}x{window}, {channels} to {outputs}, {size}x{size}"
        if not size:
            title = f"dense, {channels} to {outputs}"
        stem = options.work / ("speed-" + title.replace(", ", "-").replace(" ", "_"))
        if not stem.with_suffix(".json").exists():
            write_json(
                stem.with_suffix(".json"), _time_layer(channels, outputs, size, window, stem)
            )
        row = json.loads(stem.with_suffix(".json").read_text())
        console.print(title, row)
        times = [f"{row[name]:.2f}" for name in (*map(str, THREADS), "keras", "tflite")]
        kilobytes = [f"{row[name] / 1e3:.0f}" for name in ("bits_bytes", "float_bytes")]
        lines.append(f"| {title} | " + " | ".join([*times, *kilobytes]) + " |")
    return "\n".join(lines) + "\n"


def _time_layer(channels: int, outputs: int, size: int, window: int, stem: Path) -> dict[str, Any]:
    model = binary_layer(channels, outputs, size, window)
    shape = (1, size, size, channels) if size else (1, channels)
    x = np.random.default_rng(0).choice([-1.0, 1.0], shape).astype("float32")
    # The layer alone: signs are in already, here as there.
    plain = tfaccel.strip(model).get_layer("binary")
    inputs = keras.Input(shape[1:])
    alone = keras.Model(inputs, plain(inputs))
    artifact = tfaccel.export.to_tflite(alone, stem.with_suffix(".tflite"))
    file = TFLiteModel(artifact.path)
    tensor = tf.constant(x)
    compiled = tf.function(lambda: alone(tensor, training=False))

    def run(layer: Any) -> Callable[[], Any]:
        return lambda: layer(x)

    packed = {n: PackedNetwork(model, threads=n).layers["binary"] for n in THREADS}
    np.testing.assert_allclose(packed[1](x), compiled(), rtol=1e-3, atol=1e-2)
    runs: dict[str, Callable[[], Any]] = {str(n): run(layer) for n, layer in packed.items()}
    runs |= {"keras": lambda: compiled().numpy(), "tflite": lambda: file.predict(x)}
    return {
        **time_all(runs),
        "bits_bytes": packed[1].kernel_bytes,
        "float_bytes": packed[1].float_kernel_bytes,
    }


def main() -> None:
    """Trains and scores all arms, or times single layers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for finished models and rows")
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--datasets", nargs="+", default=["fashion_mnist", "cifar10"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--images", type=int, default=50000, help="to train on")
    parser.add_argument("--test", type=int, default=10000, help="images to score on")
    parser.add_argument("--epochs", type=int, default=20, help="of the float network")
    parser.add_argument("--tuning", type=int, default=20, help="epochs of every arm")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--speed", action="store_true", help="time single layers instead")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    console = Console(stderr=True)
    options.work.mkdir(parents=True, exist_ok=True)
    table = (measure_speed if options.speed else train_all)(options, console)
    print(table, end="")
    if options.markdown:
        with write_aside(options.markdown) as aside:
            aside.write_text(table)


if __name__ == "__main__":
    main()
