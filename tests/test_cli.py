import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import tfaccel
from tfaccel.cli import tfaccel as command
from tfaccel.core.artifacts import save_model
from tfaccel.export import read_metadata, to_tflite
from tfaccel.pruning import prune, update_masks
from tfaccel.quantization import quantize_aware

RECIPE = {
    "name": "tiny",
    "data": {"name": "digits", "limit": 40},
    "stages": [
        {
            "name": "only",
            "train": {"architecture": "cnn", "arguments": {"filters": [2]}, "epochs": 1},
        }
    ],
    "measure": {"runs": 2, "threads": [1]},
}


def call(*words, code=0):
    """Runs the command in this process; returns what it wrote to stdout and stderr."""
    done = CliRunner().invoke(command, [str(word) for word in words])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A .keras and a .tflite file of one model, and what is wrong with files in every way."""
    folder = tmp_path_factory.mktemp("files")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            keras.layers.Conv2D(8, 3, name="conv"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(10, name="logits"),
        ],
        name="net",
    )
    save_model(model, folder / "model.keras")
    pruned = prune(model, 0.5)
    update_masks(pruned, 0)
    save_model(pruned, folder / "pruned.keras")
    to_tflite(model, folder / "model.tflite")
    for name in ("model.keras", "model.tflite"):
        content = (folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(content[: len(content) // 2])
        (folder / f"empty_{name}").touch()
    (folder / "folder.keras").mkdir()
    (folder / "folder.tflite").mkdir()
    (folder / "text.txt").write_text("text")
    return folder


def test_help_teaches_with_examples():
    text, _ = call("--help")
    assert "tfaccel run examples/digits.yaml" in text
    for name in ("run", "measure", "export", "inspect", "diff", "plan-cluster"):
        text, _ = call(name, "--help")
        assert "Examples:" in text
        assert "Exit codes:" in text
        assert "--json" in text


def test_help_examples_name_options_that_exist():
    for name, sub in command.commands.items():
        known = {option for parameter in sub.params for option in parameter.opts}
        for line in sub.help.splitlines():
            if line.strip().startswith(f"tfaccel {name}"):
                used = {word for word in line.split("|")[0].split() if word.startswith("--")}
                assert used <= known, line


def test_version():
    assert tfaccel.__version__ in call("--version")[0]


def test_run_prints_a_table_and_where_the_report_is(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    text, progress = call("run", tmp_path / "recipe.yaml", "--output", tmp_path / "out")

    assert "only" in text
    assert "accuracy" in text
    assert str(tmp_path / "out" / "report.html") in text
    assert "only: trained in" in progress

    text, progress = call("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--json")
    assert json.loads(text) == json.loads((tmp_path / "out" / "results.json").read_text())
    assert "only: kept from before" in progress


def test_run_goes_to_a_folder_of_the_recipe_s_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    call("run", "recipe.yaml")

    assert (tmp_path / "runs" / "tiny" / "results.json").exists()


def test_wrong_hosts_are_wrong_input(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    arguments = ["run", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--hosts"]

    assert "room for 3" in call(*arguments, "localhost:1,b:2", "-w", "4", code=2)[1]
    assert "must be this machine" in call(*arguments, "no.such.invalid:1,b:2", code=2)[1]
    assert not (tmp_path / "out").exists()


def test_plan_cluster_prints_times_and_crossovers(files):
    figures = ["--bandwidth", "100", "--latency", "0", "--operation-ms", "0"]
    size = ["--parameters", "1e6", "--compute-ms", "40"]
    text, _ = call("plan-cluster", *size, *figures, "--compressor", "int8", "--most", "96")
    # By hand: 4 MB at 100 Mbit/s are 320 ms, plus half a million additions of half a nanosecond.
    ring = next(line for line in text.splitlines() if "none" in line and "ring" in line)
    assert ring.split("│")[3].strip() == f"{40 + 320 + 0.25:,.0f}"
    assert "96" in text
    assert "any topology: none is faster than int8 from" in text

    text, _ = call("plan-cluster", "--model", files / "model.keras", *figures, "--json")
    plan = json.loads(text)
    # A 3x3 convolution of one channel to eight, and 6 · 6 · 8 features to ten.
    assert plan["values"] == 3 * 3 * 8 + 8 + 6 * 6 * 8 * 10 + 10
    assert plan["compute_ms"] > 0
    assert {found["workers"] for found in plan["predictions"]} == {2**k for k in range(1, 11)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give either --model or --parameters"),
        (["--parameters", "1e6"], "Give --compute-ms"),
        (["--parameters", "1e6", "--compute-ms", "0"], "compute_ms must be above 0"),
        (["--parameters", "0", "--compute-ms", "5"], "shapes must be an int from 1"),
        (["--parameters", "1", "--compute-ms", "5", "--compressor", "zip"], "got 'zip'"),
        (["--parameters", "1", "--compute-ms", "5", "--latency", "-1"], "latency_ms must be 0"),
        (["--model", "nothing.keras"], "no file"),
    ],
    ids=["nothing", "compute", "zero", "empty", "compressor", "latency", "file"],
)
def test_plan_cluster_says_what_is_missing(arguments, message):
    assert message in call("plan-cluster", "--bandwidth", "100", *arguments, code=2)[1]


def test_a_wrong_recipe_is_wrong_input(tmp_path):
    wrong = {**RECIPE, "sede": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(wrong))
    _, error = call("run", tmp_path / "recipe.yaml", code=2)

    assert "unknown key 'sede'. Did you mean 'seed'?" in error
    assert "no recipe" in call("run", tmp_path / "nothing.yaml", code=2)[1]
    assert "folder" in call("run", tmp_path, code=2)[1]


def test_bad_data_and_arguments_of_a_recipe_are_wrong_input(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "data": {"name": "a.npz"}}))
    assert "a.npz" in call("run", tmp_path / "recipe.yaml", code=2)[1]

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert "multiple of 3" in call("run", tmp_path / "recipe.yaml", "--workers", 3, code=2)[1]
    assert "--workers" in call("run", tmp_path / "recipe.yaml", "--workers", 0, code=2)[1]
    (tmp_path / "file").touch()
    out = ("--output", tmp_path / "file")
    assert "is a file" in call("run", tmp_path / "recipe.yaml", *out, code=2)[1]


def test_work_that_fails_is_code_1_and_one_message(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr("tfaccel.recipes.runner.run_stage", fail)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    words = ("run", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out"))

    _, error = call(*words, code=1)
    assert error.strip().splitlines()[-1] == "Error: the disk is full"

    shown = CliRunner().invoke(command, [*words, "--traceback"])
    assert shown.exit_code == 1
    assert "Traceback (most recent call last)" in shown.stderr
    assert "in run_recipe" in shown.stderr


def test_interruption_has_its_own_code(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("tfaccel.recipes.runner.run_stage", interrupt)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    _, error = call("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out", code=130)
    assert "Interrupted" in error


def test_measure_knows_both_kinds_of_file(files):
    text, _ = call("measure", files / "model.tflite", files / "model.keras", "--runs", 2, "--json")
    lite, plain = json.loads(text)

    assert (lite["format"], plain["format"]) == ("tflite", "keras")
    assert lite["macs"] == plain["macs"] == 6 * 6 * 9 * 8 + 288 * 10
    assert lite["accuracy"] is None
    assert lite["size_bytes"] == (files / "model.tflite").stat().st_size


def test_measure_takes_accuracy_on_the_test_split(files, tmp_path):
    model = keras.saving.load_model(files / "model.keras")
    x = np.random.default_rng(0).random((30, 8, 8, 1), np.float32)
    # Labels that the model gives itself make it right every time, in the test split only.
    own = model.predict(x, verbose=0).argmax(1)
    np.savez(tmp_path / "own.npz", x_train=x, y_train=np.arange(30) % 10, x_test=x, y_test=own)
    text, _ = call(
        "measure", files / "model.tflite", "--data", tmp_path / "own.npz", "--runs", 2, "--json"
    )

    assert json.loads(text)[0]["accuracy"] == 1.0
    table, _ = call("measure", files / "model.tflite", "--runs", 2)
    assert "model.tflite" in table


def test_export_writes_a_file_with_its_labels(files, tmp_path):
    (tmp_path / "labels.txt").write_text("\n".join("abcdefghij") + "\n")
    text, _ = call(
        "export",
        files / "model.keras",
        tmp_path / "small.tflite",
        *("--scheme", "dynamic_int8", "--data", "digits"),
        *("--labels", tmp_path / "labels.txt", "--json"),
    )
    artifact = json.loads(text)

    assert artifact["scheme"] == "dynamic_int8"
    assert artifact["size_bytes"] == (tmp_path / "small.tflite").stat().st_size
    assert artifact["verification"]["samples"] > 0
    assert read_metadata(tmp_path / "small.tflite")["labels"] == list("abcdefghij")
    text, _ = call("export", files / "model.keras", tmp_path / "plain.tflite")
    assert "float32" in text


def test_export_says_what_int8_needs(files, tmp_path):
    words = ("export", files / "model.keras", tmp_path / "m.tflite")

    assert "needs --data" in call(*words, "--scheme", "int8", code=2)[1]
    assert "needs int8" in call(*words, "--io-dtype", "int8", code=2)[1]
    save_model(quantize_aware(keras.saving.load_model(files / "model.keras")), tmp_path / "q.keras")
    trained = ("export", tmp_path / "q.keras", tmp_path / "m.tflite")
    assert "trained for int8" in call(*trained, "--scheme", "float16", code=2)[1]
    assert "m.bin" in call("export", files / "model.keras", tmp_path / "m.bin", code=2)[1]
    assert not list(tmp_path.glob("*.tflite"))


def test_inspect_shows_layers_and_techniques(files):
    text, _ = call("inspect", files / "model.keras")
    assert "conv" in text
    assert "prune leaves alone:" in text

    content = json.loads(call("inspect", files / "model.keras", "--json")[0])
    assert [layer["name"] for layer in content["layers"]] == ["conv", "flatten", "logits"]
    assert content["layers"][2]["techniques"]["prune"]["touched"]


def test_diff_shows_what_changed(files):
    words = ("diff", files / "model.keras", files / "pruned.keras")

    assert "PruningMask(kernel)" in call(*words)[0]
    content = json.loads(call(*words, "--json")[0])
    assert {layer["name"]: layer["change"] for layer in content["layers"]} == {
        "conv": "same",
        "flatten": "same",
        "logits": "changed",
    }


BAD_KERAS = ("none.keras", "cut_model.keras", "empty_model.keras", "folder.keras", "text.txt")


@pytest.mark.parametrize("name", [*BAD_KERAS, "model.tflite"])
def test_a_bad_keras_file_is_one_clear_error(files, tmp_path, name):
    good = files / "model.keras"
    for words in (
        ("inspect", files / name),
        ("diff", good, files / name),
        ("diff", files / name, good),
        ("export", files / name, tmp_path / "out.tflite"),
    ):
        text, error = call(*words, "--json", code=2)
        assert text == ""
        assert error.startswith("Error: ")
        assert name in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", [*BAD_KERAS, "none.tflite", "cut_model.tflite", "empty_model.tflite", "folder.tflite"]
)
def test_a_bad_file_to_measure_is_one_clear_error(files, name):
    text, error = call("measure", files / name, "--json", code=2)

    assert text == ""
    assert error.startswith("Error: ")
    assert name in error


def test_bad_data_is_one_clear_error(files, tmp_path):
    words = ("measure", files / "model.tflite", "--data")

    assert "Did you mean 'digits'?" in call(*words, "digit", code=2)[1]
    assert "none.npz" in call(*words, tmp_path / "none.npz", code=2)[1]
    x = np.zeros((20, 8, 8, 1), np.float32)
    np.savez(tmp_path / "wrong.npz", x_train=x, y_train=np.zeros((20, 4), int))
    assert "labels of shape (20, 4)" in call(*words, tmp_path / "wrong.npz", code=2)[1]


def test_wrong_usage_is_code_2():
    assert "No such command" in call("prun", code=2)[1]
    assert "Missing argument" in call("measure", code=2)[1]
    assert "No such option" in call("inspect", "a.keras", "--jsn", code=2)[1]


def run_alone(*words, **environment):
    """Runs the command as its own process, as a user does."""
    env = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.run(
        [sys.executable, "-m", "tfaccel.cli", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**env, **environment},
    )


def test_nothing_but_json_is_written(files):
    done = run_alone("measure", files / "model.tflite", "--runs", "2", "--json")

    assert done.returncode == 0
    assert json.loads(done.stdout)[0]["name"] == "model.tflite"
    assert done.stderr == ""


def test_errors_are_heard_though_tensorflow_is_not(files):
    done = run_alone("inspect", files / "cut_model.keras")

    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_importing_tfaccel_sets_nothing():
    code = (
        "import os, sys; before = dict(os.environ); import tfaccel, tfaccel.cli;"
        "assert dict(os.environ) == before; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
