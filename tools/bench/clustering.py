"""What weight clustering does to accuracy and size, and what Huffman coding makes of it.

    python tools/bench/clustering.py WORK [--cifar10 CIFAR.npz] [--networks resnet20 mobilenet_v2]
        [--images 20000] [--epochs 8] [--tuning 4] [--seeds 1 2 3] [--markdown TABLE]

ResNet-20 (He et al. 2016) and MobileNetV2 (width 0.5) on Fashion-MNIST (from Keras, KERAS_HOME) and
on CIFAR-10 (`x_train`, `y_train`, `x_test`, `y_test` in an .npz; without one by Keras). A float
network is trained for each seed; every arm goes on from it for the same number of steps, the float
one too. Pruned arms prune over the first half of them and are clustered then; "not trained" is
k-means alone on the network that the float arm ends as. Every arm ends as a .tflite file in float32
and as a file of `save_compressed`, which is read back, and what was read is scored. Ratios are to
the float32 weights, all of them counted: first convolution, biases and batch norm stay float. Only
centroids from k-means++ are refined by k-means. WORK keeps models and rows: a killed run goes on.
At its defaults it takes hours on two cores.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import keras
import numpy as np
from rich.console import Console
from small_images import NETWORKS, Data, read_data

import tfaccel
from tfaccel.core.artifacts import write_aside, write_json
from tfaccel.pruning import PolynomialDecay, UpdatePruning, prune
from tfaccel.quantization.clustering import cluster
from tfaccel.quantization.compression import huffman_size, load_compressed, save_compressed

BATCH = 128
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to make a network small.

    Attributes:
        title: what the table calls it.
        clusters: values of a kernel; 0 leaves all.
        sparsity: share of zeros.
        initialization: of the centroids.
        refine: whether k-means refines them.
        trained: whether centroids are trained.
    """

    title: str
    clusters: int = 0
    sparsity: float = 0.0
    initialization: str = "kmeans++"
    refine: bool = True
    trained: bool = True


ARMS = {
    "float": Arm("float32"),
    "c32": Arm("32 clusters", 32),
    "c16": Arm("16 clusters", 16),
    "c16-linear": Arm("16 clusters, linear", 16, initialization="linear", refine=False),
    "c16-density": Arm("16 clusters, density", 16, initialization="density", refine=False),
    "c16-untrained": Arm("16 clusters, not trained", 16, trained=False),
    "p80": Arm("80 % pruned", sparsity=0.8),
    "p80-c16": Arm("80 % pruned, 16 clusters", 16, 0.8),
}


def train(model: keras.Model, data: Data, epochs: int, rate: float, masked: bool = False) -> None:
    """Trains with Adam, the rate falling to zero as a cosine; half of the images are mirrored."""
    import tensorflow as tf

    x, y, *_ = data
    steps = len(x) // BATCH * epochs
    flow = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=1)
    flow = flow.batch(BATCH, drop_remainder=True)
    flow = flow.map(lambda a, b: (tf.image.random_flip_left_right(a, seed=1), b)).prefetch(2)
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, max(steps, 1)))
    # On a CPU, XLA compiles for longer than these runs take, and its steps are slower.
    model.compile(optimizer, LOSS, jit_compile=False)
    callbacks = [UpdatePruning()] if masked else []
    model.fit(flow, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)


