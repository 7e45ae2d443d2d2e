import json
import sys
from pathlib import Path

import pytest

from tfaccel.distributed.jobs import run_workers

WORKER = Path(__file__).with_name("worker.py")


class Job:
    """What the scenarios of worker.py found on each of two ranks, and the folder they wrote to."""

    def __init__(self, folder, *scenarios):
        self.folder = folder
        command = [sys.executable, str(WORKER), str(folder), *scenarios]
        run_workers(command, 2, log=folder / "job.log", timeout=560)
        self.ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]

    def __getitem__(self, scenario):
        return [results[scenario] for results in self.ranks]


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """One job for all tests, because starting TensorFlow three times takes longer than the rest."""
    return Job(
        tmp_path_factory.mktemp("job"),
        *("collectives", "mismatches", "broadcast_callback", "metric_average"),
        *("equality", "backward_passes", "summed", "sparse", "several_steps", "custom_loops"),
        "distillation",
        *("mixed_precision", "overflow_on_one_rank", "half_variables"),
        *(f"collective.{name}" for name in ("reductions", "exchanges", "process_sets", "joins")),
        *(f"optimizer.{name}" for name in ("every_optimizer", "options", "tapes")),
        *(f"optimizer.{name}" for name in ("unlike_models", "jit_auto")),
        *("drift", "late_drift", "compiled_by_xla", "save", "resume"),
    )
