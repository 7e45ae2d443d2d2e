"""Argument checks, one wording: what was given, what was expected, what to do."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import keras


def check_model(model: Any, verb: str) -> None:
    """Checks that `model` is a built Functional or Sequential Keras model.

    Args:
        model: what the user gave.
        verb: the function that needs it, named in the error.

    Raises:
        TypeError: not a Keras model, or a subclassed one without a graph.
        ValueError: the model has no weights yet.
    """
    if not isinstance(model, keras.Model):
        kind = type(model)
        if kind.__module__.partition(".")[0] == "tf_keras":
            advice = f"A {kind.__name__} of tf_keras is Keras 2; make the model with Keras 3."
        elif isinstance(model, (str, os.PathLike)):
            advice = "Load a file first with tfaccel.load_model(path)."
        else:
            advice = "Make one with keras.Model(inputs, outputs) or keras.Sequential(layers)."
        raise TypeError(f"{verb}() needs a keras.Model, but got {kind.__name__}. {advice}")
    graph_like = isinstance(model, keras.Sequential) or _has_graph(model)
    if not graph_like:
        if isinstance(getattr(model, "student", None), keras.Model):
            raise TypeError(
                f"{verb}() needs a Functional or Sequential model, but {model.name!r} is a "
                f"{type(model).__name__}, which trains another. Give its model.student."
            )
        raise TypeError(
            f"{verb}() needs a Functional or Sequential model, but {model.name!r} is a subclassed "
            f"{type(model).__name__}, which has no graph to read. Make one of it with "
            "keras.Model(inputs, outputs), calling your layers on keras.Input(...)."
        )
    if not model.built or (isinstance(model, keras.Sequential) and not _has_graph(model)):
        raise ValueError(
            f"{verb}() needs a built model, but {model.name!r} has no weights yet. "
            f"Begin it with keras.Input(shape), or call {model.name}.build(input_shape)."
        )


def _has_graph(model: keras.Model) -> bool:
    if isinstance(model, keras.Sequential):
        # A Sequential model makes its Functional twin once its input shape is known.
        try:
            return len(model.inputs) > 0
        except (AttributeError, ValueError):
            return False
    return hasattr(model, "operations") and bool(getattr(model, "inputs", None))


def check_type(name: str, value: Any, types: type | tuple[type, ...]) -> None:
    """Raises TypeError unless `value` is of `types`."""
    if not isinstance(value, types):
        wanted = types if isinstance(types, tuple) else (types,)
        raise TypeError(
            f"{name} must be {' or '.join(t.__name__ for t in wanted)}, "
            f"but got {value!r} ({type(value).__name__})."
        )


def check_in(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(repr(a) for a in allowed)}, but got {value!r}."
        )


def check_positive(name: str, value: float) -> None:
    """Raises unless `value` is a number above zero."""
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be above 0, but got {value!r}.")


def check_fraction(name: str, value: float, *, closed_right: bool = False) -> None:
    """Raises unless 0 <= value < 1 (with `closed_right`, <= 1)."""
    check_number(name, value)
    if not (0 <= value < 1 or (closed_right and value == 1)):
        end = "1]" if closed_right else "1)"
        raise ValueError(f"{name} must be a fraction in [0, {end}, but got {value!r}.")


def check_number(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a real number (a bool is none)."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, but got {value!r} ({type(value).__name__}).")


def check_file(
    path: str | os.PathLike[str], verb: str, suffixes: Collection[str] | None = None
) -> Path:
    """Checks that `path` is a readable file that is not empty, of one of `suffixes`.

    Returns:
        The path.

    Raises:
        FileNotFoundError: there is nothing there.
        IsADirectoryError: it is a folder.
        ValueError: the file is empty or of another kind.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(
            f"{verb}: there is no file {str(file)!r} (looked in {str(Path.cwd())!r}). "
            "Check the path."
        )
    if file.is_dir():
        raise IsADirectoryError(f"{verb} needs a file, but {str(file)!r} is a folder.")
    if suffixes and file.suffix not in suffixes:
        raise ValueError(
            f"{verb} reads {' or '.join(sorted(suffixes))} files, but got {str(file)!r}."
        )
    if file.stat().st_size == 0:
        raise ValueError(f"{verb}: {str(file)!r} is empty. Write it again.")
    return file
