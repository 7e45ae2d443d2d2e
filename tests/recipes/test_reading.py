import re

import pytest

from tfaccel.recipes.reading import load_recipe, parse_recipe, with_workers
from tfaccel.recipes.schema import Recipe, RecipeError

WHOLE = """\
name: whole
seed: 3
data: {name: digits, limit: 100}
batch_size: 16
stages:
  - name: teacher
    train: {architecture: cnn, epochs: 2, learning_rate: 1e-3, workers: 2}
  - name: student
    distill: {teacher: teacher, architecture: MobileNetV2, epochs: 1}
  - name: pruned
    prune: {model: student, sparsity: 0.5, epochs: 1}
    export: {scheme: float16}
  - name: quantized
    quantize_aware: {model: pruned, scheme: int8, epochs: 1}
measure: {runs: 5, threads: [1, 2]}
"""


def write(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


def test_a_whole_recipe_is_read(tmp_path):
    recipe = load_recipe(write(tmp_path, WHOLE))

    assert [stage.verb for stage in recipe.stages] == [
        "train",
        "distill",
        "prune",
        "quantize_aware",
    ]
    assert recipe.stages[0].train.learning_rate == 0.001  # YAML 1.1 reads 1e-3 as a text
    assert recipe.stages[1].inputs == {"teacher": "teacher"}
    assert recipe.stages[3].inputs == {"model": "pruned"}
    assert recipe.stages[2].export.scheme == "float16"
    assert recipe.stages[1].distill.temperature == 4.0


def test_a_recipe_survives_its_own_dump(tmp_path):
    recipe = load_recipe(write(tmp_path, WHOLE))

    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert parse_recipe(recipe.model_dump(exclude_none=True)) == recipe


WRONG = {
    "unknown key": (
        ("epochs: 2, learning", "epoch: 2, learning"),
        r"line 7, stages\[0\]\.train\.epoch: unknown key 'epoch'\. Did you mean 'epochs'\?",
    ),
    "unknown key at the top": (
        ("batch_size: 16", "batchsize: 16"),
        r"line 4, batchsize: unknown key 'batchsize'\. Did you mean 'batch_size'\?",
    ),
    "unknown verb": (
        ("    prune: {model", "    prun: {model"),
        r"line 11, stages\[2\]\.prun: unknown key 'prun'\. Did you mean 'prune'\?",
    ),
    "missing key": (
        ("architecture: MobileNetV2, ", ""),
        r"line 9, stages\[1\]\.distill\.architecture: 'architecture' is missing",
    ),
    "wrong number": (
        ("sparsity: 0.5", "sparsity: 1.5"),
        r"line 11, stages\[2\]\.prune\.sparsity: .*less than 1; got 1\.5",
    ),
    "number as text": (
        ("epochs: 2, learning", "epochs: two, learning"),
        r"line 7, stages\[0\]\.train\.epochs: .*integer; got 'two'",
    ),
    "unknown architecture": (
        ("architecture: cnn", "architecture: cmm"),
        r"line 7, .*'cnn', 'mobile', 'NIN', .*'MobileNetV2', .* or 'ShuffleNetV2'; got 'cmm'",
    ),
    "wrong reference": (
        ("model: student", "model: studnet"),
        r"line 11, stages\[2\]\.prune\.model: .*'studnet', which is no stage\. .*mean 'student'\?",
    ),
    "later stage": (
        ("model: student", "model: quantized"),
        r"line 11, .*refers to the later stage 'quantized'",
    ),
    "itself": (("model: student", "model: pruned"), r"line 11, .*refers to itself"),
    "duplicate stage": (
        ("name: pruned", "name: student"),
        r"line 10, stages\[2\]\.name: there are two stages named 'student'",
    ),
    "duplicate key": (
        ("seed: 3", "seed: 3\nseed: 4"),
        r"line 3, seed: this key was already given in line 2",
    ),
    "two verbs": (
        ("    export: {scheme: float16}", "    train: {architecture: cnn, epochs: 1}"),
        r"line 10, stages\[2\]: .*exactly one of .*got train and prune",
    ),
    "no verb": (
        ("    prune: {model: student, sparsity: 0.5, epochs: 1}\n", ""),
        r"line 10, .*exactly one of .*got none",
    ),
    "batch that workers cannot share": (
        ("batch_size: 16", "batch_size: 15"),
        r"line 7, .*must be a multiple of 2",
    ),
    "unknown data": (("name: digits", "name: digit"), r"line 3, .*Did you mean 'digits'\?"),
    "threads without one": (("threads: [1, 2]", "threads: [2]"), r"line 15, measure\.threads"),
    "name that is a path": (("name: whole", "name: ../whole"), r"line 1, name: "),
    "not YAML": (("name: whole", "name: [whole"), r"is not valid YAML"),
    "scheme against training": (
        ("    quantize_aware:", "    export: {scheme: float16}\n    quantize_aware:"),
        r"line 14, stages\[3\]\.export\.scheme: .*scheme it was trained for \(int8\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_recipe_is_one_error_with_its_line(tmp_path, change, message):
    assert WHOLE.count(change[0]) == 1
    file = write(tmp_path, WHOLE.replace(*change))

    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(file)
    assert str(file) in str(caught.value)


def test_every_problem_is_named_at_once(tmp_path):
    text = WHOLE.replace("sparsity: 0.5", "sparsity: 2").replace("seed: 3", "sede: 3")

    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert re.findall(r"line (\d+)", str(caught.value)) in (["2", "11"], ["11", "2"])


@pytest.mark.parametrize("text", ["", "- a list", "just words", "a: &a [*a]"])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    with pytest.raises(RecipeError):
        load_recipe(write(tmp_path, text))


def test_a_binary_file_is_refused(tmp_path):
    file = tmp_path / "model.yaml"
    file.write_bytes(b"\x80\x81\xff")

    with pytest.raises(RecipeError, match="not a text file"):
        load_recipe(file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recipe .*nothing\.yaml"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="folder"):
        load_recipe(tmp_path)


def test_an_npz_path_is_meant_beside_the_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path, WHOLE.replace("name: digits", "name: own/data.npz")))

    assert recipe.data.name == str(tmp_path / "own" / "data.npz")


def test_workers_are_overridden_and_checked(tmp_path):
    recipe = load_recipe(write(tmp_path, WHOLE))

    assert with_workers(recipe, 1).stages[0].train.workers == 1
    assert recipe.stages[0].train.workers == 2
    with pytest.raises(RecipeError, match="multiple of 3"):
        with_workers(recipe, 3)
