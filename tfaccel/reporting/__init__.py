"""What was measured and what is in a model, as tables, pages and listings."""

from tfaccel.reporting.curves import plot_sensitivity
from tfaccel.reporting.inspection import (
    Inspection,
    LayerChange,
    LayerFacts,
    ModelDiff,
    diff,
    inspect,
)
from tfaccel.reporting.noise_pages import render_noise
from tfaccel.reporting.pages import render_html, summarize
from tfaccel.reporting.tables import make_table
from tfaccel.reporting.verdicts import Verdict

__all__ = [
    "Inspection",
    "LayerChange",
    "LayerFacts",
    "ModelDiff",
    "Verdict",
    "diff",
    "inspect",
    "make_table",
    "plot_sensitivity",
    "render_html",
    "render_noise",
    "summarize",
]
