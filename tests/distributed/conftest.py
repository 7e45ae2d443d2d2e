import fcntl
import json
import os
import sys
from pathlib import Path

import pytest

from tfaccel.distributed.jobs import run_workers

WORKER = Path(__file__).with_name("worker.py")


def pytest_collection_modifyitems(items):
    """The first test that looks at the job waits for all of it."""
    for item in items:
        if item.path.parent == WORKER.parent and item.get_closest_marker("horovod"):
            item.add_marker(pytest.mark.timeout(600))


class Job:
    """What the scenarios of worker.py found on each of two ranks, and the folder they wrote to."""

    def __init__(self, folder, *scenarios):
        """Runs the job, or reads what another process of the tests has found by it."""
        self.folder = folder
        results = [folder / f"{rank}.json" for rank in (0, 1)]
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                folder.mkdir()
                command = [sys.executable, str(WORKER), str(folder), *scenarios]
                run_workers(command, 2, log=folder / "job.log", timeout=560)
        if not all(file.exists() for file in results):
            pytest.fail(f"The job failed, which is the error of another test. See {folder}.")
        self.ranks = [json.loads(file.read_text()) for file in results]

    def __getitem__(self, scenario):
        return [results[scenario] for results in self.ranks]


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """One job for all tests, because starting TensorFlow three times takes longer than the rest."""
    own = tmp_path_factory.getbasetemp()
    return Job(
        (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "job",
        *("collectives", "mismatches", "broadcast_callback", "metric_average"),
        *("equality", "sparse", "several_steps", "custom_loops"),
        "distillation",
        *("mixed_precision", "overflow_on_one_rank", "half_variables"),
        *(f"collective.{name}" for name in ("reductions", "exchanges", "process_sets", "joins")),
        *(f"optimizer.{name}" for name in ("every_optimizer", "options", "tapes")),
        *(f"optimizer.{name}" for name in ("unlike_models", "local_layers", "batch_norm")),
        *(f"callback.{name}" for name in ("warmup", "agreements", "unequal_data")),
        "callback.no_exchange",
        "callback.digits_example",
        *("drift", "late_drift", "compiled_by_xla", "save", "resume"),
    )
