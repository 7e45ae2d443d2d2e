"""Measurements as rows of text, and as a table for the terminal."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from tfaccel.measurement.records import Measurement

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


def make_table(records: "Iterable[Measurement]", title: str | None = None) -> "Table":
    """Returns a rich table of measurements, one row each; columns that none fills are left out.

    Args:
        records: what `tfaccel.measure` gave.
        title: written above the table.
    """
    from rich.table import Table

    rows = list(records)
    columns = columns_of(rows)
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("model", no_wrap=True)
    for heading, _ in columns:
        # A narrow terminal breaks the headings, never a number.
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.name, *(spell(row) for _, spell in columns))
    return table


def _spelled(field: str, spell: Callable[[float], str]) -> "Callable[[Measurement], str]":
    def cell(row: "Measurement") -> str:
        value = getattr(row, field)
        return "-" if value is None else spell(value)

    return cell
