"""What pruning does to accuracy, size and speed: every pattern beside a random choice.

    python tools/bench/pruning.py WORK [--cifar10 CIFAR.npz] [--networks resnet20 mobilenet_v2]
        [--images 20000] [--epochs 8] [--tuning 2] [--markdown TABLE]

ResNet-20 (He et al. 2016) and MobileNetV2 (width 0.5) on Fashion-MNIST (from Keras, KERAS_HOME) and
on CIFAR-10 (`x_train`, `y_train`, `x_test`, `y_test` in an .npz; without one by Keras). A dense
network is trained; every arm goes on from it for the same number of steps, the dense one too, and
ends as a .tflite file in float32. Random arms draw which weights or channels go, all else alike.
Files are timed at the end, turn by turn, when nothing else of this script runs. WORK keeps models
and rows: a killed run goes on. At its defaults it takes hours on two cores; the README says with
which options its table was made.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import keras
import numpy as np
from rich.console import Console
from small_images import NETWORKS, Data, read_data

import tfaccel
from tfaccel.core.artifacts import write_aside
from tfaccel.pruning import PolynomialDecay, UpdatePruning, prune, prune_channels

BATCH = 128
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to prune.

    Attributes:
        title: what the table calls it.
        rewrite: `(model, steps, criterion, data) -> model`; None leaves the network dense.
        criterion: of the arm that is no control.
    """

    title: str
    rewrite: Callable[[keras.Model, int, str, Any], keras.Model] | None
    criterion: str


def masks(sparsity: float, pattern: str = "element") -> Callable[..., keras.Model]:
    """Returns a rewrite that prunes over the first 60 % of the steps, by Zhu & Gupta's schedule."""

    def rewrite(model: keras.Model, steps: int, criterion: str, data: Any) -> keras.Model:  # noqa: ARG001
        end = max(1, int(0.6 * steps))
        every = max(1, end // 20)
        schedule = PolynomialDecay(0.0, sparsity, 1, 1 + end // every * every, frequency=every)
        return prune(model, schedule, pattern=pattern, criterion=criterion, seed=1)

    return rewrite


def channels(kept: float) -> Callable[..., keras.Model]:
    """Returns a rewrite that keeps a share of the MACs."""

    def rewrite(model: keras.Model, steps: int, criterion: str, data: Any) -> keras.Model:  # noqa: ARG001
        return prune_channels(
            model, {"macs": kept}, criterion, data, multiple_of=4, loss=LOSS, seed=1
        )

    return rewrite


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
ARMS = {
    "dense": Arm("dense", None, ""),
    "80": Arm("80 % of weights", masks(0.8), "magnitude"),
    "90": Arm("90 % of weights", masks(0.9), "magnitude"),
    "95": Arm("95 % of weights", masks(0.95), "magnitude"),
    "2of4": Arm("2:4", masks(0.5, "2:4"), "magnitude"),
    "channels50": Arm("channels, -50 % MACs", channels(0.5), "taylor"),
    "channels70": Arm("channels, -70 % MACs", channels(0.3), "taylor"),
}


def train(model: keras.Model, data: Data, epochs: int, rate: float) -> None:
    """Trains with Adam, the rate falling to zero as a cosine; half of the images are mirrored."""
    import tensorflow as tf

    x, y, *_ = data
    steps = len(x) // BATCH * epochs
    flow = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=1)
    flow = flow.batch(BATCH, drop_remainder=True)
    flow = flow.map(lambda a, b: (tf.image.random_flip_left_right(a, seed=1), b)).prefetch(2)
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps))
    # On a CPU, XLA compiles for longer than these runs take, and its steps are slower.
    model.compile(optimizer, LOSS, jit_compile=False)
    masked = bool(tfaccel.core.transformed_layers(model))
    callbacks = [UpdatePruning()] if masked else []
    model.fit(flow, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)


def run_arm(dense: keras.Model, arm: Arm, criterion: str, data: Data, epochs: int) -> keras.Model:
    """Returns the trained plain model of one arm."""
    keras.utils.set_random_seed(2)
    steps = len(data[0]) // BATCH * epochs
    model = keras.models.clone_model(dense)
    model.set_weights(dense.get_weights())
    if arm.rewrite is not None:
        model = arm.rewrite(model, steps, criterion, data[:2])
    train(model, data, epochs, 1e-3)
    return tfaccel.strip(model)


