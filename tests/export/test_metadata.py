"""Facts inside the file."""

import hashlib

import numpy as np
import pytest

from tests.export import networks
from tfaccel.export import read_metadata, to_tflite
from tfaccel.export.packing import pack, unpack


def test_hash_is_that_of_the_weights(tmp_path):
    model = networks.plain()
    path = to_tflite(model, tmp_path / "m.tflite", "float16").path
    expected = hashlib.sha256(b"".join(w.tobytes() for w in model.get_weights())).hexdigest()
    assert read_metadata(path)["source_sha256"] == expected


def test_what_was_not_given_is_not_there(tmp_path):
    path = to_tflite(networks.plain(), tmp_path / "m.tflite").path
    assert set(read_metadata(path)) == {"tfaccel", "scheme", "source_sha256"}


def test_file_of_another_tool_has_no_facts(tmp_path):
    path = to_tflite(networks.plain(), tmp_path / "m.tflite").path
    foreign = unpack(path.read_bytes())
    foreign.metadata = [entry for entry in foreign.metadata if entry.name != b"tfaccel"]
    assert len(foreign.metadata) >= 1
    path.write_bytes(pack(foreign))
    assert read_metadata(path) == {}


def test_missing_foreign_and_cut_off_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_metadata(tmp_path / "none.tflite")
    whole = to_tflite(networks.plain(), tmp_path / "m.tflite").path.read_bytes()
    (tmp_path / "cut.tflite").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.tflite'.*may be cut off"):
        read_metadata(tmp_path / "cut.tflite")
    (tmp_path / "m.txt").write_bytes(whole)
    with pytest.raises(ValueError, match=r"reads .tflite files, but got"):
        read_metadata(tmp_path / "m.txt")


BAD = {
    "too_few": ({"labels": ["a", "b"]}, ValueError, "2 labels and 'plain' gives 5 classes"),
    "one_string": ({"labels": "abcde"}, TypeError, "labels must be a list of strings"),
    "numbers": ({"labels": [1, 2, 3, 4, 5]}, TypeError, "labels must be a list of strings"),
    "array": ({"metadata": {"x": np.ones(2)}}, ValueError, "ndarray is not JSON serializable"),
    "nan": ({"metadata": {"x": float("nan")}}, ValueError, "metadata must be made of what JSON"),
}


@pytest.mark.parametrize(("options", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_facts_are_refused_before_any_work(options, kind, message, tmp_path, monkeypatch):
    monkeypatch.setattr("tfaccel.export.conversion.prepare", None)
    with pytest.raises(kind, match=message):
        to_tflite(networks.plain(), tmp_path / "m.tflite", **options)
    assert not list(tmp_path.iterdir())
