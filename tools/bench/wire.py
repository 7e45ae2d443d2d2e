"""What gradients cost on the wire: bytes of each rank and step, and the time of a step.

    python tools/bench/wire.py bytes WORK [--ranks 2 4] [--cycle 10] [--markdown TABLE]
    python tools/bench/wire.py ring WORK [--markdown TABLE]
    python tools/bench/wire.py times WORK --rate 1gbit [--ranks 2] [--arms dense DGC]

Every rank runs in a network namespace of its own (tools/bench/network.py, needs root), and its
interface's own counters are read: headers, acknowledgements and Horovod's coordination included.
The model has 5.15 M parameters (dense layers of 784, 1536, 1536, 1024 and 10) and learns
Fashion-MNIST in batches of 64 a rank. `ring` sends 25 MB of float32 by allreduce with 2, 3 and 4
ranks. `times` lets the arms take turns in one job; "Horovod on tf_keras" is the same model in
Keras 2 with Horovod's own optimizer. HOROVOD_CYCLE_TIME is `--cycle` milliseconds: how often ranks
coordinate even when there is nothing to send.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # for Horovod's own Keras module, on tf_keras

import numpy as np
from network import network, own_counters, run_ranks

WIDTHS = (784, 1536, 1536, 1024, 10)
BATCH = 64
WARM_UP_STEPS = 12  # the ranks' weights are compared at the first update and at the tenth
RING_ELEMENTS = 6_250_000
TF_KERAS = "Horovod on tf_keras"


def compressions() -> dict[str, Any]:
    """Returns the arms that run on our optimizer: a compressor each, None for none."""
    import tfaccel.distributed as hvd

    return {
        "dense": None,
        "FP16": hvd.FP16(),
        "BFloat16": hvd.BFloat16(),
        "ErrorFeedback(Int8(8))": hvd.ErrorFeedback(hvd.Int8(8)),
        "QSGD(4)": hvd.QSGD(4),
        "EFSignSGD": hvd.EFSignSGD(),
        "ErrorFeedback(RandomK(0.01))": hvd.ErrorFeedback(hvd.RandomK(0.01)),
        "ErrorFeedback(TopK(0.01))": hvd.ErrorFeedback(hvd.TopK(0.01, "sampled")),
        "ErrorFeedback(TopK(0.001))": hvd.ErrorFeedback(hvd.TopK(0.001, "sampled")),
        "ErrorFeedback(Threshold(0.01))": hvd.ErrorFeedback(hvd.Threshold(0.01)),
        "PowerSGD(4)": hvd.PowerSGD(4),
        "PowerSGD(2)": hvd.PowerSGD(2),
        "DGC": hvd.DGC(0.9, 0.999),
    }


def build(library: Any) -> Any:
    """Builds the network in either Keras."""
    library.utils.set_random_seed(0)
    layers = [library.layers.Dense(n, activation="relu") for n in WIDTHS[1:-1]]
    return library.Sequential(
        [library.Input((WIDTHS[0],)), *layers, library.layers.Dense(WIDTHS[-1])]
    )


def arm(name: str, flow: Any) -> Callable[[int], dict[str, float]]:
    """Returns a function that trains some steps and says what they took."""
    import keras

    import tfaccel.distributed as hvd

    library: Any = keras
    if name == TF_KERAS:
        import horovod.tensorflow.keras as raw
        import tf_keras

        library = tf_keras
        optimizer = raw.DistributedOptimizer(tf_keras.optimizers.SGD(0.05, momentum=0.9))
    elif name == "alone":
        optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    else:
        compression = compressions()[name]
        momentum = 0.0 if getattr(compression, "momentum", 0.0) else 0.9
        optimizer = keras.optimizers.SGD(0.05, momentum=momentum)
        optimizer = hvd.DistributedOptimizer(optimizer, compression=compression)
    model = build(library)
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    options = {"jit_compile": False}
    model.compile(optimizer, loss, **options)
    ends: list[float] = []

    class Stopwatch(library.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
            ends.append(time.perf_counter())

    def run(steps: int) -> dict[str, float]:
        ends.clear()
        hvd.barrier()
        before = own_counters()
        model.fit(flow, steps_per_epoch=steps, verbose=0, callbacks=[Stopwatch()])
        hvd.barrier()
        sent = own_counters() - before
        return {
            "sent_bytes": sent.sent_bytes / steps,
            "step_ms": 1e3 * float(np.median(np.diff(ends))) if steps > 1 else 0.0,
        }

    run(WARM_UP_STEPS)
    return run


def work(options: dict[str, Any], folder: Path) -> None:
    """What every rank does."""
    import tfaccel.distributed as hvd

    hvd.init()
    results: dict[str, Any] = {}
    time.sleep(1)
    before, begin = own_counters(), time.perf_counter()
    time.sleep(2)
    idle = own_counters() - before
    results["idle_bytes_per_second"] = idle.sent_bytes / (time.perf_counter() - begin)
    if options["what"] == "ring":
        results["ring"] = ring(hvd)
    else:
        import keras
        import tensorflow as tf

        flow = make_flow(tf, hvd.rank(), hvd.size())
        if options["what"] == "bytes":
            for name in options["arms"]:
                results[name] = [arm(name, flow)(options["steps"])]
                keras.utils.clear_session()
        else:
            runs = {name: arm(name, flow) for name in options["arms"]}
            results.update({name: [] for name in runs})
            for _ in range(options["rounds"]):
                for name, run in runs.items():
                    results[name].append(run(options["steps"]))
    (folder / f"{hvd.rank()}.json").write_text(json.dumps(results))
    hvd.shutdown()


def ring(hvd: Any) -> float:
    """Returns the bytes that this rank sends in one allreduce of 25 MB."""
    values = np.ones(RING_ELEMENTS, np.float32)
    hvd.allreduce(values, name="ring")
    hvd.barrier()
    before = own_counters()
    for _ in range(5):
        hvd.allreduce(values, name="ring")
    hvd.barrier()
    return (own_counters() - before).sent_bytes / 5


def make_flow(tf: Any, rank: int, size: int) -> Any:
    """Returns this rank's share of Fashion-MNIST, for ever."""
    import keras

    (x, y), _ = keras.datasets.fashion_mnist.load_data()
    x = x.reshape(len(x), -1)[rank::size].astype("float32") / 255
    y = y[rank::size].astype("int32")
    flow = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(10_000, seed=rank)
    return flow.repeat().batch(BATCH).prefetch(2)


