"""Step times of clusters that are not there: predicted from figures of what is."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial

from tfaccel.core.checks import check_positive
from tfaccel.distributed.arguments import check_count
from tfaccel.distributed.compression_costs import COSTS, CompressionCost, Shape
from tfaccel.distributed.cost_model import TOPOLOGIES, Network, Traffic, communication_s

MOST_WORKERS = 1024


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One way to train.

    Attributes:
        topology: "ring", "tree" or "server".
        compressor: its name.
        workers: N.
        step_ms: milliseconds of a step.
        communication_ms: of these, on the network.
        compression_ms: of these, making and reading messages.
        sent_bytes: that a worker sends in a step.
        efficiency: share of the step in which the model is computed, 0 to 1.
    """

    topology: str
    compressor: str
    workers: int
    step_ms: float
    communication_ms: float
    compression_ms: float
    sent_bytes: float
    efficiency: float


@dataclasses.dataclass(frozen=True)
class Crossover:
    """A number of workers from which another way is faster.

    Attributes:
        workers: the first number at which `after` is faster than `before`.
        what: what is held equal: a compressor (topologies are compared) or a topology.
        before: fastest below.
        after: fastest from there on, up to the next crossover.
    """

    workers: int
    what: str
    before: str
    after: str


class Planner:
    """Predicts steps of data-parallel training.

    A step is compute, then compression, then communication; nothing overlaps, as nothing does in
    `DistributedOptimizer`. Each worker has a batch of its own, so compute does not depend on their
    number.

    Args:
        compute_ms: of a step of one worker, forward, backward and update, milliseconds; measured.
        shapes: of the gradients, or how many values they have.
        network: between the workers.
        servers: of the parameter server.
        compressors: costs by name; by default those of `tfaccel.distributed`.

    Raises:
        ValueError: a figure is out of range.

    >>> planner = Planner(50.0, 5_000_000, Network(bandwidth_mbit=1000, latency_ms=0.1))
    >>> dense = planner.predict("ring", "none", 2)  # 2 messages of 10 MB: 2 · 80 ms
    >>> round(dense.communication_ms)
    161
    """

    def __init__(
        self,
        compute_ms: float,
        shapes: Sequence[Shape] | int,
        network: Network,
        servers: int = 1,
        compressors: dict[str, CompressionCost] | None = None,
    ) -> None:
        check_positive("compute_ms", compute_ms)
        self.compute_ms = compute_ms
        self.shapes = _square(shapes) if isinstance(shapes, int) else list(shapes)
        self.network = network
        self.servers = check_count("servers", servers)
        self.compressors = COSTS if compressors is None else compressors
        self._traffic = {name: c.traffic(self.shapes) for name, c in self.compressors.items()}
        self.values = COSTS["none"].traffic(self.shapes).values
        self._known: dict[tuple[str, str, int], Prediction] = {}

    def predict(self, topology: str, compressor: str, workers: int) -> Prediction:
        """Predicts one way.

        Raises:
            ValueError: there is no such topology or compressor.
        """
        if compressor not in self.compressors:
            raise ValueError(
                f"compressor must be one of {', '.join(self.compressors)}, but got {compressor!r}."
            )
        key = topology, compressor, workers
        if key not in self._known:
            self._known[key] = self._predict(*key)
        return self._known[key]

    def table(self, workers: Sequence[int]) -> list[Prediction]:
        """Predicts all topologies with all compressors."""
        return [
            self.predict(topology, compressor, count)
            for compressor in self.compressors
            for topology in TOPOLOGIES
            for count in workers
        ]

    def crossovers(self, most: int = MOST_WORKERS) -> list[Crossover]:
        """Finds where the fastest way changes, among numbers of workers from 2 to `most`.

        For each compressor topologies are compared; for each topology compressors; and with the
        best topology of each, every compressor with none.
        """
        check_count("most", most, 2)
        found: list[Crossover] = []
        for name in self.compressors:
            found += self._changes(name, TOPOLOGIES, partial(self._swapped_ms, name), most)
        for topology in TOPOLOGIES:
            names = list(self.compressors)
            found += self._changes(topology, names, partial(self._ms, topology), most)
        for name in self.compressors:
            if name != "none" and "none" in self.compressors:
                found += self._changes("any topology", ["none", name], self._best_ms, most)
        return found

    def _predict(self, topology: str, compressor: str, workers: int) -> Prediction:
        cost, traffic = self.compressors[compressor], self._traffic[compressor]
        if cost.may_send_dense and _sent_bytes(topology, traffic, workers) > _sent_bytes(
            topology, _dense(self.values), workers
        ):
            traffic = _dense(self.values)
        communication = 1e3 * communication_s(
            topology, workers, traffic, self.network, self.servers
        )
        compression = 1e3 * cost.seconds(traffic, workers) if workers > 1 else 0.0
        step = self.compute_ms + communication + compression
        return Prediction(
            topology,
            compressor,
            workers,
            step,
            communication,
            compression,
            _sent_bytes(topology, traffic, workers),
            self.compute_ms / step,
        )

    def _ms(self, topology: str, compressor: str, workers: int) -> float:
        return self.predict(topology, compressor, workers).step_ms

    def _swapped_ms(self, compressor: str, topology: str, workers: int) -> float:
        return self._ms(topology, compressor, workers)

    def _best_ms(self, compressor: str, workers: int) -> float:
        return min(self._ms(topology, compressor, workers) for topology in TOPOLOGIES)

    @staticmethod
    def _changes(
        what: str, ways: Sequence[str], time: Callable[[str, int], float], most: int
    ) -> list[Crossover]:
        found: list[Crossover] = []
        before: str | None = None
        for workers in range(2, most + 1):
            best = min(ways, key=lambda way: time(way, workers))
            if before is not None and time(best, workers) < time(before, workers):
                found.append(Crossover(workers, what, before, best))
                before = best
            before = before or best
        return found


