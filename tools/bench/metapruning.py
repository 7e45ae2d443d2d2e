"""MetaPruning against uniform width scaling, at the same multiply-accumulates, on small images.

    python tools/bench/metapruning.py WORK [--cifar10 CIFAR.npz] [--budgets 0.5 0.25 0.1]
        [--seeds 3] [--images 40000] [--meta-epochs 20] [--epochs 10] [--markdown TABLE]

On CIFAR-10 (`x_train`, `y_train`, `x_test`, `y_test` in an .npz), or without one on Fashion-MNIST
(from Keras, KERAS_HOME), padded to 32x32. A PruningNet is trained on the training images, channel
counts are searched by accuracy on 5,000 of them that it never saw, and the found network is trained
from scratch. The other arm is the smallest uniform width that has as many MACs or more; both arms
train on the same images for the same steps with the same seeds, and are scored on the 10,000 test
images, which nothing else looks at. WORK keeps what is finished: a killed run goes on.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import keras
import numpy as np
from rich.console import Console

from tfaccel.core.artifacts import write_aside
from tfaccel.pruning import MobileNetSpace, PruningNet, metaprune

BATCH = 128
HELD_OUT = 5000
CALIBRATION = 500
BLOCKS = ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (256, 1))
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def read_data(cifar10: Path | None, images: int) -> tuple[Any, Any, Any]:
    """Returns (x, y) for training, for choosing and for the final score."""
    if cifar10 is None:
        (x, y), (x_test, y_test) = keras.datasets.fashion_mnist.load_data()
    else:
        with np.load(cifar10) as packed:
            x, y, x_test, y_test = (
                packed[key] for key in ("x_train", "y_train", "x_test", "y_test")
            )

    def ready(part: Any) -> Any:
        if cifar10 is None:
            part = np.pad(part, ((0, 0), (2, 2), (2, 2)))[..., None]
        return (part / 127.5 - 1).astype("float32")

    order = np.random.default_rng(0).permutation(len(x))
    held, trained = order[:HELD_OUT], order[HELD_OUT : HELD_OUT + images]
    return (
        (ready(x[trained]), y[trained]),
        (ready(x[held]), y[held]),
        (ready(x_test), y_test),
    )


def train(model: keras.Model, data: Any, epochs: int) -> None:
    """Trains with Adam, the rate falling from 3e-3 to zero as a cosine."""
    x, y = data
    schedule = keras.optimizers.schedules.CosineDecay(3e-3, len(x) // BATCH * epochs)
    model.compile(keras.optimizers.Adam(schedule), LOSS, jit_compile=False)
    model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0)


def once(file: Path, make: Any) -> Any:
    """Returns what is in a JSON file, made first if it is not there."""
    if not file.exists():
        made = make()
        with write_aside(file) as aside:
            aside.write_text(json.dumps(made))
    return json.loads(file.read_text())


def from_scratch(model: keras.Model, data: Any, test: Any, epochs: int) -> float:
    """Returns the test accuracy of a plain network."""
    train(model, data, epochs)
    return float((model.predict(test[0], batch_size=500, verbose=0).argmax(1) == test[1]).mean())


def uniform_like(space: MobileNetSpace, macs: float) -> tuple[int, ...]:
    """Returns the narrowest uniform width with so many MACs or more."""
    widths = (step / 400 for step in range(1, 401))
    return next(c for c in map(space.scaled, widths) if space.macs(c) >= macs)


def search(net: PruningNet, budget: float, options: Any, train_set: Any, held: Any) -> Any:
    """Returns the found counts with the accuracy of their generated weights."""
    found = metaprune(
        net,
        budget * net.space.macs(net.space.whole),
        train_set[0][:CALIBRATION],
        held,
        generations=options.generations,
        report=lambda generation, best: CONSOLE.print(budget, generation, best),
    )
    return {"channels": found.genes, "score": found.score, "evaluated": found.evaluated}


CONSOLE = Console(stderr=True)


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a table."""
    lines = [
        "| MACs allowed | arm | channels | MACs [k] | test accuracy, mean (lowest to highest) |",
        "| ---: | --- | --- | ---: | ---: |",
    ]
    for row in rows:
        scores = np.array(row["scores"])
        lines.append(
            f"| {row['budget']:.0%} | {row['arm']} | {'-'.join(map(str, row['channels']))} | "
            f"{row['macs'] / 1e3:.0f} | {scores.mean():.2%} "
            f"({scores.min():.2%} to {scores.max():.2%}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains the PruningNet, searches, and trains both arms."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for what is finished")
    parser.add_argument("--cifar10", type=Path, help="an .npz; without one, Fashion-MNIST")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each arm")
    parser.add_argument("--images", type=int, default=40000, help="to train on")
    parser.add_argument("--meta-epochs", type=int, default=20, help="of the PruningNet")
    parser.add_argument("--epochs", type=int, default=10, help="of each network")
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    train_set, held, test = read_data(options.cifar10, options.images)
    space = MobileNetSpace(
        train_set[0].shape[1:], classes=10, stem=16, stem_stride=2, blocks=BLOCKS
    )
    file = options.work / "net.keras"
    if not file.exists():
        keras.utils.set_random_seed(1)
        untrained = PruningNet(space, seed=1)
        train(untrained, train_set, options.meta_epochs)
        with write_aside(file) as aside:
            untrained.save(aside)
    net = keras.models.load_model(file, compile=False)
    rows = []
    for budget in options.budgets:
        found = once(
            options.work / f"found-{budget}.json",
            lambda budget=budget: search(net, budget, options, train_set, held),
        )
        found_macs = space.macs(found["channels"])
        arms = {"found": found["channels"], "uniform": uniform_like(space, found_macs)}
        for arm, channels in arms.items():

            def scored(seed: int, channels: Any = channels) -> float:
                keras.utils.set_random_seed(seed)
                return from_scratch(space.build(channels), train_set, test, options.epochs)

            scores = [
                once(options.work / f"{arm}-{budget}-{seed}.json", partial(scored, seed))
                for seed in range(options.seeds)
            ]
            macs = space.macs(channels)
            row = {"budget": budget, "arm": arm, "channels": channels, "macs": macs}
            rows.append({**row, "scores": scores})
            CONSOLE.print(rows[-1])
    table = to_markdown(rows)
    print(table, end="")
    if options.markdown:
        with write_aside(options.markdown) as aside:
            aside.write_text(table)


if __name__ == "__main__":
    main()
