"""Every example runs as it stands, on less of everything."""

import subprocess
import sys
from pathlib import Path

import pytest

from tfaccel.recipes import load_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
ARGUMENTS = {
    "distill.py": ["1"],
    "distill_tasks.py": ["1"],
    "lighten.py": ["models", "1"],
    "prune_and_quantize.py": ["models", "1"],
    "prune_channels_for_latency.py": ["models", "1"],
    "train_on_two_workers.py": ["models", "2"],
}
PRINTED = {
    "distill.py": ["teacher, all labels", "student, 100 labels", "student, teacher and no labels"],
    "distill_tasks.py": [
        "two teachers, all labels",
        "student, 200 labels",
        "student, two teachers",
    ],
    "lighten.py": ["trained", "factorized", "fine-tuned"],
    "prune_and_quantize.py": ["float", "pruned", "int8"],
    "prune_channels_for_latency.py": ["whole", "fast"],
    "train_on_two_workers.py": ["trained", "loaded"],
}
NEEDS_HOROVOD = ["train_on_two_workers.py"]


def test_every_script_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.horovod if name in NEEDS_HOROVOD else ())
        for name in sorted(ARGUMENTS)
    ],
)
def test_a_script_runs_and_prints_its_rows(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *ARGUMENTS[name]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    rows = done.stdout.strip().splitlines()
    assert len(rows) == len(PRINTED[name])
    for row, wanted in zip(rows, PRINTED[name], strict=True):
        assert row.startswith(wanted)
        assert "%" in row


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_a_script_is_short(path):
    assert len(path.read_text().splitlines()) < 100


def test_the_main_job_is_a_recipe_with_all_verbs():
    recipe = load_recipe(EXAMPLES / "digits.yaml")

    assert [stage.verb for stage in recipe.stages] == [
        "train",
        "distill",
        "prune",
        "quantize_aware",
    ]
    assert recipe.stages[0].train.workers == 2
