"""The page shows every layer, what hurts, and what was before."""

import dataclasses
import re

import pytest

from tests.reporting.test_pages import Page
from tfaccel.quantization.debugging import DebugReport, LayerNoise
from tfaccel.reporting import render_noise


def report(own=(40.0, 12.5, float("inf"))):
    rows = [
        LayerNoise("stem", "kernel", 8, own[0], 38.0, -0.5, 0.75, -0.5, 0.75, 0.0),
        LayerNoise("relu<6>", "value", 4, own[1], 11.0, 0.0, 6.0, 0.0, 3.0, 0.25),
        LayerNoise("logits", "value", 8, own[2], 10.0, -3.0, 2.0, -3.1, 2.1, 0.0),
    ]
    return DebugReport("small", tuple(rows), 10.5, 64)


def test_the_page_needs_no_other_file_and_shows_all(tmp_path):
    before = dataclasses.replace(report((20.0, 5.5, 30.0)), output_snr_db=4.5)
    path = render_noise(report(), tmp_path / "noise.html", before=before)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert all(reference.startswith("#") for reference in page.references)
    # What is referred to, such as a clipping path, has an id of its own in each plot.
    referred = [name for name in page.ids if f"#{name}" in text]
    assert len(referred) == len(set(referred))
    assert text.count("<svg") == 4
    for cell in ("relu&lt;6&gt; *", "12.5", "5.5", "25.00%", "10.5 dB", "before 4.5 dB"):
        assert cell in text, cell
    first = re.search(r"hurt most: ([^.]+\.\d)", text)
    assert first is not None
    assert first.group(1).startswith("relu&lt;6&gt; (value, 12.5")


def test_without_anything_before_there_are_no_columns_for_it(tmp_path):
    text = render_noise(report(), tmp_path / "a.html", "My title").read_text(encoding="utf-8")
    assert "<h1>My title</h1>" in text
    assert "before" not in text.split("<svg")[0]


def test_two_runs_give_the_same_bytes(tmp_path):
    first, second = (render_noise(report(), tmp_path / f"{n}.html") for n in range(2))
    assert first.read_bytes() == second.read_bytes()


def test_an_empty_report_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one layer at least"):
        render_noise(DebugReport("none", (), 0.0, 0), tmp_path / "a.html")
