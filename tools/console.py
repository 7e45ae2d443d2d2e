"""Long commands with one line of progress; their own output goes to a log file.

Standard library only: the tools that use it run on a bare Python, before anything is installed.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO, TypeAlias

INTERRUPTED = 130

_SHOWN_ON_FAILURE = 25
_PERCENT = re.compile(r"^\[\s*(\d{1,3})%\]")


Command: TypeAlias = Sequence[str | Path]


class ToolError(Exception):
    """Something the user has to know or do; `exit_code` tells scripts which kind it is."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Step:
    """One piece of work with a status line: rewritten in place on a terminal, else start and end.

    Args:
        title: what is being done, as in "Installing packages".
        stream: where the line is written; standard error by default, so that stdout stays clean.
    """

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self.title = title
        self.stream = stream or sys.stderr
        self.started = time.monotonic()
        self._live = self.stream.isatty()
        if not self._live:
            self._write(f"{title} ...\n")

    def show(self, detail: str = "") -> None:
        """Refreshes the status line (does nothing where there is no terminal)."""
        if self._live:
            self._write(f"\r\033[K{self.title} ... {clock(self.elapsed)}  {detail}")

    def end(self, outcome: str = "done") -> None:
        """Writes the last form of the line."""
        start = "\r\033[K" if self._live else ""
        self._write(f"{start}{self.title}: {outcome} ({clock(self.elapsed)})\n")

    @property
    def elapsed(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self.started

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds.

    >>> clock(125.2)
    '2:05'
    """
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def run(
    title: str,
    command: Command,
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Runs a command with a status line; its output goes to `log`, its end is shown on failure.

    Raises:
        CommandError: the command ended with another exit code than 0.
    """
    step = Step(title)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8", errors="replace") as sink:
        sink.write(f"$ {' '.join(map(str, command))}\n")
        sink.flush()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # So that an interrupt also ends what the command started.
        )
        try:
            while process.poll() is None:
                step.show(_progress(log))
                time.sleep(0.2)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            step.end("interrupted")
            raise
    if process.returncode:
        step.end("failed")
        raise CommandError(title, process.returncode, log)
    step.end()


class CommandError(ToolError):
    """A command failed; `output` is all that it printed."""

    def __init__(self, title: str, returncode: int, log: Path) -> None:
        self.output = log.read_text(encoding="utf-8", errors="replace")
        self.log = log
        tail = "\n".join(f"    {line}" for line in self.output.splitlines()[-_SHOWN_ON_FAILURE:])
        super().__init__(
            f"{title} failed (exit code {returncode}). The end of {log}:\n\n{tail}\n", 1
        )


def _progress(log: Path) -> str:
    """The last thing that the log says, short enough for one line; a percentage if there is one."""
    with log.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - 4000))
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        if found := _PERCENT.match(line.strip()):
            return f"{found.group(1)} %"
    return lines[-1].strip()[:60] if lines else ""


def main_guard(main: Callable[[], int]) -> int:
    """Calls `main` and turns a ToolError, Ctrl-C or SIGTERM into a message and an exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main()
    except ToolError as error:
        sys.stderr.write(f"\nerror: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted; start again to go on.\n")
        return INTERRUPTED
