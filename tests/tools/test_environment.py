import json
import subprocess
import sys
from pathlib import Path

import pytest

import checks
import environment
from console import CommandError, ToolError

FIND_PYTHON = Path(environment.__file__).parent / "find_python.sh"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty checkout that environment.py takes for its own."""
    for name in ("setup.cfg", "pyproject.toml"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "ENVIRONMENT", tmp_path / ".venv")
    monkeypatch.setattr(environment, "PYTHON", tmp_path / ".venv/bin/python")
    monkeypatch.setattr(environment, "STAMP", tmp_path / ".venv/stamp.json")
    (tmp_path / ".venv").mkdir()
    return tmp_path


@pytest.fixture
def installs(monkeypatch):
    """Records what would be installed."""
    calls = []
    monkeypatch.setattr(environment, "make_environment", lambda: None)
    monkeypatch.setattr(environment, "install_horovod", lambda: None)
    monkeypatch.setattr(environment.console, "run", lambda *args, **_: calls.append(args[1]))
    return calls


def test_packages_are_installed_once(checkout, installs):
    environment.main()
    environment.main()
    assert [call[1:] for call in installs] == [
        ["-m", "pip", "install", "--editable", ".[dev,distributed]"]
    ]


@pytest.mark.parametrize("name", ["setup.cfg", "pyproject.toml"])
def test_packages_are_installed_again_when_their_list_changes(checkout, installs, name):
    environment.main()
    (checkout / name).write_text("changed")
    environment.main()
    assert len(installs) == 2


def test_failed_installation_is_not_taken_for_done(checkout, installs, monkeypatch):
    environment.main()
    (checkout / "setup.cfg").write_text("changed")

    def fail(title, command, log, **_):
        log.write_text("disk full")
        raise CommandError(title, 1, log)

    monkeypatch.setattr(environment.console, "run", fail)
    with pytest.raises(CommandError, match="disk full"):
        environment.main()
    assert environment.read_stamp() is None


def test_unreachable_index_is_named(checkout, installs, monkeypatch):
    def fail(title, command, log, **_):
        log.write_text("NewConnectionError: Temporary failure in name resolution")
        raise CommandError(title, 1, log)

    monkeypatch.setattr(environment.console, "run", fail)
    with pytest.raises(ToolError, match="package index cannot be reached") as caught:
        environment.main()
    assert caught.value.exit_code == 3


def test_damaged_stamp_counts_as_none(checkout):
    environment.STAMP.write_text('{"setup.cfg"')
    assert environment.read_stamp() is None
    environment.STAMP.write_text(json.dumps(["list"]))
    assert environment.read_stamp() is None


def test_version_of_an_environment(checkout, monkeypatch):
    assert environment.environment_version() is None
    monkeypatch.setattr(environment, "PYTHON", sys.executable)
    assert environment.environment_version() == f"{sys.version_info[0]}.{sys.version_info[1]}"


def test_failed_horovod_build_does_not_stop_the_rest(capfd, monkeypatch):
    monkeypatch.setattr(environment, "PYTHON", sys.executable)
    monkeypatch.setenv("TFACCEL_CACHE", "/dev/null")
    monkeypatch.setenv("PATH", "")
    environment.install_horovod()
    assert "Going on without Horovod" in capfd.readouterr().err


def find_python(folder, **env):
    script = f'. {FIND_PYTHON}; echo "$python"'
    return subprocess.run(
        ["/bin/sh", "-euc", script],
        cwd=folder,
        env={"PATH": str(folder), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def add_python(folder, name, preamble):
    """A Python that runs `preamble` before the program that it is given with -c."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    program = f'"import sys\n{preamble}\n$code"'
    path.write_text(f'#!/bin/sh\ncode=$2\nshift 2\nexec {sys.executable} -c {program} "$@"\n')
    path.chmod(0o755)


def version(minor):
    return f"sys.version_info = (3, {minor}, 0)"


def test_newest_supported_python_is_taken(tmp_path):
    for minor in (10, 12, 14):
        add_python(tmp_path, f"python3.{minor}", version(minor))
    assert find_python(tmp_path).stdout == "python3.12\n"


def test_plain_python3_serves_if_it_is_supported(tmp_path):
    add_python(tmp_path, "python3", version(11))
    assert find_python(tmp_path).stdout == "python3\n"


