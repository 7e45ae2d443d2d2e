"""Processes of a parameter-server cluster on this machine, watched and started again."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

_POLL_SECONDS = 0.3
_TAIL_LINES = 15
_START_SECONDS = 120


class LocalCluster:
    """Parameter servers and workers as processes of this machine; use it in a `with`.

    A worker that ends is started again at the same address. A parameter server is not: the weights
    that it held are gone.

    Args:
        workers: how many.
        servers: parameter servers.
        restarts: of all workers together, after which one that ends stays away.
    """

    def __init__(self, workers: int, servers: int, restarts: int = 3) -> None:
        ports = free_ports(workers + servers + 1)
        addresses = [f"localhost:{port}" for port in ports]
        self.spec = {
            "chief": addresses[:1],
            "ps": addresses[1 : 1 + servers],
            "worker": addresses[1 + servers :],
        }
        self.restarted = 0
        self._restarts = restarts
        self._processes: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="tfaccel-cluster-")
        self._ending = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "LocalCluster":
        try:
            for job in ("ps", "worker"):
                for index in range(len(self.spec[job])):
                    self._start(job, index)
            self._wait_until_they_answer()
        except BaseException:
            self._end()
            raise
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._watcher.join()
        self._end()

    def pid(self, job: str, index: int) -> int:
        """Returns the process of a "ps" or a "worker"."""
        return self._processes[job, index].pid

    def dead_server(self) -> str | None:
        """Returns the last words of a parameter server that ended, or None if all are alive."""
        for (job, index), process in self._processes.items():
            if job == "ps" and process.poll() is not None:
                return f"parameter server {index} (exit code {process.returncode}): " + self._tail(
                    job, index
                )
        return None

    def _start(self, job: str, index: int) -> None:
        command = [sys.executable, "-m", "tfaccel.distributed.server"]
        with self._log(job, index).open("ab") as log:
            self._processes[job, index] = subprocess.Popen(
                [*command, json.dumps(self.spec), job, str(index)],
                # Keras is not needed there, and a server that shares cores wants no threads each.
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_they_answer(self) -> None:
        end = time.monotonic() + _START_SECONDS
        for (job, index), process in self._processes.items():
            host, port = self.spec[job][index].split(":")
            while True:
                if process.poll() is not None:
                    raise RuntimeError(
                        f"The {job} {index} of the cluster ended at once (exit code "
                        f"{process.returncode}): {self._tail(job, index)}"
                    )
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"The {job} {index} of the cluster did not answer within "
                        f"{_START_SECONDS} seconds: {self._tail(job, index)}"
                    )
                with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
                    break
                time.sleep(_POLL_SECONDS)

    def _watch(self) -> None:
        while not self._ending.wait(_POLL_SECONDS):
            for (job, index), process in list(self._processes.items()):
                dead = job == "worker" and process.poll() is not None
                if dead and self.restarted < self._restarts:
                    self.restarted += 1
                    self._start(job, index)

    def _end(self) -> None:
        for process in self._processes.values():
            process.kill()  # they wait in native code and hold nothing that would be lost
        for process in self._processes.values():
            process.wait()
        self._folder.cleanup()

    def _log(self, job: str, index: int) -> Path:
        return Path(self._folder.name, f"{job}{index}.txt")

    def _tail(self, job: str, index: int) -> str:
        lines = self._log(job, index).read_text("utf-8", "replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:]) or "(nothing was written)"


def _environment() -> dict[str, str]:
    """Returns what servers inherit of this process.

    Not a limit of threads between operations: with one, an operation that waits for another
    process stands in the way of those that it waits for.
    """
    inherited = {k: v for k, v in os.environ.items() if k != "TF_NUM_INTEROP_THREADS"}
    return {"TF_CPP_MIN_LOG_LEVEL": "2", **inherited}


def free_ports(count: int) -> list[int]:
    """Returns ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]
