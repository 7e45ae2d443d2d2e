"""Curves of what a model loses as it gets smaller."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tfaccel.core.artifacts import write_aside

if TYPE_CHECKING:
    from tfaccel.pruning.channels import Sensitivity


def plot_sensitivity(records: "Sequence[Sensitivity]", path: str | os.PathLike[str]) -> Path:
    """Draws how the score falls as each group of channels is thinned out.

    Args:
        records: what `tfaccel.pruning.sensitivity` gave.
        path: the .svg file to write.

    Returns:
        The path.

    Raises:
        ValueError: there are no records, or the file is no .svg.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    file = Path(path)
    if not records:
        raise ValueError("plot_sensitivity() needs one record at least, but got none.")
    if file.suffix != ".svg":
        raise ValueError(f"plot_sensitivity() writes an .svg file, but got {str(file)!r}.")
    # A fixed salt keeps the bytes the same from run to run.
    with rc_context({"svg.hashsalt": "sensitivity", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.0, 4.2 + 0.12 * len(records)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for record in records:
            shares = sorted(record.kept)
            label = f"{record.names[0]} ({record.channels})"
            scores = [*(record.kept[share] for share in shares), record.baseline]
            axes.plot([*shares, 1.0], scores, marker="o", markersize=3, linewidth=1, label=label)
        axes.set_xlabel("share of the group's channels kept")
        axes.set_ylabel("score")
        axes.invert_xaxis()
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(frameon=False, fontsize="x-small", loc="outside right upper")
        with write_aside(file) as aside:
            figure.savefig(aside, format="svg", metadata={"Date": None})
    return file
