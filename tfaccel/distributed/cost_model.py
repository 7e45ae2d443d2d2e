"""How long gradients take from rank to rank: formulas of latency, bandwidth and arithmetic.

A message of n bytes takes a + n·b from one rank to another: a latency, and its bytes over the
bandwidth. Every rank sends and receives at the same time over one link of its own, and adding a
value takes c. That is the model of Thakur, Rabenseifner & Gropp (2005, section 3), and the formulas
for dense gradients are theirs and those of Patarasuk & Yuan (2009).
"""

import dataclasses
import math

from tfaccel.core.checks import check_number, check_positive
from tfaccel.distributed.arguments import check_count

TOPOLOGIES = ("ring", "tree", "server")
_FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Network:
    """What lies between the ranks.

    Attributes:
        bandwidth_mbit: of each rank's link, both ways at once, 10^6 bits per second.
        latency_ms: of a message between two ranks, milliseconds.
        operation_ms: fixed cost of a collective operation, in which the ranks find out that all
            are ready (Horovod: a cycle or two of HOROVOD_CYCLE_TIME), milliseconds.
        add_ns: of adding two values, nanoseconds.
    """

    bandwidth_mbit: float
    latency_ms: float
    operation_ms: float = 0.0
    add_ns: float = 0.5

    def __post_init__(self) -> None:
        check_positive("bandwidth_mbit", self.bandwidth_mbit)
        for name in ("latency_ms", "operation_ms", "add_ns"):
            check_number(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, but got {getattr(self, name)!r}.")

    @property
    def alpha(self) -> float:
        """Seconds that a message of no bytes takes."""
        return self.latency_ms / 1e3

    @property
    def beta(self) -> float:
        """Seconds that each byte takes."""
        return 8 / (self.bandwidth_mbit * 1e6)

    @property
    def gamma(self) -> float:
        """Seconds that adding a value takes."""
        return self.add_ns / 1e9


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What the ranks exchange in a step.

    Attributes:
        values: of the gradients, on each rank.
        message_bytes: that a rank makes of them.
        summable: whether two messages can be added to one of the same size, as dense ones can;
            otherwise every rank needs every message.
    """

    values: int
    message_bytes: float
    summable: bool


def communication_s(
    topology: str, workers: int, traffic: Traffic, network: Network, servers: int = 1
) -> float:
    """Returns the seconds from the ranks' messages to the sum on every rank.

    Args:
        topology: "ring", "tree" or "server".
        workers: N.
        traffic: what is exchanged.
        network: between the ranks.
        servers: that share the gradients, for "server".

    Raises:
        ValueError: there is no such topology.
    """
    check_count("workers", workers)
    check_count("servers", servers)
    if topology not in TOPOLOGIES:
        raise ValueError(f"topology must be one of {', '.join(TOPOLOGIES)}, but got {topology!r}.")
    if workers == 1:
        return 0.0
    fixed = network.operation_ms / 1e3
    if topology == "ring":
        return fixed + ring_s(workers, traffic, network)
    if topology == "tree":
        return fixed + tree_s(workers, traffic, network)
    return fixed + server_s(workers, traffic, network, servers)


def ring_s(workers: int, traffic: Traffic, network: Network) -> float:
    """Seconds of a ring.

    Summable: 2(N-1)·a + 2(N-1)/N·n·b + (N-1)/N·values·c (Patarasuk & Yuan 2009; Thakur et al.
    2005, section 4.5). Otherwise a ring-allgather, (N-1)·(a + n·b) (there, section 4.1), after
    which every rank adds up N messages.
    """
    steps, size = workers - 1, traffic.message_bytes
    if traffic.summable:
        share = steps / workers
        moved = 2 * steps * network.alpha + 2 * share * size * network.beta
        return moved + share * traffic.values * network.gamma
    return steps * (network.alpha + size * network.beta) + _gathered_s(steps, traffic, network)


def tree_s(workers: int, traffic: Traffic, network: Network) -> float:
    """Seconds of a binomial tree: reduced to its root and broadcast from it.

    Summable: ⌈lg N⌉·(2a + 2n·b + values·c) (Thakur et al. 2005, section 4.5, "the old algorithm").
    Otherwise a message grows on its way up, 2^k·n in the k-th step, never past the dense size,
    and the root's message of all goes down.
    """
    steps = math.ceil(math.log2(workers))
    if traffic.summable:
        each = 2 * network.alpha + 2 * traffic.message_bytes * network.beta
        return steps * (each + traffic.values * network.gamma)
    up = [min(2**k * traffic.message_bytes, _dense_bytes(traffic)) for k in range(steps)]
    down = min(workers * traffic.message_bytes, _dense_bytes(traffic))
    moved = 2 * steps * network.alpha + (sum(up) + steps * down) * network.beta
    return moved + _gathered_s(workers - 1, traffic, network)


def server_s(workers: int, traffic: Traffic, network: Network, servers: int) -> float:
    """Seconds of a synchronous push to S servers and pull from them (Li et al. 2014).

    Each server holds 1/S of the gradients and has a link as the workers have. What is pushed comes
    in over it N times, and what is pulled goes out N times: 2a + 2·max(1, N/S)·n·b + N/S·values·c.
    Messages that are not summable are put together, N·n, never past the dense size.
    """
    crowd = max(1.0, workers / servers)
    pulled = traffic.message_bytes
    if not traffic.summable:
        pulled = min(workers * traffic.message_bytes, _dense_bytes(traffic))
    moved = 2 * network.alpha + crowd * (traffic.message_bytes + pulled) * network.beta
    added = traffic.values if traffic.summable else _sent_values(traffic)
    return moved + workers / servers * added * network.gamma


def _gathered_s(messages: int, traffic: Traffic, network: Network) -> float:
    return messages * _sent_values(traffic) * network.gamma


def _dense_bytes(traffic: Traffic) -> float:
    return _FLOAT_BYTES * traffic.values


def _sent_values(traffic: Traffic) -> float:
    """Values in one message, at most all of them: a place and a value take about two bytes."""
    return min(traffic.values, traffic.message_bytes / 2)
