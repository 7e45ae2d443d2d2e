"""One wording for every argument error."""

import keras
import numpy as np
import pytest
from keras import layers

from tfaccel.core import checks


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: checks.check_type("size", "3", int), TypeError, "size must be int, but got '3'"),
        (lambda: checks.check_type("x", 1, (str, list)), TypeError, "x must be str or list"),
        (lambda: checks.check_in("mode", "c", ("a", "b")), ValueError, "one of 'a', 'b', but got"),
        (lambda: checks.check_positive("n", 0), ValueError, "n must be above 0, but got 0"),
        (lambda: checks.check_positive("n", True), TypeError, "n must be a number, but got True"),
        (lambda: checks.check_positive("n", float("nan")), ValueError, "n must be above 0"),
        (lambda: checks.check_fraction("f", 1), ValueError, r"fraction in \[0, 1\), but got 1"),
        (lambda: checks.check_fraction("f", -0.1, closed_right=True), ValueError, r"\[0, 1\]"),
        (lambda: checks.check_fraction("f", "half"), TypeError, "f must be a number"),
    ],
)
def test_errors_say_given_and_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_fits_passes(tmp_path):
    checks.check_type("size", 3, int)
    checks.check_in("mode", "a", ("a", "b"))
    checks.check_positive("n", 0.1)
    checks.check_fraction("f", 0)
    checks.check_fraction("f", 1, closed_right=True)
    (tmp_path / "a.txt").write_text("x")
    assert checks.check_file(tmp_path / "a.txt", "read", (".txt",)) == tmp_path / "a.txt"


class Subclassed(keras.Model):
    """A model whose layers are known to its `call` alone."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(2)

    def call(self, inputs):
        return self.dense(inputs)


class Teaching(keras.Model):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.student = keras.Sequential([keras.Input((3,)), layers.Dense(2)])


def subclassed_and_built():
    model = Subclassed(name="subclassed")
    model(np.ones((1, 3)))
    return model


def of_keras_2():
    return type("Sequential", (), {"__module__": "tf_keras.src.engine.sequential"})()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: None, TypeError, "needs a keras.Model, but got NoneType. Make one with keras.M"),
        (lambda: "m.keras", TypeError, "but got str. Load a file first with"),
        (lambda: layers.Dense(2), TypeError, "but got Dense. Make one with"),
        (of_keras_2, TypeError, "but got Sequential. A Sequential of tf_keras is Keras 2"),
        (lambda: Subclassed(name="s"), TypeError, "'s' is a subclassed Subclassed, which has no g"),
        (subclassed_and_built, TypeError, "'subclassed' is a subclassed Subclassed, which has no"),
        (
            lambda: Teaching(name="t"),
            TypeError,
            "'t' is a Teaching, which trains another. Give",
        ),
        (lambda: keras.Sequential(name="s"), ValueError, "'s' has no weights yet. Begin it with"),
        (lambda: keras.Sequential([layers.Dense(2)], name="s"), ValueError, "call s.build(input_s"),
        (lambda: keras.Sequential([keras.Input((3,))], name="s"), ValueError, "'s' has no weights"),
    ],
    ids=[
        "none",
        "path",
        "layer",
        "keras_2",
        "subclassed",
        "subclassed_built",
        "distiller",
        "empty",
        "no_input",
        "only_input",
    ],
)
def test_what_is_no_built_model_with_a_graph_is_one_clear_error(make, error, message):
    with pytest.raises(error) as caught:
        checks.check_model(make(), "prune")
    assert str(caught.value).startswith("prune() needs a ")
    assert message in str(caught.value)


def test_built_models_with_a_graph_pass():
    x = keras.Input((3,))
    checks.check_model(keras.Model(x, layers.Dense(2)(x)), "prune")
    checks.check_model(keras.Sequential([keras.Input((3,)), layers.Dense(2)]), "prune")
    by_data = keras.Sequential([layers.Dense(2)])
    by_data(np.ones((1, 3)))
    checks.check_model(by_data, "prune")
    by_shape = keras.Sequential([layers.Dense(2)])
    by_shape.build((None, 3))
    checks.check_model(by_shape, "prune")


def test_files_that_cannot_be_read_are_told_apart(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "full.txt").write_text("x")
    cases = {
        "missing.txt": (FileNotFoundError, "read: there is no file .*missing.txt.*looked in"),
        "": (IsADirectoryError, "read needs a file, but .* is a folder"),
        "empty.txt": (ValueError, "empty.txt' is empty"),
    }
    for name, (error, message) in cases.items():
        with pytest.raises(error, match=message):
            checks.check_file(tmp_path / name, "read")
    with pytest.raises(ValueError, match=r"read reads \.a or \.b files, but got .*full"):
        checks.check_file(tmp_path / "full.txt", "read", (".b", ".a"))
