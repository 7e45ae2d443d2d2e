"""What each gradient compressor sends and how long it works, for planning."""

import dataclasses
import math
from collections.abc import Sequence

from tfaccel.distributed.cost_model import Traffic

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class CompressionCost:
    """A compressor as the planner sees it.

    Attributes:
        name: as in `tfaccel.distributed`.
        bits_per_value: of its message, for each value of the gradients.
        summable: whether two messages can be added on the way.
        work_ns: to make a message, nanoseconds for each value of the gradients.
        read_ns: to read one of the N messages, nanoseconds for each value of the gradients.
        rank: of the two factors that are sent in place of each matrix; 0 for other compressors.
        may_send_dense: whether it takes the ring of whole gradients where that sends less.
    """

    name: str
    bits_per_value: float
    summable: bool
    work_ns: float = 0.0
    read_ns: float = 0.0
    rank: int = 0
    may_send_dense: bool = False

    def traffic(self, shapes: Sequence[Shape]) -> Traffic:
        """Returns what a rank sends for gradients of these shapes."""
        values = sum(map(math.prod, shapes))
        size = values * self.bits_per_value / 8
        if self.rank:
            size = 4 * sum(_factor_values(shape, self.rank) for shape in shapes)
        return Traffic(values, size, self.summable)

    def seconds(self, traffic: Traffic, workers: int) -> float:
        """Returns how long a rank works on messages: its own, and those of all if gathered."""
        read = self.read_ns * (1 if traffic.summable else workers)
        return traffic.values * (self.work_ns + read) / 1e9


def sparse_bits(density: float, value_bits: float) -> float:
    """Bits for each value of the gradients if a share of them is sent, each with its place.

    A place costs the entropy of the choice, H(d)/d bits, which a Golomb-Rice code comes close to.

    >>> round(sparse_bits(0.001, 4) / 0.001, 1)  # 11.4 for the place, 4 for the value
    15.4
    """
    rest = 1 - density
    entropy = -density * math.log2(density) - rest * math.log2(rest)
    return entropy + density * value_bits


def _factor_values(shape: Shape, rank: int) -> int:
    """Values of P and Q of a matrix [rows, columns] (Vogels et al. 2019); a vector goes whole."""
    if len(shape) < 2:
        return math.prod(shape)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    return min(rank * (rows + columns), rows * columns)


# What `compression=` takes, with its defaults; "threshold" is missing because what it sends depends
# on the data. Times are rounded, of one core of an x86 server that had other work too:
# tools/bench/cluster_model.py --compressors prints them for another.
_SCALES = 32 / 512  # a float32 for each bucket
_BOUNDS = 64 / 256  # two float32 for each block of values that are rounded
COSTS = {
    cost.name: cost
    for cost in (
        CompressionCost("none", 32, True),
        CompressionCost("fp16", 16, True, 1.1),
        CompressionCost("bf16", 16, True, 1.3),
        CompressionCost("int8", 8 + _SCALES, False, 10.0, 3.5),
        CompressionCost("qsgd", 8 + _SCALES, False, 15.0, 4.0),
        CompressionCost("efsignsgd", 1, False, 4.0, 5.0),
        CompressionCost("topk", sparse_bits(0.01, 32), False, 6.0, 0.7),
        CompressionCost("randomk", 0.01 * 32, True, 2.7),
        CompressionCost("powersgd", 0, True, 2.0, rank=2),
        CompressionCost(
            "dgc", sparse_bits(0.001, 4 + _BOUNDS), False, 4.5, 0.1, may_send_dense=True
        ),
    )
}
