import importlib.util
import sys
import time

import psutil
import pytest

from tfaccel.distributed import jobs
from tfaccel.distributed.jobs import check_horovod, run_workers

SAY = "import os; print('rank', os.environ['HOROVOD_RANK'], os.environ['COLOUR'])"
FAIL = """
import os, sys, time
if os.environ["HOROVOD_RANK"] == "1":
    sys.exit("lost my way")
time.sleep(300)
"""
# Rank 1 never comes to the meeting, as one whose data has run out.
STALL = """
import time
import tfaccel.distributed as hvd
hvd.init()
time.sleep(300 * hvd.rank())
hvd.barrier()
"""


def python(code):
    return [sys.executable, "-c", code]


def test_one_worker_runs_the_command_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    log = tmp_path / "deep" / "job.log"
    code = "import os; print(os.environ['COLOUR'], 'HOROVOD_RANK' in os.environ)"
    run_workers(python(code), 1, env={"COLOUR": "red"}, log=log)
    run_workers(python("print('again')"), 1, log=log)
    assert log.read_text() == "red False\nagain\n"


def test_log_is_kept_on_failure_only(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_workers(python("print('fine')"), 1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match=r"1 worker \(exit code 7\) failed") as caught:
        run_workers(python("print('before'); raise SystemExit(7)"), 1)
    (kept,) = tmp_path.iterdir()
    assert kept.read_text() == "before\n"
    assert str(caught.value).endswith(f"The last lines of {kept}:\nbefore")


def test_only_what_this_job_wrote_is_quoted(tmp_path):
    log = tmp_path / "job.log"
    log.write_text("of yesterday\n")
    with pytest.raises(RuntimeError) as caught:
        run_workers(python("print('today'); raise SystemExit(1)"), 1, log=log)
    assert "yesterday" not in str(caught.value)
    assert str(caught.value).endswith("today")


def test_timeout_ends_the_whole_family(tmp_path):
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']); "
        "print(child.pid, flush=True); time.sleep(300)"
    )
    log = tmp_path / "job.log"
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"longer than 1\.5 seconds"):
        run_workers(python(code), 1, log=log, timeout=1.5)
    assert time.monotonic() - begin < 30
    child = int(log.read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


@pytest.mark.parametrize(
    ("command", "workers", "message"),
    [
        (["true"], 0, "workers must be an int from 1, but got 0"),
        (["true"], 2.0, "workers must be an int from 1"),
        ([], 1, "list of words"),
        ("python train.py", 1, "list of words"),
    ],
)
def test_wrong_arguments_are_named(command, workers, message):
    with pytest.raises(ValueError, match=message):
        run_workers(command, workers)


def test_missing_horovod_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for start in (lambda: run_workers(["true"], 2), lambda: check_horovod(2)):
        with pytest.raises(RuntimeError, match=r"tools/build_horovod\.py --install") as caught:
            start()
        assert "Training on 2 workers needs Horovod" in str(caught.value)


def test_workers_are_started_by_horovodrun_where_they_are_wanted(monkeypatch, tmp_path):
    lines = []
    monkeypatch.setattr(jobs, "check_horovod", lambda workers: None)
    monkeypatch.setattr(jobs, "_run", lambda line, *_: lines.append(line) or 0)
    run_workers(["train"], 3, log=tmp_path / "log")
    run_workers(["train"], 4, hosts="a:2,b:2", log=tmp_path / "log")
    launcher = [sys.executable, "-m", "horovod.runner.launch", "--gloo"]
    assert lines == [
        [*launcher, "-np", "3", "-H", "localhost:3", "train"],
        [*launcher, "-np", "4", "-H", "a:2,b:2", "train"],
    ]


@pytest.mark.horovod
def test_two_workers_write_to_the_log_and_not_to_the_terminal(tmp_path, capfd):
    log = tmp_path / "job.log"
    run_workers(python(SAY), 2, env={"COLOUR": "red"}, log=log, timeout=120)
    lines = set(log.read_text().splitlines())
    assert {"[0]<stdout>:rank 0 red", "[1]<stdout>:rank 1 red"} <= lines
    assert capfd.readouterr() == ("", "")


@pytest.mark.horovod
def test_a_worker_that_fails_ends_the_others_and_is_quoted(tmp_path):
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"Worker 1 of 2 \(exit code 1\) failed") as caught:
        run_workers(python(FAIL), 2, log=tmp_path / "log", timeout=200)
    assert time.monotonic() - begin < 150
    assert str(caught.value).endswith("[1]<stderr>:lost my way")


@pytest.mark.horovod
def test_workers_that_wait_for_ever_are_ended(tmp_path):
    bounds = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "2"}
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="Worker 0 of 2") as caught:
        run_workers(python(STALL), 2, env=bounds, log=tmp_path / "log", timeout=250)
    assert time.monotonic() - begin < 200
    assert "is stalled for longer than 2 seconds" in str(caught.value)