def finish(model: keras.Model, data: Data, stem: Path) -> None:
    """Writes a model and its row."""
    logits = model.predict(data[2], batch_size=500, verbose=0)
    counts = tfaccel.measurement.count(model)
    artifact = tfaccel.export.to_tflite(model, stem.with_suffix(".tflite"))
    model.save(stem.with_suffix(".keras"))
    row = {
        "accuracy": float((logits.argmax(1) == data[3]).mean()),
        "macs": counts.macs,
        "parameters": counts.parameters,
        "sparsity": tfaccel.measurement.measure_sparsity(model),
        "size_bytes": artifact.size_bytes,
        "gzip_bytes": tfaccel.measurement.measure_gzip_size(artifact.path),
    }
    with write_aside(stem.with_suffix(".json")) as aside:
        aside.write_text(json.dumps(row))


def measure_all(stems: list[Path], work: Path) -> dict[str, float]:
    """Returns the median latency of each file, timed in turns so that a busy minute hits all."""
    found: dict[str, list[float]] = {str(stem): [] for stem in stems}
    for _ in range(ROUNDS):
        for stem in stems:
            record = tfaccel.measure(stem.with_suffix(".tflite"), runs=50)
            found[str(stem)].append(record.latency_ms)
    medians = {stem: float(np.median(times)) for stem, times in found.items()}
    with write_aside(work / "latency.json") as aside:
        aside.write_text(json.dumps({Path(s).name: t for s, t in medians.items()}))
    return medians


def to_markdown(stems: list[tuple[str, str, str, str, Path]], latency: dict[str, float]) -> str:
    """Returns the rows as a table."""
    lines = [
        "| data | network | pruned | accuracy | random instead | MACs [M] | size [kB] | gzip [kB] "
        "| latency [ms] |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = {stem.name: json.loads(stem.with_suffix(".json").read_text()) for *_, stem in stems}
    for dataset, network, key, control, stem in stems:
        if control:
            continue
        row = rows[stem.name]
        other = rows.get(stem.name + "-random")
        lines.append(
            f"| {dataset} | {network} | {ARMS[key].title} | {row['accuracy']:.1%} | "
            f"{'' if other is None else format(other['accuracy'], '.1%')} | "
            f"{row['macs'] / 1e6:.1f} | {row['size_bytes'] / 1e3:.0f} | "
            f"{row['gzip_bytes'] / 1e3:.0f} | {latency[str(stem)]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs all arms, then times them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for finished models and rows")
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--datasets", nargs="+", default=["fashion_mnist", "cifar10"])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--images", type=int, default=50000, help="to train on")
    parser.add_argument("--epochs", type=int, default=20, help="of the dense network")
    parser.add_argument("--tuning", type=int, default=5, help="epochs of every arm")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    console = Console(stderr=True)
    options.work.mkdir(parents=True, exist_ok=True)
    stems = []
    for network in options.networks:
        for dataset in options.datasets:
            data = read_data(dataset, options.cifar10, options.images)
            start = options.work / f"{dataset}-{network}.keras"
            if not start.exists():
                keras.utils.set_random_seed(1)
                model = NETWORKS[network](data[0].shape[1:], 10)
                train(model, data, options.epochs, 3e-3)
                with write_aside(start) as aside:
                    model.save(aside)
            dense = keras.models.load_model(start, compile=False)
            for key, arm in ARMS.items():
                for control in ("", "-random") if arm.rewrite else ("",):
                    stem = options.work / f"{dataset}-{network}-{key}{control}"
                    stems.append((dataset, network, key, control, stem))
                    if stem.with_suffix(".json").exists():
                        continue
                    criterion = "random" if control else arm.criterion
                    finish(run_arm(dense, arm, criterion, data, options.tuning), data, stem)
                    console.print(stem.name, json.loads(stem.with_suffix(".json").read_text()))
    latency = measure_all([stem for *_, control, stem in stems if not control], options.work)
    table = to_markdown(stems, latency)
    print(table, end="")
    if options.markdown:
        with write_aside(options.markdown) as aside:
            aside.write_text(table)


if __name__ == "__main__":
    main()