def make_planner(
    model: str | os.PathLike[str] | None,
    parameters: float | None,
    compute_ms: float | None,
    batch_size: int,
    bandwidth: float,
    latency: float,
    operation_ms: float,
    servers: int,
    chosen: Sequence[str] = (),
) -> Planner:
    """Makes a planner of what the command line says.

    Args:
        model: .keras file; its gradients' shapes count, and its step is timed if need be.
        parameters: number of weights, in place of it.
        compute_ms: of a step of one worker; None to time the model's.
        batch_size: that it is timed with.
        bandwidth: megabits per second.
        latency: milliseconds.
        operation_ms: milliseconds.
        servers: parameter servers.
        chosen: names of compressors; none for all.

    Raises:
        ValueError: a figure is missing, given twice or out of range, or there is no such
            compressor.
    """
    if (model is None) == (parameters is None):
        raise ValueError("Give either --model or --parameters: how much there is to send.")
    if model is None and compute_ms is None:
        raise ValueError("Give --compute-ms, or --model, whose step is then measured here.")
    unknown = [name for name in chosen if name not in COSTS]
    if unknown:
        raise ValueError(f"--compressor must be one of {', '.join(COSTS)}, but got {unknown[0]!r}.")
    network = Network(bandwidth, latency, operation_ms)
    shapes: Sequence[Shape] | int = int(parameters or 0)
    if model is not None:
        from tfaccel.core.artifacts import load_model
        from tfaccel.distributed.step_time import gradient_shapes, measure_step

        loaded = load_model(model)
        shapes = gradient_shapes(loaded)
        compute_ms = measure_step(loaded, batch_size) if compute_ms is None else compute_ms
    names = ("none", *(name for name in COSTS if name in chosen and name != "none"))
    costs = {name: COSTS[name] for name in names} if chosen else None
    return Planner(compute_ms or 0.0, shapes, network, servers, costs)


def _dense(values: int) -> Traffic:
    return Traffic(values, 4.0 * values, True)


def _sent_bytes(topology: str, traffic: Traffic, workers: int) -> float:
    """Bytes that a worker sends: as an inner node of the tree, and to and from the servers."""
    size = traffic.message_bytes
    if topology == "ring":
        return (workers - 1) * (2 / workers if traffic.summable else 1) * size
    return size


def _square(values: int) -> list[Shape]:
    """Matrices of about a million values each, for a model of which only the size is known."""
    check_count("shapes", values)
    side = 1024
    whole, rest = divmod(values, side * side)
    return [(side, side)] * whole + ([(rest,)] if rest else [])
