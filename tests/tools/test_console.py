import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import console
from console import CommandError, Step, ToolError


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_step_without_a_terminal_writes_a_start_and_an_end():
    stream = io.StringIO()
    step = Step("Installing", stream)
    step.show("half way")
    step.end()
    assert stream.getvalue() == "Installing ...\nInstalling: done (0:00)\n"


def test_step_on_a_terminal_rewrites_its_line():
    stream = Terminal()
    step = Step("Installing", stream)
    step.show("half way")
    step.end("failed")
    assert stream.getvalue().endswith("\r\033[KInstalling: failed (0:00)\n")
    assert stream.getvalue().count("\n") == 1
    assert "half way" in stream.getvalue()


def test_output_of_a_command_goes_to_the_log(tmp_path, capfd):
    log = tmp_path / "new" / "log"
    console.run("Talking", [sys.executable, "-c", "print('so much')"], log)
    assert "so much" in log.read_text()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "so much" not in captured.err


def test_failed_command_shows_the_end_of_its_log(tmp_path):
    program = "import sys; print('first'); [print(i) for i in range(99)]; sys.exit('the reason')"
    with pytest.raises(CommandError) as caught:
        console.run("Talking", [sys.executable, "-c", program], tmp_path / "log")
    message = str(caught.value)
    assert "Talking failed (exit code 1)" in message
    assert "the reason" in message
    assert str(tmp_path / "log") in message
    assert "first" not in message
    assert "first" in caught.value.output


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[  7%] Building a.o\n[ 42%] Building b.o\nc++ -O3 -c b.cc\n", "42 %"),
        ("Collecting keras\n  Downloading keras.whl\n", "Downloading keras.whl"),
        ("", ""),
    ],
)
def test_progress_is_read_from_the_log(tmp_path, text, shown):
    (tmp_path / "log").write_text(text)
    assert console._progress(tmp_path / "log") == shown


@pytest.fixture
def _sigterm_restored():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_sigterm_restored")
def test_guard_turns_errors_into_messages_and_codes(capsys):
    def missing():
        raise ToolError("no compiler", 3)

    def interrupted():
        raise KeyboardInterrupt

    assert console.main_guard(lambda: 0) == 0
    assert console.main_guard(missing) == 3
    assert capsys.readouterr().err == "\nerror: no compiler\n"
    assert console.main_guard(interrupted) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_sigterm_ends_the_command_and_all_that_it_started(tmp_path):
    program = (
        "import pathlib, sys, console\n"
        f"log = pathlib.Path({str(tmp_path / 'log')!r})\n"
        "command = ['/bin/sh', '-c', 'sleep 60 & echo $!; wait']\n"
        "sys.exit(console.main_guard(lambda: console.run('Sleeping', command, log)))\n"
    )
    tools = str(Path(console.__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": tools},
        stderr=subprocess.PIPE,
        text=True,
    )
    sleeper = wait_for(lambda: (tmp_path / "log").read_text().splitlines()[1])
    assert is_running(sleeper)
    process.terminate()
    _, messages = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Sleeping: interrupted" in messages
    wait_for(lambda: not is_running(sleeper))


def wait_for(look, seconds=20):
    """What `look` returns as soon as that is something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, LookupError):
            if found := look():
                return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} seconds in vain")


def is_running(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
