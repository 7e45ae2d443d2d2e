"""Measurements as rows of text, and as a table for the terminal."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from tfaccel.measurement.records import Measurement

# Left out first where there is no room.
_DISPENSABLE = ("peak MB", "ms p95", "k parameters", "zeros", "M MACs")

Column = tuple[str, "Callable[[Measurement], str]"]


def columns_of(records: "Sequence[Measurement]") -> list[Column]:
    """Returns heading and spelling of every column that a record fills.

    Sizes are in kB (1,000 bytes), latencies in milliseconds, MACs and memory in millions.
    """
    threads = {row.threads for row in records if row.latency_threads_ms is not None}
    several = f"{threads.pop()} threads" if len(threads) == 1 else "threads"
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("accuracy", "accuracy", lambda v: f"{v:.2%}"),
        ("kB", "size_bytes", lambda v: f"{v / 1e3:,.1f}"),
        ("kB gzipped", "gzip_bytes", lambda v: f"{v / 1e3:,.1f}"),
        ("ms", "latency_ms", lambda v: f"{v:.3f}"),
        ("ms p95", "latency_p95_ms", lambda v: f"{v:.3f}"),
        (f"ms {several}", "latency_threads_ms", lambda v: f"{v:.3f}"),
        ("peak MB", "peak_memory_bytes", lambda v: f"{v / 1e6:,.1f}"),
        ("k parameters", "parameters", lambda v: f"{v / 1e3:,.1f}"),
        ("M MACs", "macs", lambda v: f"{v / 1e6:,.2f}"),
        ("zeros", "sparsity", lambda v: f"{v:.1%}"),
    ]
    return [
        (heading, _spelled(field, spell))
        for heading, field, spell in columns
        if any(getattr(row, field) is not None for row in records)
    ]


def make_table(
    records: "Iterable[Measurement]", title: str | None = None, *, width: int | None = None
) -> "Table":
    """Returns a rich table of measurements, one row each; columns that none fills are left out.

    Args:
        records: what `tfaccel.measure` gave.
        title: written above the table.
        width: characters that there is room for. Numbers are never cut: the less important columns
            are left out until the others fit.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rows = list(records)
    columns = {heading: [spell(row) for row in rows] for heading, spell in columns_of(rows)}
    names = ["model", *(row.name for row in rows)]
    threads = [heading for heading in columns if heading.endswith("threads")]
    for heading in (*_DISPENSABLE, *threads, "kB gzipped"):
        if width is None or _width([names, *([h, *c] for h, c in columns.items())]) <= width:
            break
        columns.pop(heading, None)
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    table.add_column("model", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        table.add_row(row.name, *(cells[index] for cells in columns.values()))
    return table


def _width(columns: list[list[str]]) -> int:
    # A space at both sides of each cell, one between columns and one at each edge.
    return sum(max(map(len, cells)) + 3 for cells in columns) + 1


def _spelled(field: str, spell: Callable[[float], str]) -> "Callable[[Measurement], str]":
    def cell(row: "Measurement") -> str:
        value = getattr(row, field)
        return "-" if value is None else spell(value)

    return cell
