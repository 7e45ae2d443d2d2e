"""A job of several workers, started from Python and watched to its end."""

import contextlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from tfaccel.distributed.hosts import check_hosts
from tfaccel.distributed.runtime import BUILD_COMMAND

_LAUNCHER = "horovod.runner.launch"
_FIRST_TO_FAIL = re.compile(r"Process name: (?P<rank>\d+)\s+Exit code: (?P<code>-?\d+)")
_TAIL_LINES = 40
_GRACE_SECONDS = 20  # horovodrun itself gives its workers five, twice
# Against waiting for ever: for a worker that starts late, and for one that has lost its way.
_BOUNDS = {
    "HOROVOD_GLOO_TIMEOUT_SECONDS": "120",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "600",
}


def run_workers(
    command: Sequence[str],
    workers: int,
    hosts: str | None = None,
    env: Mapping[str, str] | None = None,
    log: str | os.PathLike[str] | None = None,
    *,
    timeout: float | None = None,
) -> None:
    """Runs a command as N Horovod workers (Gloo) and waits for them; nothing goes to the terminal.

    When one worker fails, the others are ended. Workers that wait ten minutes for one another are
    ended too (HOROVOD_STALL_SHUTDOWN_TIME_SECONDS in `env` changes that).

    Args:
        command: what every worker runs, such as `[sys.executable, "train.py"]`.
        workers: how many; one runs the command directly, with no Horovod needed.
        hosts: "a:2,b:2" for two slots on each of two machines, reached by ssh; None for this
            machine.
        env: environment variables besides this process's own.
        log: file that what the workers write is appended to; None for one that is kept on failure
            only.
        timeout: seconds after which the job is ended; None for no limit.

    Raises:
        ValueError: `workers` is no number from 1, `command` is empty, or `hosts` have too little
            room.
        RuntimeError: Horovod is not installed, or a worker failed: it carries the last lines.
        TimeoutError: the job took longer than `timeout`.
    """
    _check_count("workers", workers)
    _check_command(command)
    line = list(command)
    if workers > 1:
        check_horovod(workers)
        slots = hosts or f"localhost:{workers}"
        check_hosts(slots, workers)
        flags = ["--gloo", "-np", str(workers), "-H", slots]
        line = [sys.executable, "-m", _LAUNCHER, *flags, *line]
    _watch(line, command, workers, env, log, timeout)


def run_elastic_workers(
    command: Sequence[str],
    discovery: str | os.PathLike[str],
    workers: int,
    min_workers: int = 1,
    max_workers: int | None = None,
    env: Mapping[str, str] | None = None,
    log: str | os.PathLike[str] | None = None,
    *,
    timeout: float | None = None,
) -> None:
    """Runs a command as Horovod workers that may die and come, and waits for the end of the job.

    The command trains in a function of `elastic.run`.

    Args:
        command: what every worker runs, such as `[sys.executable, "train.py"]`.
        discovery: a script that is run every second and prints the machines there are, a line
            each: "a:2" for one with two slots. A machine whose worker dies is not used again.
        workers: with how many the job begins.
        min_workers: with fewer it waits, and in the end fails.
        max_workers: more are not taken in; None for `workers`.
        env: environment variables besides this process's own.
        log: file that what the workers write is appended to; None for one that is kept on failure
            only.
        timeout: seconds after which the job is ended; None for no limit.

    Raises:
        ValueError: a number is out of range, `command` is empty, or `discovery` cannot be run.
        RuntimeError: Horovod is not installed, or the job failed: it carries the last lines.
        TimeoutError: the job took longer than `timeout`.
    """
    most = workers if max_workers is None else max_workers
    for name, value in (("workers", workers), ("min_workers", min_workers), ("max_workers", most)):
        _check_count(name, value)
    if not min_workers <= workers <= most:
        raise ValueError(
            f"workers must be from min_workers={min_workers} to max_workers={most}, but got "
            f"{workers}."
        )
    _check_command(command)
    if not os.access(discovery, os.X_OK) or Path(discovery).is_dir():
        raise ValueError(
            f"discovery must be a script that can be run, but {os.fspath(discovery)!r} cannot. "
            "Write it, and chmod +x it."
        )
    check_horovod(workers)
    script = str(Path(discovery).resolve())
    flags = ["--gloo", "-np", str(workers), "--min-np", str(min_workers), "--max-np", str(most)]
    flags += ["--host-discovery-script", script]
    line = [sys.executable, "-m", _LAUNCHER, *flags, *command]
    _watch(line, command, workers, env, log, timeout)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int from 1, but got {value!r}.")


def _check_command(command: Sequence[str]) -> None:
    if isinstance(command, str) or not command:
        raise ValueError(f"command must be a list of words, but got {command!r}.")


def _watch(
    line: Sequence[str],
    command: Sequence[str],
    workers: int,
    env: Mapping[str, str] | None,
    log: str | os.PathLike[str] | None,
    timeout: float | None,
) -> None:
    """Runs a job's line to its end, and raises if it fails."""
    variables = {**_BOUNDS, **os.environ, **(env or {})}
    with _open_log(log) as output:
        start = output.tell()
        code = _run(line, variables, output, timeout)
        if code != 0:
            who, tail = _read_failure(Path(output.name), start, workers, code)
            words = f"{shlex.join(command)}\nThe last lines of {output.name}:\n{tail}"
            if code is None:
                raise TimeoutError(
                    f"The job took longer than {timeout:g} seconds and was ended: {words}"
                )
            raise RuntimeError(f"{who} failed: {words}")
    if log is None:
        Path(output.name).unlink()


def check_horovod(workers: int) -> None:
    """Raises RuntimeError unless Horovod is installed for this Python."""
    if importlib.util.find_spec("horovod") is None:
        raise RuntimeError(
            f"Training on {workers} workers needs Horovod, which is not installed for "
            f"{sys.executable}. Build it once with `{BUILD_COMMAND}`, or train with one worker."
        )


def _open_log(log: str | os.PathLike[str] | None) -> IO[bytes]:
    if log is None:
        descriptor, name = tempfile.mkstemp(prefix="tfaccel-workers-", suffix=".log")
        os.close(descriptor)
        return Path(name).open("ab")
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    return Path(log).open("ab")


def _run(
    line: Sequence[str], env: Mapping[str, str], output: IO[bytes], timeout: float | None
) -> int | None:
    """Runs a process to its end and returns its exit code, or None after `timeout`."""
    process = subprocess.Popen(
        line,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        # A Ctrl-C reaches this process alone, which then ends the job in order.
        start_new_session=True,
    )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Asks horovodrun to end its workers, and ends by force what is left."""
    family = [psutil.Process(process.pid)]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += family[0].children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_SECONDS)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family[1:], timeout=5)


def _read_failure(path: Path, start: int, workers: int, code: int | None) -> tuple[str, str]:
    """Returns which worker failed, and the last lines that it wrote."""
    with path.open("rb") as file:
        file.seek(start)
        text = file.read().decode("utf-8", "replace")
    lines = text.splitlines()
    who = f"The command of {workers} worker{'s' * (workers > 1)} (exit code {code})"
    # horovodrun names the worker that ended first; the others are ended because of it.
    if code is not None and (first := _FIRST_TO_FAIL.search(text)):
        who = f"Worker {first['rank']} of {workers} (exit code {first['code']})"
        lines = [line for line in lines if line.startswith(f"[{first['rank']}]<")] or lines
    return who, "\n".join(lines[-_TAIL_LINES:]) or "(nothing was written)"