def test_existing_environment_comes_before_a_newer_python(tmp_path):
    add_python(tmp_path, ".venv/bin/python", version(11))
    add_python(tmp_path, "python3.13", version(13))
    assert find_python(tmp_path).stdout == ".venv/bin/python\n"
    add_python(tmp_path, ".venv/bin/python", version(9))
    assert find_python(tmp_path).stdout == "python3.13\n"


def test_chosen_python_comes_first(tmp_path):
    add_python(tmp_path, "python3.13", version(13))
    add_python(tmp_path, "mine", version(10))
    assert find_python(tmp_path, PYTHON="./mine").stdout == "./mine\n"


@pytest.mark.parametrize(
    ("preamble", "words"),
    [
        (version(9), "mine is Python 3.9; supported are 3.13 3.12 3.11 3.10"),
        (
            f"{version(12)}; sys.modules['ensurepip'] = None",
            "mine is Python 3.12 without ensurepip; on Debian or Ubuntu: apt-get install "
            "python3.12-venv",
        ),
    ],
)
def test_chosen_python_that_cannot_serve_is_an_error(tmp_path, preamble, words):
    add_python(tmp_path, "mine", preamble)
    add_python(tmp_path, "python3.13", version(13))
    done = find_python(tmp_path, PYTHON="./mine")
    assert (done.returncode, done.stdout) == (3, "")
    assert words in done.stderr


def test_chosen_python_that_does_not_exist_is_an_error(tmp_path):
    done = find_python(tmp_path, PYTHON="/nowhere/python")
    assert done.returncode == 3
    assert "PYTHON=/nowhere/python not found" in done.stderr


def test_machine_without_a_supported_python_is_told_what_was_tried(tmp_path):
    add_python(tmp_path, "python3", version(9))
    done = find_python(tmp_path)
    assert done.returncode == 3
    assert "tfaccel needs Python (3.13 3.12 3.11 3.10)" in done.stderr
    assert "python3 is Python 3.9" in done.stderr


def test_every_check_runs_and_the_failed_ones_are_named(monkeypatch, capsys):
    monkeypatch.setattr(checks.sys, "argv", ["checks.py"])
    monkeypatch.setattr(checks, "run_quietly", lambda title, command: title != "mypy")
    monkeypatch.setattr(checks, "pytest", lambda arguments, **env: 1 if not env else 0)
    assert checks.main() == 1
    assert capsys.readouterr().out.strip() == "Failed: mypy, pytest"
    monkeypatch.setattr(checks, "run_quietly", lambda title, command: True)
    monkeypatch.setattr(checks, "pytest", lambda arguments, **env: 0)
    assert checks.main() == 0


def test_arguments_run_pytest_alone(monkeypatch):
    monkeypatch.setattr(checks.sys, "argv", ["checks.py", "tests/core", "-k", "sparsity"])
    monkeypatch.setattr(checks, "run_quietly", None)
    monkeypatch.setattr(checks, "pytest", lambda arguments, **env: arguments)
    assert checks.main() == ["tests/core", "-k", "sparsity"]


def test_an_exhaustive_run_is_a_run_of_every_check(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(checks.sys, "argv", ["checks.py", "--exhaustive"])
    monkeypatch.setattr(checks, "run_quietly", lambda title, command: True)
    monkeypatch.setattr(checks, "pytest", lambda arguments, **env: asked.append(arguments) or 0)
    assert checks.main() == 0
    assert asked == [[checks.JAX_TESTS], [*checks.WHOLE_SUITE, "--exhaustive"]]


@pytest.mark.parametrize(
    ("arguments", "ran"),
    [
        ([], ["test_some[0]", "test_some[3]", "test_all[0]", "test_all[1]"]),
        (
            ["--exhaustive"],
            [*(f"test_some[{n}]" for n in range(5)), "test_all[0]", "test_all[1]", "test_long"],
        ),
        (["test_few.py::test_some[1]", "test_few.py::test_long"], ["test_some[1]", "test_long"]),
    ],
)
def test_a_plain_run_takes_some_cases_and_what_is_named_runs(arguments, ran, tmp_path):
    (tmp_path / "conftest.py").write_text((checks.ROOT / "tests/conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  exhaustive\n  one_in(n)\n")
    (tmp_path / "test_few.py").write_text(
        "import pytest\n"
        "@pytest.mark.one_in(3)\n"
        "@pytest.mark.parametrize('n', range(5))\n"
        "def test_some(n): pass\n"
        "@pytest.mark.parametrize('n', range(2))\n"
        "def test_all(n): pass\n"
        "@pytest.mark.exhaustive\n"
        "def test_long(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line]
    assert found == ran
