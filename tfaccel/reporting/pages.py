"""Measurements as one self-contained HTML page with plots."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfaccel.core.artifacts import write_aside
from tfaccel.reporting.tables import columns_of

if TYPE_CHECKING:
    from tfaccel.measurement.records import Measurement

# Okabe & Ito's palette: told apart by colour-blind readers, black left for text.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
_LOGARITHMIC = 8  # the largest over the smallest value, from which on the axis is logarithmic
_PLOTS = (
    ("Accuracy against latency", "latency_ms", 1.0, "latency, 1 thread [ms]"),
    ("Accuracy against size", "size_bytes", 1e-3, "size [kB]"),
    ("Accuracy against download size", "gzip_bytes", 1e-3, "gzipped size [kB]"),
)


def render_html(
    records: "Iterable[Measurement]",
    path: str | os.PathLike[str],
    title: str,
    *,
    facts: Mapping[str, str] | None = None,
    sources: Mapping[str, str] | None = None,
) -> Path:
    """Writes measurements as an HTML page that needs no other file.

    Args:
        records: what `tfaccel.measure` gave, in the order of the work.
        path: the page to write.
        title: its heading.
        facts: what else to tell, such as {"device": "...", "seed": "0"}.
        sources: long texts shown folded, such as {"recipe": "..."}.

    Returns:
        The path.

    Raises:
        ValueError: there are no records.
    """
    rows = list(records)
    if not rows:
        raise ValueError("render_html() needs one measurement at least, but got none.")
    columns = columns_of(rows)
    return write_page(
        path,
        title=title,
        headings=[heading for heading, _ in columns],
        rows=[(row.name, [spell(row) for _, spell in columns]) for row in rows],
        plots=[
            (heading, draw_plot(rows, field, scale, label))
            for heading, field, scale, label in _PLOTS
            if any(_point(row, field) for row in rows)
        ],
        summary=summarize(rows),
        facts=dict(facts or {}),
        sources=dict(sources or {}),
    )


def write_page(path: str | os.PathLike[str], *, first: str = "model", **content: Any) -> Path:
    """Writes a page of a table and plots from the template `report.html`.

    Args:
        path: the page to write.
        first: heading of the first column.
        **content: the template's other names.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tfaccel.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(first=first, **content)
    target = Path(path)
    with write_aside(target) as aside:
        aside.write_text(page, encoding="utf-8")
    return target


def draw_plot(rows: "Sequence[Measurement]", field: str, scale: float, label: str) -> str:
    """Returns accuracy against a field of the records as inline SVG.

    Args:
        rows: the records, each a labelled point; those without both values are left out.
        field: name of the field on the horizontal axis.
        scale: what its values are multiplied by.
        label: what is written below the axis.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    points = [(row.name, point) for row in rows if (point := _point(row, field))]
    xs = [x * scale for _, (x, _) in points]
    ys = [100 * y for _, (_, y) in points]
    # A fixed salt keeps the ids, and so the bytes, the same from run to run; each plot has its own
    # salt because ids of one page must not meet.
    with rc_context({"svg.hashsalt": field, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.plot(xs, ys, color="#bbbbbb", linewidth=1, zorder=1)
        for index, ((name, _), x, y) in enumerate(zip(points, xs, ys, strict=True)):
            axes.scatter(x, y, s=60, color=_COLOURS[index % len(_COLOURS)], zorder=2, label=name)
        _scale_axis(axes, xs)
        middle, half = (max(ys) + min(ys)) / 2, max((max(ys) - min(ys)) * 0.75, 0.75)
        axes.set_ylim(middle - half, min(middle + half, 100.5))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(decimals=1))
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy, held-out")
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small", loc="best")
        return to_svg(figure)


def to_svg(figure: Any) -> str:
    """Returns a matplotlib figure as SVG that may stand inside HTML."""
    import io

    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    # Inside HTML neither the XML declaration nor the document type may stand.
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :]


def _scale_axis(axes: Any, values: Sequence[float]) -> None:
    """Sets the horizontal axis: from zero, or logarithmic where small values would run together."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    smallest, largest = min(values), max(values)
    if smallest <= 0 or largest < _LOGARITHMIC * smallest:
        axes.set_xlim(0, 1.12 * largest or 1)
        return
    axes.set_xscale("log")
    axes.set_xlim(smallest / 1.6, largest * 1.6)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def summarize(rows: "Sequence[Measurement]") -> str:
    """Returns what the last record gained over the first, as one sentence.

    The sentence holds only figures that both records have; it is empty for a single record.
    """
    first, last = rows[0], rows[-1]
    if len(rows) < 2:
        return ""
    gains = []
    for field, word in (
        ("size_bytes", "smaller"),
        ("gzip_bytes", "smaller gzipped"),
        ("latency_ms", "faster"),
    ):
        before, after = getattr(first, field), getattr(last, field)
        if before and after:
            ratio = before / after
            opposite = {"smaller": "larger", "smaller gzipped": "larger gzipped"}
            gains.append(
                f"{ratio:.1f} times {word}"
                if ratio >= 1
                else f"{1 / ratio:.1f} times {opposite.get(word, 'slower')}"
            )
    if first.accuracy is not None and last.accuracy is not None:
        points = 100 * (last.accuracy - first.accuracy)
        gains.append(
            f"{points:+.2f} points of accuracy ({first.accuracy:.2%} to {last.accuracy:.2%})"
        )
    return f"{last.name} against {first.name}: {', '.join(gains)}." if gains else ""


def _point(row: "Measurement", field: str) -> tuple[float, float] | None:
    value = getattr(row, field)
    return None if value is None or row.accuracy is None else (value, row.accuracy)
