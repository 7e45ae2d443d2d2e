import copy
import importlib.util
import json
import logging
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import yaml

import tfaccel
from tests.recipes import tiny
from tfaccel.core.artifacts import load_model, sha256
from tfaccel.measurement import Measurement, TFLiteModel
from tfaccel.recipes import DataError, RecipeError, RunListener, load_data, run_recipe
from tfaccel.recipes.reading import parse_recipe

NAMES = ["teacher", "student", "pruned", "quantized"]


class Heard(RunListener):
    """Writes down which steps were really taken."""

    def __init__(self):
        self.steps = []

    def step_started(self, stage, step):
        self.steps.append(f"{stage.name} {step}")


def steps_of(recipe, folder):
    heard = Heard()
    run_recipe(recipe, folder, listener=heard)
    return heard.steps


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return run_recipe(tiny.recipe(), folder / "run")


@pytest.fixture
def copied(finished, tmp_path):
    """A finished run that a test may go on with."""
    for file in finished.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_every_stage_leaves_its_files(finished):
    names = {f"{name}.{kind}" for name in NAMES for kind in ("keras", "tflite")}

    assert {file.name for file in finished.folder.iterdir()} == names | {
        "cache.json",
        "log.txt",
        "report.html",
        "results.json",
    }
    assert [stage.name for stage in finished.stages] == NAMES


def test_every_file_can_be_used_without_the_others(finished):
    x = load_data("digits").test.x[:4]
    for stage in finished.stages:
        model = load_model(stage.model)
        assert keras.ops.shape(model(x)) == (4, 10)
        assert TFLiteModel(stage.tflite).predict(x).shape == (4, 10)


def test_the_accuracy_is_that_of_the_file_on_the_test_split(finished):
    """Counted here once more, by hand."""
    recipe = tiny.recipe()
    test = load_data(recipe.data, recipe.seed).test
    for stage in finished.stages:
        predicted = TFLiteModel(stage.tflite).predict(test.x).argmax(1)
        assert stage.measurement.accuracy == pytest.approx((predicted == test.y).mean())
        assert stage.measurement.samples == len(test) == 64


def test_results_tell_everything(finished):
    results = json.loads((finished.folder / "results.json").read_text())

    assert results["finished"] is True
    assert results["seed"] == 0
    assert results["versions"]["tfaccel"] == tfaccel.__version__
    assert results["versions"]["keras"] == keras.__version__
    assert results["device"] == finished.measurements[0].device
    assert parse_recipe(results["recipe"]) == tiny.recipe()
    for stage, entry in zip(finished.stages, results["stages"], strict=True):
        assert Measurement(**entry["measurement"]) == stage.measurement
        assert entry["files"] == {
            stage.model.name: sha256(stage.model),
            stage.tflite.name: sha256(stage.tflite),
        }
        assert entry["figures"].keys() >= {"loss", "val_accuracy"}
    assert [entry["export"]["scheme"] for entry in results["stages"]] == [
        "float32",
        "float32",
        "float32",
        "int8",
    ]
    assert results["stages"][3]["export"]["float_tensors"] == []


def test_the_report_shows_every_stage(finished):
    page = (finished.folder / "report.html").read_text()

    for name in NAMES:
        assert f"<td>{name}</td>" in page
    assert finished.measurements[0].device in page


def test_the_log_tells_every_epoch_and_the_terminal_nothing(tmp_path, capfd):
    run_recipe(tiny.recipe(1), tmp_path)
    log = (tmp_path / "log.txt").read_text()

    assert "stage teacher, epoch 1: " in log
    assert log.rstrip().endswith("finished")
    assert "tfaccel.recipes" not in capfd.readouterr().err
    assert logging.getLogger("tfaccel").level == logging.NOTSET
    assert logging.getLogger("tfaccel").propagate


def test_a_second_run_keeps_everything(finished, copied):
    before = {file.name: file.stat().st_mtime_ns for file in copied.glob("*.*lite")}

    assert steps_of(tiny.recipe(), copied) == []
    assert {file.name: file.stat().st_mtime_ns for file in copied.glob("*.*lite")} == before
    again = json.loads((copied / "results.json").read_text())
    assert again == json.loads((finished.folder / "results.json").read_text())


