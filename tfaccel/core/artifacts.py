"""Files that appear whole or not at all."""

import contextlib
import hashlib
import importlib
import json
import os
import re
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from tfaccel.core.checks import check_file, check_type

# A damaged config makes Keras fail in many ways.
_WHAT_KERAS_RAISES = (
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextlib.contextmanager
def write_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside `path`, renamed to it when the block succeeds.

    The folder is made if it is missing. If the block raises, the temporary file is removed and an
    older file at `path` stays as it was. The temporary name keeps the suffix, since Keras looks at
    it.

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(
            f"{str(target)!r} is a folder, but a file is to be written there. Give a file name."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}{target.suffix}")
    try:
        yield aside
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def sha256(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes `content` as JSON, indented, with a final newline."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_model(model: keras.Model, path: str | os.PathLike[str]) -> Path:
    """Saves a model as a .keras file, whole or not at all.

    Raises:
        TypeError: it is no model.
        ValueError: `path` does not end in .keras.
    """
    check_type("model", model, keras.Model)
    target = Path(path)
    if target.suffix != ".keras":
        raise ValueError(
            f"A Keras model is saved as a .keras file, but the path is {str(target)!r}. "
            f"Use {str(target.with_suffix('.keras'))!r}."
        )
    with write_aside(target) as aside:
        model.save(aside)
    return target


def load_model(path: str | os.PathLike[str], *, compile: bool = False) -> keras.Model:  # noqa: A002
    """Loads a .keras file, with one clear error for whatever is wrong with it.

    Args:
        path: a file that `model.save` wrote.
        compile: whether optimizer and losses are restored too (the name is Keras's).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a .keras file, it is damaged, holds no model, or needs a class that is
            not known.
    """
    source = check_file(path, "load_model", suffixes=(".keras",))
    try:
        with zipfile.ZipFile(source) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} is damaged")
            config = archive.read("config.json").decode("utf-8")
    except (zipfile.BadZipFile, KeyError, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{str(source)!r} is not a whole .keras file ({error}). It may be cut off or be of "
            "another format; save the model again with model.save('name.keras')."
        ) from error
    try:
        # Our classes register themselves when their module is imported, and Keras imports none.
        for module in sorted(set(re.findall(r'"module":\s*"(tfaccel\.[\w.]+)"', config))):
            importlib.import_module(module)
        model = keras.saving.load_model(source, compile=compile)
        check_type("The content", model, keras.Model)
    except _WHAT_KERAS_RAISES as error:
        raise ValueError(
            f"Keras could not load {str(source)!r}: {_first_line(error)} A model with classes of "
            "your own needs them registered (keras.saving.register_keras_serializable) and "
            "imported first."
        ) from error
    return model


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
