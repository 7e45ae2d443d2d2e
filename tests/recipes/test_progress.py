import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.recipes import tiny
from tests.reporting.records import record
from tfaccel.recipes.progress import ProgressBars
from tfaccel.recipes.results import StageResult


def result_of(stage, **changes):
    return StageResult(
        **{
            "name": stage.name,
            "verb": stage.verb,
            "model": Path("m.keras"),
            "tflite": Path("m.tflite"),
            "seconds": 12.4,
            "figures": {},
            "exported": {},
            "reused": False,
            "measurement": record(),
            **changes,
        }
    )


def shown(terminal):
    recipe = tiny.recipe(2)
    teacher, student = recipe.stages
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    with ProgressBars(console) as bars:
        bars.run_started(recipe, Path("runs/tiny"))
        bars.stage_started(teacher)
        bars.step_started(teacher, "training")
        bars.epoch_done(teacher, 1, {"val_accuracy": 0.5})
        bars.stage_done(teacher, result_of(teacher))
        bars.stage_started(student)
        bars.stage_done(student, result_of(student, reused=True))
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_stages_and_outcomes_are_shown(terminal):
    text = shown(terminal)

    assert "tiny: 2 stages on digits, to runs/tiny/" in text
    assert "trained in 12 s, 99.00% on held-out data" in text
    assert "kept from before, 99.00% on held-out data" in text


def test_a_pipe_gets_one_line_per_stage():
    assert len(shown(False).strip().splitlines()) == 3


def test_a_terminal_gets_a_bar_with_epochs():
    assert "1/1" in shown(True)