def test_a_changed_stage_is_run_again_with_those_after_it(copied):
    content = copy.deepcopy(tiny.CONTENT)
    content["stages"][2]["prune"]["sparsity"] = 0.75

    assert steps_of(parse_recipe(content), copied) == [
        f"{name} {step}"
        for name in ("pruned", "quantized")
        for step in ("training", "exporting", "measuring")
    ]


def test_changed_measuring_trains_nothing(copied):
    changed = tiny.recipe(measure={"runs": 4, "threads": [1]})

    assert steps_of(changed, copied) == [f"{name} measuring" for name in NAMES]


def test_a_damaged_file_is_made_again(copied):
    tflite = copied / "pruned.tflite"
    whole = tflite.read_bytes()
    tflite.write_bytes(whole[:100])

    assert steps_of(tiny.recipe(), copied) == ["pruned exporting"]
    assert len(tflite.read_bytes()) == len(whole)


def test_another_seed_is_another_run(finished, copied):
    steps = steps_of(tiny.recipe(1, seed=1), copied)

    assert steps == ["teacher training", "teacher exporting", "teacher measuring"]
    first, second = (
        load_model(folder / "teacher.keras").get_weights()[0]
        for folder in (finished.folder, copied)
    )
    assert not np.allclose(first, second)


def test_an_interrupted_run_goes_on(tmp_path):
    class Interrupting(RunListener):
        def step_started(self, stage, step):
            if (stage.name, step) == ("second", "exporting"):
                raise KeyboardInterrupt

    recipe = parse_recipe({**tiny.CONTENT, "stages": tiny.QUICK})
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path, listener=Interrupting())
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["finished"] is False
    assert [stage["name"] for stage in results["stages"]] == ["first"]
    assert not (tmp_path / "report.html").exists()
    assert "stopped by KeyboardInterrupt" in (tmp_path / "log.txt").read_text()

    assert steps_of(recipe, tmp_path) == ["second exporting", "second measuring"]
    assert (tmp_path / "report.html").exists()


def test_a_killed_run_goes_on(tmp_path):
    """SIGKILL while the second stage trains: nothing half-written, and the first is kept."""
    content = copy.deepcopy({**tiny.CONTENT, "stages": tiny.QUICK})
    content["stages"][1]["train"]["epochs"] = 100_000
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "tfaccel.cli", "run", str(file), "--output", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 200
        log = folder / "log.txt"
        while not (log.exists() and "stage second, epoch" in log.read_text()):
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    kept = sha256(folder / "first.keras")
    assert not list(folder.glob("second*"))

    steps = steps_of(parse_recipe({**tiny.CONTENT, "stages": tiny.QUICK}), folder)

    assert steps == ["second training", "second exporting", "second measuring"]
    assert sha256(folder / "first.keras") == kept
    assert not [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


def test_mistakes_are_found_before_any_work(tmp_path):
    wrong = copy.deepcopy(tiny.CONTENT)
    wrong["stages"][1]["distill"]["arguments"] = {"stam": 4}
    with pytest.raises(RecipeError, match=r"'stam'.* Did you mean 'stem'\?"):
        run_recipe(parse_recipe(wrong), tmp_path / "run")

    np.savez(tmp_path / "empty.npz", x_train=np.zeros((0, 8, 8, 1)), y_train=np.zeros(0, int))
    with pytest.raises(DataError, match="is empty"):
        run_recipe(tiny.recipe(data={"name": str(tmp_path / "empty.npz")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()

    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="Give another"):
        run_recipe(tiny.recipe(1), tmp_path / "file")


def test_missing_horovod_is_one_clear_error_and_nothing_falls_back(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "horovod" else find(name, *a)
    )

    with pytest.raises(RuntimeError, match=r"tools/build_horovod\.py(.|\n)*--workers 1"):
        run_recipe(tiny.recipe(1), tmp_path / "run", workers=2)
    assert not (tmp_path / "run").exists()


def test_io_dtype_is_for_integer_files_only(tmp_path):
    content = copy.deepcopy(tiny.CONTENT)
    content["export"] = {"io_dtype": "int8"}
    content["stages"] = [
        content["stages"][0],
        {
            "name": "ready",
            "train": {"architecture": "cnn", "arguments": {"filters": [4]}, "epochs": 1},
            "export": {"scheme": "int8", "io_dtype": "uint8"},
        },
    ]
    result = run_recipe(parse_recipe(content), tmp_path)

    first, second = (TFLiteModel(stage.tflite).inputs[0].dtype for stage in result.stages)
    assert first == np.float32
    assert second == np.uint8