def run_arm(dense: keras.Model, arm: Arm, data: Data, epochs: int, seed: int) -> keras.Model:
    """Returns the trained plain model of one arm."""
    keras.utils.set_random_seed(100 + seed)
    model = keras.models.clone_model(dense)
    model.set_weights(dense.get_weights())
    left = epochs
    if arm.sparsity:
        # The masks are there when the centroids are chosen.
        first = max(1, epochs // 2)
        end = max(2, int(0.8 * first * (len(data[0]) // BATCH)))
        model = prune(model, PolynomialDecay(0.0, arm.sparsity, 1, end, frequency=1), seed=seed)
        train(model, data, first, 1e-3, masked=True)
        left = epochs - first
    if not arm.trained:
        train(model, data, left, 1e-3)
        left = 0
    if arm.clusters:
        model = cluster(
            model,
            arm.clusters,
            initialization=arm.initialization,
            refine=arm.refine,
            seed=seed,
        )
    if left:
        train(model, data, left, 1e-3, masked=arm.sparsity > 0)
    return tfaccel.strip(model)


def finish(model: keras.Model, data: Data, stem: Path) -> dict[str, Any]:
    """Writes the files of a model and its row, which is returned."""
    artifact = tfaccel.export.to_tflite(model, stem.with_suffix(".tflite"))
    packed = save_compressed(model, stem.with_suffix(".compressed"))
    logits = load_compressed(packed).predict(data[2], batch_size=500, verbose=0)
    size = huffman_size(model)
    row = {
        "accuracy": float((logits.argmax(1) == data[3]).mean()),
        "sparsity": tfaccel.measurement.measure_sparsity(model),
        "tflite_bytes": artifact.size_bytes,
        "gzip_bytes": tfaccel.measurement.measure_gzip_size(artifact.path),
        "float_bytes": size.float_bytes,
        "fixed_bytes": size.fixed_bytes,
        "huffman_bytes": size.huffman_bytes,
        "file_bytes": packed.stat().st_size,
        "ratio": size.ratio,
    }
    write_json(stem.with_suffix(".json"), row)
    return row


def to_markdown(rows: dict[tuple[str, str, str], list[dict[str, float]]]) -> str:
    """Returns the table: means over seeds, and the range of accuracies."""
    lines = [
        "| data | network | weights | accuracy | .tflite [kB] | gzip [kB] | tables and places [kB] "
        "| Huffman [kB] | times smaller |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (dataset, network, key), found in rows.items():
        mean = {name: float(np.mean([row[name] for row in found])) for name in found[0]}
        scores = [row["accuracy"] for row in found]
        spread = f" ({min(scores):.1%} to {max(scores):.1%})" if len(found) > 1 else ""
        kilobytes = " | ".join(
            f"{mean[name] / 1e3:.1f}"
            for name in ("tflite_bytes", "gzip_bytes", "fixed_bytes", "huffman_bytes")
        )
        lines.append(
            f"| {dataset} | {network} | {ARMS[key].title} | {mean['accuracy']:.1%}{spread} | "
            f"{kilobytes} | {mean['ratio']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs all arms."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for finished models and rows")
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--datasets", nargs="+", default=["fashion_mnist", "cifar10"])
    parser.add_argument("--networks", nargs="+", default=["resnet20"], choices=NETWORKS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--images", type=int, default=50000, help="to train on")
    parser.add_argument("--epochs", type=int, default=20, help="of the float network")
    parser.add_argument("--tuning", type=int, default=6, help="epochs of every arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    console = Console(stderr=True)
    options.work.mkdir(parents=True, exist_ok=True)
    rows: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for dataset in options.datasets:
        data = read_data(dataset, options.cifar10, options.images)
        for network in options.networks:
            for seed in options.seeds:
                start = options.work / f"{dataset}-{network}-{seed}.keras"
                if not start.exists():
                    keras.utils.set_random_seed(seed)
                    model = NETWORKS[network](data[0].shape[1:], 10)
                    train(model, data, options.epochs, 3e-3)
                    with write_aside(start) as aside:
                        model.save(aside)
                dense = keras.models.load_model(start, compile=False)
                for key in options.arms:
                    stem = options.work / f"{dataset}-{network}-{seed}-{key}"
                    done = stem.with_suffix(".json")
                    if done.exists():
                        row = json.loads(done.read_text())
                    else:
                        model = run_arm(dense, ARMS[key], data, options.tuning, seed)
                        row = finish(model, data, stem)
                        console.print(stem.name, row)
                    rows.setdefault((dataset, network, key), []).append(row)
    table = to_markdown(rows)
    print(table, end="")
    if options.markdown:
        with write_aside(options.markdown) as aside:
            aside.write_text(table)


if __name__ == "__main__":
    main()
