import json
import sys
from pathlib import Path

import pytest

from tests.recipes import tiny
from tfaccel.distributed import jobs
from tfaccel.measurement import devices
from tfaccel.recipes import RunListener, run_recipe
from tfaccel.recipes.reading import with_workers
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


def test_workers_on_several_machines_are_plain_horovodrun(tmp_path, monkeypatch):
    """The launcher is a stand-in: it writes the model that rank 0 would."""
    lines = []

    def launch(line, env, output, timeout):
        lines.append((line, env))
        Path(json.loads(line[-1])["model"]).write_text("trained")
        return 0

    monkeypatch.setattr(jobs, "check_horovod", lambda workers: None)
    monkeypatch.setattr(jobs, "_run", launch)
    monkeypatch.setattr(devices, "usable_cores", lambda: 8)
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    recipe = with_workers(tiny.recipe(1), 4)
    train_on_workers(
        recipe,
        recipe.stages[0],
        7,
        tmp_path / "model.keras",
        tmp_path / "log.txt",
        lambda *_: None,
        "localhost:2,b:2",
    )

    ((line, env),) = lines
    launcher = [sys.executable, "-m", "horovod.runner.launch", "--gloo"]
    worker = [sys.executable, "-m", "tfaccel.recipes.worker"]
    assert line[:-1] == [*launcher, "-np", "4", "-H", "localhost:2,b:2", *worker]
    # No file of this machine: the others would not find it.
    job = json.loads(line[-1])
    assert (job["stage"], job["seed"]) == ("teacher", 7)
    assert job["recipe"] == recipe.model_dump()
    assert env["TF_NUM_INTRAOP_THREADS"] == "4"  # two of the four workers are here
    assert (tmp_path / "model.keras").read_text() == "trained"


@pytest.mark.parametrize(
    ("hosts", "workers", "message"),
    [
        ("localhost:2,b:2", 8, "8 workers were asked for, but"),
        ("localhost", 2, "such as a:2,b:2, but got 'localhost'"),
        ("no.such.host.invalid:2,localhost:2", 4, "first host must be this machine"),
    ],
    ids=["room", "form", "first"],
)
def test_wrong_hosts_are_said_before_any_work(tmp_path, hosts, workers, message):
    with pytest.raises(ValueError, match=message):
        run_recipe(tiny.recipe(1), tmp_path / "run", workers=workers, hosts=hosts)
    assert not (tmp_path / "run").exists()


def test_hosts_say_how_many_workers_there_are(tmp_path, monkeypatch):
    asked = []

    def check(workers):
        asked.append(workers)
        raise RuntimeError("no Horovod")

    monkeypatch.setattr("tfaccel.distributed.check_horovod", check)
    with pytest.raises(RuntimeError, match="no Horovod"):
        run_recipe(tiny.recipe(1), tmp_path / "run", hosts="localhost:2,b:2")
    assert asked == [4]


def test_only_training_runs_on_workers(tmp_path):
    recipe = tiny.recipe()

    with pytest.raises(ValueError, match="Only a train stage"):
        train_on_workers(
            recipe, recipe.stages[1], 0, tmp_path / "m.keras", tmp_path / "log", lambda *_: None
        )
