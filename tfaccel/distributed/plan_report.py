"""A plan as a table, as sentences and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tfaccel.distributed.planner import Crossover, Planner, Prediction

if TYPE_CHECKING:
    from rich.table import Table


def worker_counts(most: int) -> list[int]:
    """Returns the powers of two up to a number of workers, and that number.

    >>> worker_counts(12)
    [2, 4, 8, 12]
    """
    powers = [2**k for k in range(1, most.bit_length()) if 2**k < most]
    return [*powers, most]


def make_plan_table(predictions: Sequence[Prediction]) -> "Table":
    """Returns milliseconds of a step, a row for each way and a column for each number of workers.

    The fastest of each column is bold; of the others, those within a tenth of it are plain and the
    rest is dim.
    """
    from rich.table import Table

    counts = sorted({p.workers for p in predictions})
    times = {(p.compressor, p.topology, p.workers): p.step_ms for p in predictions}
    best = {n: min(t for (*_, count), t in times.items() if count == n) for n in counts}
    table = Table(title="Milliseconds of a step, by number of workers")
    table.add_column("compressor")
    table.add_column("topology")
    for count in counts:
        table.add_column(str(count), justify="right")
    before = None
    for compressor, topology in dict.fromkeys((p.compressor, p.topology) for p in predictions):
        if before not in (None, compressor):
            table.add_section()
        cells = [_styled(times[compressor, topology, count], best[count]) for count in counts]
        table.add_row("" if before == compressor else compressor, topology, *cells)
        before = compressor
    return table


def describe_crossovers(crossovers: Sequence[Crossover], most: int) -> str:
    """Returns one line for each place where the fastest way changes."""
    if not crossovers:
        return f"The fastest way is the same from 2 to {most:,} workers."
    lines = [f"Crossover points from 2 to {most:,} workers:"]
    lines += [
        f"  {c.what}: {c.after} is faster than {c.before} from {c.workers:,} workers on"
        for c in crossovers
    ]
    return "\n".join(lines)


def plan_to_dict(
    planner: Planner, predictions: Sequence[Prediction], crossovers: Sequence[Crossover]
) -> dict[str, Any]:
    """Returns all of a plan as what JSON can hold."""
    return {
        "compute_ms": planner.compute_ms,
        "values": planner.values,
        "network": dataclasses.asdict(planner.network),
        "servers": planner.servers,
        "compressors": [dataclasses.asdict(cost) for cost in planner.compressors.values()],
        "predictions": [dataclasses.asdict(prediction) for prediction in predictions],
        "crossovers": [dataclasses.asdict(crossover) for crossover in crossovers],
    }


def _styled(time: float, best: float) -> str:
    text = f"{time:,.0f}" if time >= 100 else f"{time:,.1f}"
    if time == best:
        return f"[bold]{text}[/bold]"
    return text if time <= 1.1 * best else f"[dim]{text}[/dim]"
