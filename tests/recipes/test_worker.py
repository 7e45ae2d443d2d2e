import json

import pytest

from tests.recipes import tiny
from tfaccel.recipes import RunListener, run_recipe
from tfaccel.recipes.worker import train_on_workers


class Epochs(RunListener):
    def __init__(self):
        self.heard = []

    def epoch_done(self, stage, epoch, figures):
        self.heard.append((epoch, figures))


@pytest.mark.horovod
def test_two_workers_train_a_stage(tmp_path):
    recipe = tiny.recipe(1)
    epochs = Epochs()

    result = run_recipe(recipe, tmp_path, workers=2, listener=epochs)

    assert [epoch for epoch, _ in epochs.heard] == [1]
    assert epochs.heard[0][1].keys() >= {"loss", "accuracy", "val_accuracy"}
    assert result.stages[0].measurement.samples == 64
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["recipe"]["stages"][0]["train"]["workers"] == 2
    assert (tmp_path / "teacher.workers.txt").exists()


@pytest.mark.horovod
def test_a_worker_that_fails_ends_the_run_and_leaves_no_model(tmp_path):
    recipe = tiny.recipe(1)
    settings = recipe.stages[0].train.model_copy(update={"workers": 2, "architecture": "no such"})
    stage = recipe.stages[0].model_copy(update={"train": settings})
    broken = recipe.model_copy(update={"stages": [stage]})

    with pytest.raises(RuntimeError, match="failed"):
        train_on_workers(
            broken, stage, 0, tmp_path / "m.keras", tmp_path / "log.txt", lambda *_: None
        )
    assert [file.name for file in tmp_path.iterdir()] == ["log.txt"]


def test_only_training_runs_on_workers(tmp_path):
    recipe = tiny.recipe()

    with pytest.raises(ValueError, match="Only a train stage"):
        train_on_workers(
            recipe, recipe.stages[1], 0, tmp_path / "m.keras", tmp_path / "log", lambda *_: None
        )
