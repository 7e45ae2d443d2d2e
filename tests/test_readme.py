"""The README's Python runs as it stands, and its commands exist."""

import re
from pathlib import Path

import click
import numpy as np

from tests.contracts.tables import make_data, sequential
from tfaccel.cli import tfaccel as command

README = Path(__file__).parent.parent / "README.md"


def test_python_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    x, y = make_data(64)
    x_test, y_test = make_data(32, seed=1)
    names = {"model": sequential(), "x": x, "y": y, "x_test": x_test, "y_test": y_test}
    # Fewer steps than a user's data has, and a schedule as short; all else as it stands.
    code = code.replace("epochs=", "verbose=0, epochs=")
    code = code.replace("end_step=500", "end_step=4, frequency=2")
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    assert (tmp_path / "small.tflite").exists()
    assert "accuracy" in capsys.readouterr().out
    kernel = np.asarray(names["quantized"].get_layer("hidden").layer.kernel)
    assert (kernel == 0).sum() >= kernel.size // 2


def test_commands_exist_with_their_options():
    text = README.read_text(encoding="utf-8")
    for line in re.findall(r"^    tfaccel (.+?)(?:\s+#.*)?$", text, re.MULTILINE):
        name, *rest = line.split()
        sub = command.get_command(click.Context(command), name)
        assert sub is not None, name
        options = {option for parameter in sub.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options