def run_job(options: dict[str, Any], ranks: int, folder: Path) -> list[dict[str, Any]]:
    """Runs one job in namespaces and returns what each rank has found."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "options.json").write_text(json.dumps(options))
    env = {
        "HOROVOD_CYCLE_TIME": str(options["cycle"]),
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        "HOROVOD_STALL_CHECK_DISABLE": "1",
    }
    with network(ranks, rate=options["rate"]) as nodes:
        command = [sys.executable, str(Path(__file__).resolve()), "--rank", str(folder)]
        run_ranks(nodes, command, folder / "logs", env, timeout=options["timeout"])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def parameters() -> int:
    """Returns the number of the model's parameters."""
    return sum(a * b + b for a, b in itertools.pairwise(WIDTHS))


def table_of_bytes(found: dict[int, list[dict[str, Any]]], arms: Sequence[str]) -> list[str]:
    """A row for each arm: bytes of a rank and step, and how many times fewer than dense."""
    lines = [
        "| compression | " + " | ".join(f"{n} ranks [kB] | times fewer" for n in found) + " |",
        "| --- |" + " ---: | ---: |" * len(found),
    ]
    for name in arms:
        cells = []
        for ranks in found.values():
            sent = np.mean([rank[name][0]["sent_bytes"] for rank in ranks])
            dense = np.mean([rank["dense"][0]["sent_bytes"] for rank in ranks])
            cells += [f"{sent / 1e3:,.1f}", f"{dense / sent:,.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for count, ranks in found.items():
        idle = np.mean([rank["idle_bytes_per_second"] for rank in ranks]) / 1e3
        lines.append(f"\nIdle, {count} ranks: {idle:.1f} kB sent per second by each rank.")
    return lines


def table_of_times(ranks: list[dict[str, Any]], arms: Sequence[str]) -> list[str]:
    """A row for each arm: milliseconds a step, and its ratio to dense, round by round."""
    lines = [
        "| arm | step [ms] | times faster than dense (quartiles) | sent [kB] |",
        "| --- | ---: | ---: | ---: |",
    ]
    # A step takes as long as its slowest rank.
    times = {
        name: np.max([[r["step_ms"] for r in rank[name]] for rank in ranks], axis=0)
        for name in arms
    }
    for name in arms:
        low, middle, high = np.percentile(times["dense"] / times[name], [25, 50, 75])
        sent = np.mean([r["sent_bytes"] for rank in ranks for r in rank[name]]) / 1e3
        lines.append(
            f"| {name} | {np.median(times[name]):.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) | "
            f"{sent:,.1f} |"
        )
    return lines


def table_of_rings(found: dict[int, list[dict[str, Any]]]) -> list[str]:
    """A row for each number of ranks: bytes sent, and those of 2(N - 1)/N."""
    lines = [
        "| ranks | sent by each [MB] | 25 MB x 2(N - 1)/N | ratio |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for count, ranks in found.items():
        sent = float(np.mean([rank["ring"] for rank in ranks]))
        wanted = 2 * (count - 1) / count * 4 * RING_ELEMENTS
        lines.append(f"| {count} | {sent / 1e6:.2f} | {wanted / 1e6:.2f} | {sent / wanted:.4f} |")
    return lines


def main() -> None:
    """Runs the jobs and prints a table."""
    if sys.argv[1:2] == ["--rank"]:
        folder = Path(sys.argv[2])
        work(json.loads((folder / "options.json").read_text()), folder)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["bytes", "ring", "times"])
    parser.add_argument("work", type=Path, help="folder for results and logs")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 2 4 (ring: 2 3 4; times: 2)")
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--steps", type=int, default=10, help="of each arm, in each round")
    parser.add_argument("--rounds", type=int, default=7, help="in which arms take turns, for times")
    parser.add_argument("--rate", help="of each link, as tc writes it: 1gbit, 100mbit")
    parser.add_argument("--cycle", type=float, default=10.0, help="HOROVOD_CYCLE_TIME, ms")
    parser.add_argument("--timeout", type=float, default=580.0, help="of each job, seconds")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = vars(parser.parse_args())
    work_folder, markdown, ranks = (options.pop(name) for name in ("work", "markdown", "ranks"))
    what = options["what"]
    defaults = {"bytes": [2, 4], "ring": [2, 3, 4], "times": [2]}
    if not options["arms"]:
        options["arms"] = list(compressions()) + ([TF_KERAS, "alone"] if what == "times" else [])
    found = {
        count: run_job(options, count, work_folder / f"{what}-{count}")
        for count in ranks or defaults[what]
    }
    lines = [f"{parameters():,} parameters; HOROVOD_CYCLE_TIME={options['cycle']:g} ms.", ""]
    if what == "ring":
        lines = table_of_rings(found)
    elif what == "bytes":
        lines += table_of_bytes(found, options["arms"])
    else:
        for count, results in found.items():
            lines += [f"{count} ranks, {options['rate'] or 'no limit'}:", ""]
            lines += [*table_of_times(results, options["arms"]), ""]
    table = "\n".join(lines) + "\n"
    print(table, end="")
    if markdown:
        from tfaccel.core.artifacts import write_aside

        with write_aside(markdown) as aside:
            aside.write_text(table)


if __name__ == "__main__":
    main()
