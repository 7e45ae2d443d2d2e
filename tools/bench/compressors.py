"""Accuracy against bytes: Fashion-MNIST learned by two ranks, with each compressor.

    python tools/bench/compressors.py WORK [--model small large] [--arms dense DGC] [--seeds 3]
        [--epochs 16] [--markdown TABLE]

Two ranks in network namespaces (needs root), batches of 64 each, SGD with momentum 0.9 and a
learning rate that falls from 0.05 as a cosine; EFSignSGD takes 0.02. The small model has 0.54 M
parameters (dense layers of 784, 512, 256 and 10), the large one 5.15 M (784, 1536, 1536, 1024 and
10). DGC's warm-up is four epochs, the paper's. Bytes are the interfaces' own, of the last epoch, in
which every arm is past its warm-up; HOROVOD_CYCLE_TIME is 10 ms. Every run is kept in WORK and not
repeated; the table is made of all that is there. Seeds are 0, 1, ... and set weights and order.

An element is sent every thousand steps by DGC at 99.9 %: it takes some ten thousand steps to come
close to dense training.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import numpy as np
from network import network, own_counters, run_ranks
from rich.console import Console

from tfaccel.core.artifacts import write_aside, write_json

MODELS = {"small": (784, 512, 256, 10), "large": (784, 1536, 1536, 1024, 10)}
BATCH = 64
RATES = {"EFSignSGD": 0.02}
RATE = 0.05


def compressions(steps_per_epoch: int) -> dict[str, Any]:
    """Returns a compressor for each arm."""
    import tfaccel.distributed as hvd

    return {
        "dense": None,
        "BFloat16": hvd.BFloat16(),
        "ErrorFeedback(Int8(8))": hvd.ErrorFeedback(hvd.Int8(8)),
        "QSGD(4)": hvd.QSGD(4),
        "EFSignSGD": hvd.EFSignSGD(),
        "PowerSGD(4)": hvd.PowerSGD(4),
        "PowerSGD(2)": hvd.PowerSGD(2),
        "ErrorFeedback(RandomK(0.01))": hvd.ErrorFeedback(hvd.RandomK(0.01)),
        "ErrorFeedback(TopK(0.01))": hvd.ErrorFeedback(hvd.TopK(0.01, "sampled")),
        "ErrorFeedback(TopK(0.001))": hvd.ErrorFeedback(hvd.TopK(0.001, "sampled")),
        "DGC": hvd.DGC(0.9, 0.999, warmup_steps=4 * steps_per_epoch),
    }


def work(options: dict[str, Any], folder: Path) -> None:
    """What every rank does: trains, and rank 0 looks at the test set."""
    import keras

    import tfaccel.distributed as hvd

    hvd.init()
    (x, y), (x_test, y_test) = keras.datasets.fashion_mnist.load_data()
    x, x_test = (a.reshape(len(a), -1).astype("float32") / 255 for a in (x, x_test))
    order = np.random.default_rng(options["seed"]).permutation(len(x))
    x, y = hvd.shard((x[order], y[order]))
    widths = MODELS[options["model"]]
    keras.utils.set_random_seed(options["seed"])
    hidden = [keras.layers.Dense(n, activation="relu") for n in widths[1:-1]]
    model = keras.Sequential([keras.Input((784,)), *hidden, keras.layers.Dense(widths[-1])])
    keras.utils.set_random_seed(1000 * options["seed"] + hvd.rank())  # each its own order
    steps = len(x) // BATCH
    used = steps * BATCH
    name, epochs = options["arm"], options["epochs"]
    compression = compressions(steps)[name]
    rate = keras.optimizers.schedules.CosineDecay(RATES.get(name, RATE), steps * epochs)
    momentum = 0.0 if getattr(compression, "momentum", 0.0) else 0.9
    optimizer = keras.optimizers.SGD(rate, momentum=momentum)
    optimizer = hvd.DistributedOptimizer(optimizer, compression=compression)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False)
    begin = time.perf_counter()
    sent = 0.0
    for epoch in range(epochs):
        hvd.barrier()
        before = own_counters()
        model.fit(x[:used], y[:used], BATCH, initial_epoch=epoch, epochs=epoch + 1, verbose=0)
        hvd.barrier()
        sent = (own_counters() - before).sent_bytes / steps
    predicted = np.argmax(model.predict(x_test, 500, verbose=0), axis=1)
    found = {
        "accuracy": float((predicted == y_test).mean()),
        "sent_bytes": sent,
        "seconds": time.perf_counter() - begin,
        "parameters": model.count_params(),
    }
    (folder / f"{hvd.rank()}.json").write_text(json.dumps(found))
    hvd.shutdown()


def run(options: dict[str, Any], folder: Path) -> list[dict[str, float]]:
    """Runs one training and returns what both ranks have found."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "options.json", options)
    env = {
        "HOROVOD_CYCLE_TIME": "10",
        "HOROVOD_STALL_CHECK_DISABLE": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
    }
    with network(2) as nodes:
        command = [sys.executable, str(Path(__file__).resolve()), "--rank", str(folder)]
        run_ranks(nodes, command, folder / "logs", env, timeout=3600)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def table(results: Path) -> str:
    """Makes a row for each model and arm that has been run."""
    lines = [
        "| model | compression | test accuracy [%] (each seed) | to dense [points] | "
        "sent by a rank and step [kB] | times fewer |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for model in MODELS:
        found: dict[str, list[dict[str, float]]] = {}
        for file in sorted(results.glob(f"{model}-*.json")):
            stored = json.loads(file.read_text())
            found.setdefault(stored["arm"], []).append(stored)
        if "dense" not in found:
            continue
        dense_bytes = np.mean([run["sent_bytes"] for run in found["dense"]])
        dense = {run["seed"]: run["accuracy"] for run in found["dense"]}
        for arm in [name for name in compressions(1) if name in found]:
            runs = found[arm]
            accuracies = [100 * run["accuracy"] for run in runs]
            pairs = [r["accuracy"] - dense[r["seed"]] for r in runs if r["seed"] in dense]
            sent = np.mean([run["sent_bytes"] for run in runs])
            each = ", ".join(f"{a:.2f}" for a in accuracies)
            lines.append(
                f"| {model} | {arm} | {np.mean(accuracies):.2f} ({each}) | "
                f"{100 * np.mean(pairs):+.2f} | {sent / 1e3:,.1f} | {dense_bytes / sent:,.1f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what has not been run yet and prints the table."""
    if sys.argv[1:2] == ["--rank"]:
        folder = Path(sys.argv[2])
        work(json.loads((folder / "options.json").read_text()), folder)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for results and logs")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--arms", nargs="+", help="default: all; the large model: dense DGC")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    for model in options.model:
        everything = ["dense", "DGC"] if model == "large" else list(compressions(1))
        for seed in range(options.seeds):
            for number, arm in enumerate(options.arms or everything):
                file = options.work / f"{model}-{arm}-{seed}.json"
                if file.exists():
                    continue
                how = {"model": model, "arm": arm, "seed": seed, "epochs": options.epochs}
                first, second = run(how, options.work / "runs" / f"{model}-{number}-{seed}")
                sent = (first["sent_bytes"] + second["sent_bytes"]) / 2
                write_json(file, {**how, **first, "sent_bytes": sent})
                Console(stderr=True).print(f"{model} {arm} {seed}: {first['accuracy']:.4f}")
    text = table(options.work)
    print(text, end="")
    if options.markdown:
        with write_aside(options.markdown) as aside:
            aside.write_text(text)


if __name__ == "__main__":
    main()
