"""Curves show every group that was looked at."""

import pytest

from tfaccel.pruning import Sensitivity
from tfaccel.reporting import plot_sensitivity

RECORDS = [
    Sensitivity(("stem",), 16, {0.5: 0.8, 0.25: 0.4}, 0.9),
    Sensitivity(("expand", "project"), 32, {0.5: 0.85, 0.25: 0.7}, 0.9),
]


def test_each_group_is_named(tmp_path):
    text = plot_sensitivity(RECORDS, tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert "stem (16)" in text
    assert "expand (32)" in text


def test_two_runs_give_the_same_bytes(tmp_path):
    first, second = (plot_sensitivity(RECORDS, tmp_path / f"{n}.svg") for n in range(2))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("records", "name", "message"),
    [([], "a.svg", "one record at least"), (RECORDS, "a.png", "an .svg file")],
)
def test_wrong_arguments_are_told(records, name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_sensitivity(records, tmp_path / name)
