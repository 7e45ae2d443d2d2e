"""What quantization costs each layer, as a page with plots."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfaccel.reporting.pages import to_svg, write_page

if TYPE_CHECKING:
    from tfaccel.quantization.debugging import DebugReport, LayerNoise

_NOW, _BEFORE, _SEEN = "#0072B2", "#D55E00", "#222222"
_MOST_DB = 100.0  # what has no noise is drawn here
_WORST = 5


def render_noise(
    report: "DebugReport",
    path: str | os.PathLike[str],
    title: str | None = None,
    *,
    before: "DebugReport | None" = None,
) -> Path:
    """Writes what `tfaccel.quantization.debug` found as an HTML page that needs no other file.

    The table holds signal to noise and range of every kernel and value; the plots show both, and
    what `before` had beside.

    Args:
        report: of a quantized model.
        path: the page to write.
        title: its heading.
        before: the report of another quantization of the same model.

    Returns:
        The path.

    Raises:
        ValueError: the report has no layers.
    """
    if not report.layers:
        raise ValueError("render_noise() needs a report with one layer at least.")
    old = {(row.name, row.kind): row for row in before.layers} if before else {}
    pairs = [(row, old.get((row.name, row.kind))) for row in report.layers]
    worst = report.worst(_WORST)
    headings = ["", "bits", "own [dB]", "all [dB]", "seen", "grid", "clipped"]
    if before:
        headings += ["own before [dB]", "all before [dB]"]
    rows = []
    for row, then in pairs:
        cells = [
            row.kind,
            str(row.bits),
            f"{row.own_snr_db:.1f}",
            f"{row.snr_db:.1f}",
            f"{row.low:.4g} to {row.high:.4g}",
            f"{row.grid_low:.4g} to {row.grid_high:.4g}",
            f"{row.clipped:.2%}",
        ]
        if before:
            cells += [f"{then.own_snr_db:.1f}", f"{then.snr_db:.1f}"] if then else ["", ""]
        rows.append((f"{row.name} *" if row in worst else row.name, cells))
    gained = f", before {before.output_snr_db:.1f} dB" if before else ""
    names = ", ".join(f"{row.name} ({row.kind}, {row.own_snr_db:.1f} dB)" for row in worst)
    return write_page(
        path,
        first="layer",
        title=title or f"Quantization of {report.model}",
        headings=headings,
        rows=rows,
        plots=[
            ("Noise that each operator adds", _draw_noise(pairs, "own_snr_db")),
            ("Noise that has come together", _draw_noise(pairs, "snr_db")),
            *(
                (f"Ranges of {kind}s", _draw_ranges([r for r, _ in pairs if r.kind == kind]))
                for kind in ("value", "kernel")
                if any(row.kind == kind for row, _ in pairs)
            ),
        ],
        summary=(
            f"Outputs: {report.output_snr_db:.1f} dB of signal to noise on {report.samples} "
            f"samples{gained}. Layers that hurt most: {names}."
        ),
        facts={},
        sources={},
    )


def _draw_noise(pairs: "Sequence[tuple[LayerNoise, LayerNoise | None]]", field: str) -> str:
    def draw(axes: Any) -> None:
        for place, (row, then) in enumerate(pairs):
            if then is not None:
                axes.plot(_drawable(getattr(then, field)), place, "x", color=_BEFORE, markersize=4)
            marker = "s" if row.kind == "kernel" else "o"
            axes.plot(_drawable(getattr(row, field)), place, marker, color=_NOW, markersize=4)
        axes.set_xlabel("signal to noise [dB] (square: kernel, circle: value, cross: before)")

    return _draw([row for row, _ in pairs], draw, salt=field)


def _drawable(decibels: float) -> float:
    return max(min(decibels, _MOST_DB), -_MOST_DB)


def _draw_ranges(rows: "Sequence[LayerNoise]") -> str:
    def draw(axes: Any) -> None:
        for place, row in enumerate(rows):
            ends = [row.grid_low, row.grid_high]
            axes.plot(ends, [place, place], color=_NOW, linewidth=5, solid_capstyle="butt")
            axes.plot([row.low, row.high], [place, place], color=_SEEN, linewidth=1.2)
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlabel("thick: grid, thin: seen in float (symmetric logarithmic axis)")

    return _draw(rows, draw, salt=rows[0].kind)


def _draw(rows: "Sequence[LayerNoise]", draw: Callable[[Any], None], salt: str) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(5.2, 1.0 + 0.16 * len(rows)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=6)
        axes.invert_yaxis()
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        return to_svg(figure)
