"""The planner's formulas against measured runs, on networks of limited bandwidth and latency.

    sudo python tools/bench/cluster_model.py [--markdown TABLE]
    python tools/bench/cluster_model.py --compressors

Two and four Horovod ranks in network namespaces (tools/bench/network.py) send a gradient of 5.3 M
values by ring (allreduce), by ring-allgather (as compressors do), to a server and back (alltoall
to rank 0 and from it), and up and down a tree (alltoall from pair to pair; Horovod's own broadcast
sends to all children at once over one link, and takes longer). Each is compared with the formula,
given the bandwidth that a plain socket reaches and the cost of an operation of one value. Needs
root, `ip` and `tc`, and says so where they are missing.

With --compressors, the nanoseconds that each compressor works for a value, on this machine: what
tfaccel/distributed/compression_costs.py holds.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

import network
import numpy as np

from tfaccel.core.artifacts import write_aside
from tfaccel.distributed.compression_costs import COSTS
from tfaccel.distributed.cost_model import Network, Traffic, ring_s, server_s, tree_s

VALUES = 5_300_000
GATHERED_BYTES = 2_120_000  # of a message that cannot be summed: a tenth of the gradient's bytes
RATES = (("100mbit", 100.0), ("1gbit", 1000.0))
REPEATS = 3


def work(folder: Path) -> None:
    """What each rank does: times the operations, the slowest rank counting."""
    import horovod.tensorflow as hvd

    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    dense = np.ones(VALUES, np.float32)
    message = np.ones(GATHERED_BYTES, np.uint8)
    nothing = dense[:0]

    def through_server() -> None:
        to_server = [VALUES] + [0] * (size - 1)
        received, _ = hvd.alltoall(dense, splits=to_server, name="push")
        back, splits = nothing, [0] * size
        if rank == 0:
            total = received.numpy().reshape(size, VALUES).sum(0)
            back, splits = np.tile(total, size), [VALUES] * size
        hvd.alltoall(back, splits=splits, name="pull")

    def send(pairs: dict[int, int], data: Any) -> Any:
        splits = [0] * size
        if rank in pairs:
            splits[pairs[rank]] = VALUES
        given = data if rank in pairs else nothing
        return hvd.alltoall(given, splits=splits, name="pairs")[0].numpy()

    def through_tree() -> None:
        total, distances = dense, [2**k for k in range((size - 1).bit_length())]
        for distance in distances:  # what is left of the ranks halves
            senders = range(distance, size, 2 * distance)
            received = send({other: other - distance for other in senders}, total)
            total = total + received if len(received) else total
        for distance in reversed(distances):
            senders = range(0, size - distance, 2 * distance)
            received = send({other: other + distance for other in senders}, total)
            total = received if len(received) else total

    operations: dict[str, Callable[[], Any]] = {
        "nothing": lambda: hvd.allreduce(dense[:1], op=hvd.Sum, name="one"),
        "ring": lambda: hvd.allreduce(dense, op=hvd.Sum, name="ring"),
        "gather": lambda: hvd.allgather(message, name="gather"),
        "server": through_server,
        "tree": through_tree,
    }
    found = {}
    for name, operation in operations.items():
        operation()
        times = []
        for _ in range(REPEATS * (4 if name == "nothing" else 1)):
            hvd.allreduce(dense[:1], op=hvd.Sum, name="together")
            begin = time.perf_counter()
            operation()
            own = time.perf_counter() - begin
            times.append(float(hvd.allreduce(np.array(own), op=hvd.Max, name="slowest")))
        found[name] = statistics.median(times)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(found))
    hvd.shutdown()


def predict(size: int, network_between: Network, fixed: float) -> dict[str, float]:
    """Returns the seconds that the formulas give."""
    dense = Traffic(VALUES, 4 * VALUES, summable=True)
    gathered = Traffic(0, GATHERED_BYTES, summable=False)
    steps = (size - 1).bit_length()
    # Rank 0 is the server and a worker too, whose own gradient goes over no link.
    pushed = server_s(size, dense, network_between, 1) * (size - 1) / size
    return {
        "ring": fixed + ring_s(size, dense, network_between),
        "gather": fixed + ring_s(size, gathered, network_between),
        "server": 2 * fixed + pushed,
        "tree": 2 * steps * fixed + tree_s(size, dense, network_between),
    }


def compare(latency_ms: float, rates: Sequence[str]) -> list[str]:
    """Measures on every network; returns rows of the table."""
    lines = []
    for rate, nominal in RATES:
        for size in (2, 4) if rate in rates else ():
            with (
                network.network(size, rate=rate, latency_ms=latency_ms) as nodes,
                tempfile.TemporaryDirectory() as name,
            ):
                reached = network.measure_rate(nodes, 40 if nominal >= 1000 else 10) / 1e6
                command = [sys.executable, __file__, "--work", name]
                network.run_ranks(nodes, command, Path(name))
                found = json.loads(Path(name, "result.json").read_text())
            between = Network(min(reached, nominal), latency_ms)
            predicted = predict(size, between, found["nothing"])
            for way, expected in predicted.items():
                error = expected / found[way] - 1
                lines.append(
                    f"| {rate}, {reached:,.0f} reached | {size} | {way} | {1e3 * expected:,.0f} ms "
                    f"| {1e3 * found[way]:,.0f} ms | {error:+.0%} |"
                )
                print(lines[-1], flush=True)
    return lines


class Copies:
    """Stands for a job whose ranks all send the same."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def mean(self, tensor: Any, key: str) -> Any:  # noqa: ARG002
        """Returns the tensor."""
        return tensor

    mean_half = mean

    def gather(self, message: Any, key: str) -> Any:  # noqa: ARG002
        """Returns as many copies as there are ranks."""
        import tensorflow as tf

        return tf.concat([message] * self.size, 0)


def time_compressor(name: str, size: int) -> float:
    """Returns nanoseconds for a value of a step of one compressor, in a job of some ranks."""
    import tensorflow as tf

    from tfaccel.distributed.compressors import compressors

    compressor = compressors.get(name)
    shapes = [(1024, 1024)] * 5
    gradients = [tf.random.normal(shape, seed=n) for n, shape in enumerate(shapes)]
    channel: Any = Copies(size)

    @tf.function(autograph=False)
    def step() -> Any:
        payload, state = compressor.compress(gradients, compressor.init(shapes), channel)
        exchanged = compressor.communicate(payload, state, channel)
        return compressor.decompress(exchanged.received)

    step()
    times = []
    for _ in range(3 * REPEATS):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return 1e9 * min(times) / sum(math.prod(shape) for shape in shapes)


def time_compressors() -> None:
    """Prints nanoseconds for a value: to make a message, and to read one."""
    for name, cost in COSTS.items():
        if name == "none":
            continue
        two, ten = time_compressor(name, 2), time_compressor(name, 10)
        read = 0.0 if cost.summable else max(0.0, (ten - two) / 8)
        print(f"{name}: {two - 2 * read:.1f} to make a message, {read:.2f} to read one", flush=True)


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--rates", default=",".join(rate for rate, _ in RATES))
    parser.add_argument("--compressors", action="store_true")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    if arguments.compressors:
        time_compressors()
        return
    reason = network.reason_against(arguments.latency_ms)
    if reason is not None:
        print(f"Skipped: {reason}.")
        return
    lines = [
        "| network | ranks | operation | predicted | measured | error |",
        "| --- | --- | --- | --- | --- | --- |",
        *compare(arguments.latency_ms, arguments.rates.split(",")),
    ]
    if arguments.markdown:
        with write_aside(arguments.markdown) as aside:
            aside.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
