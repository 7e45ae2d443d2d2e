"""Files appear whole or not at all, and damaged ones are one clear error."""

import json
import subprocess
import sys
import textwrap
import zipfile

import keras
import numpy as np
import pytest

from tests.contracts.tables import prune, sequential
from tfaccel.core.artifacts import load_model, save_model, sha256, write_aside, write_json


def test_file_appears_under_its_name_when_done(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with write_aside(target) as aside:
        aside.write_text("whole")
        assert not target.exists()
        assert aside.suffix == ".txt"
    assert target.read_text() == "whole"
    assert [f.name for f in target.parent.iterdir()] == ["file.txt"]


def test_older_file_stays_when_writing_fails(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("older")

    def write_half():
        with write_aside(target) as aside:
            aside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("file.txt", "older")]


def test_folder_is_no_target(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder, but a file is to be written"):
        write_aside(tmp_path).__enter__()


def test_hash_is_that_of_the_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == expected


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 2.5, None]}


def test_model_round_trip_and_wrong_suffix(tmp_path):
    model = sequential()
    save_model(model, tmp_path / "m.keras")
    x = np.ones((2, 8, 8, 3), "float32")
    loaded = load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(np.asarray(loaded(x)), np.asarray(model(x)))
    with pytest.raises(ValueError, match=r"saved as a \.keras file.*'.*m\.keras'"):
        save_model(model, tmp_path / "m.h5")


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.3, 0.7, 0.97, 0.9999])
def test_cut_off_keras_file_is_one_clear_error(share, tmp_path):
    whole, cut = tmp_path / "whole.keras", tmp_path / "cut.keras"
    save_model(sequential(), whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(
        ValueError, match=r"cut\.keras' is not a whole \.keras file.*save the model"
    ):
        load_model(cut)


def test_changed_byte_inside_is_found(tmp_path):
    path = save_model(sequential(), tmp_path / "m.keras")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.keras"):
        load_model(path)


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "empty.keras").touch()
    (tmp_path / "text.keras").write_text("hello")
    (tmp_path / "model.h5").write_bytes(b"x")
    with zipfile.ZipFile(tmp_path / "foreign.keras", "w") as archive:
        archive.writestr("a.txt", "hello")
    cases = {
        "empty.keras": (ValueError, "is empty"),
        "text.keras": (ValueError, "not a whole .keras file"),
        "foreign.keras": (ValueError, "not a whole .keras file"),
        "model.h5": (ValueError, "reads .keras files"),
        "missing.keras": (FileNotFoundError, "there is no file"),
        "": (IsADirectoryError, "is a folder"),
    }
    for name, (error, message) in cases.items():
        with pytest.raises(error, match=message):
            load_model(tmp_path / name)


def repacked(path, changes):
    """The file at `path` with members replaced, or left out where the change is None."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)
    return path


CONFIG, WEIGHTS = "config.json", "model.weights.h5"


@pytest.mark.parametrize(
    "changes",
    [
        {CONFIG: None},
        {CONFIG: b"garbage"},
        {CONFIG: b"[]"},
        {CONFIG: b"{}"},
        {CONFIG: b"\xff\xfe"},
        {CONFIG: b'{"a":' * 5000 + b"1" + b"}" * 5000},
        {CONFIG: b'{"module": "tfaccel.from_a_later_version", "class_name": "X", "config": {}}'},
        {WEIGHTS: None},
        {WEIGHTS: b""},
        {WEIGHTS: b"x" * 500},
    ],
    ids=str,
)
def test_whole_archive_with_wrong_content_is_one_clear_error(changes, tmp_path):
    path = repacked(save_model(sequential(), tmp_path / "m.keras"), changes)
    with pytest.raises(ValueError, match=r"m\.keras"):
        load_model(path)


def test_what_is_no_model_is_neither_saved_nor_loaded(tmp_path):
    path = save_model(sequential(), tmp_path / "m.keras")
    layer = json.dumps(keras.saving.serialize_keras_object(keras.layers.ReLU()))
    with pytest.raises(ValueError, match=r"The content must be Model, but got <ReLU"):
        load_model(repacked(path, {CONFIG: layer}))
    with pytest.raises(TypeError, match="model must be Model, but got None"):
        save_model(None, tmp_path / "new" / "m.keras")
    assert not (tmp_path / "new").exists()


def test_unknown_class_is_named(tmp_path):
    @keras.saving.register_keras_serializable("tfaccel_gone")
    class Vanished(keras.layers.Layer):
        def call(self, inputs):
            return inputs

    inputs = keras.Input((3,))
    keras.Model(inputs, Vanished()(inputs)).save(tmp_path / "m.keras")
    keras.saving.get_custom_objects().pop("tfaccel_gone>Vanished")
    with pytest.raises(ValueError, match=r"Keras could not load.*registered"):
        load_model(tmp_path / "m.keras")


def test_front_door_loads_what_was_saved_in_mid_training(tmp_path):
    model = prune(sequential())
    model.compile("sgd", "mse")
    save_model(model, tmp_path / "m.keras")
    script = """
        import sys
        import tfaccel
        model = tfaccel.load_model(sys.argv[1], compile=True)
        print(type(model.optimizer).__name__)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "m.keras")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "SGD"


def test_rooms_are_imported_for_the_classes_in_a_file(tmp_path):
    save_model(prune(sequential()), tmp_path / "m.keras")
    script = """
        import sys
        from tfaccel.core.artifacts import load_model
        assert "tfaccel.pruning" not in sys.modules
        print(type(load_model(sys.argv[1]).get_layer("hidden")).__name__)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "m.keras")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "TransformedLayer"
