"""With processes that listen and do nothing in place of TensorFlow's servers."""

import os
import signal
import stat
import sys
import time

import psutil
import pytest

from tfaccel.distributed import ParameterServer, local_cluster
from tfaccel.distributed.local_cluster import LocalCluster

# Called as `python -m tfaccel.distributed.server SPEC JOB INDEX`.
LISTEN = """#!{python}
import json, socket, sys, time
spec, job, index = sys.argv[3:]
print("I am", job, index, flush=True)
host, port = json.loads(spec)[job][int(index)].split(":")
server = socket.create_server((host, int(port)))
while True:
    server.accept()
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Writes what is run in place of Python."""

    def write(text):
        path = tmp_path / "python"
        path.write_text(text.replace("{python}", sys.executable))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(local_cluster.sys, "executable", str(path))

    return write


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_dead_worker_is_started_again_at_its_address_and_a_dead_server_is_not(
    program, monkeypatch
):
    monkeypatch.setattr(local_cluster, "_POLL_SECONDS", 0.02)
    program(LISTEN)
    with LocalCluster(workers=2, servers=1, restarts=1) as cluster:
        assert [len(cluster.spec[job]) for job in ("chief", "ps", "worker")] == [1, 1, 2]
        first = cluster.pid("worker", 1)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: cluster.restarted == 1)
        wait_until(lambda: psutil.pid_exists(cluster.pid("worker", 1)))
        assert cluster.pid("worker", 1) != first
        assert cluster.dead_server() is None

        # It has used up its restarts, and the next one stays away.
        second = cluster.pid("worker", 1)
        os.kill(second, signal.SIGKILL)
        os.kill(cluster.pid("ps", 0), signal.SIGKILL)
        wait_until(lambda: cluster.dead_server() is not None)
        time.sleep(0.2)
        assert cluster.pid("worker", 1) == second
        assert cluster.dead_server() == "parameter server 0 (exit code -9): I am ps 0"
        alive = psutil.Process(cluster.pid("worker", 0))
    assert not alive.is_running()


def test_a_process_that_ends_at_once_is_quoted_and_the_others_are_ended(program):
    program('#!/bin/sh\n[ "$4" = ps ] && exec sleep 60\necho no such luck; exit 3\n')
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(RuntimeError, match=r"worker 0 .*\(exit code 3\): no such luck") as caught:
        LocalClusterOfSleepers().__enter__()
    assert "ended at once" in str(caught.value)
    assert {child.pid for child in psutil.Process().children()} == before


class LocalClusterOfSleepers(LocalCluster):
    """Its parameter server never listens, which is not waited for here."""

    def __init__(self):
        super().__init__(workers=1, servers=1)
        self.spec["ps"] = []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers must be an int from 1, but got 0"),
        ({"servers": 0}, "servers must be an int from 1, but got 0"),
        ({"restarts": -1}, "restarts must be an int from 0, but got -1"),
    ],
    ids=["workers", "servers", "restarts"],
)
def test_counts_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        ParameterServer(**arguments)
