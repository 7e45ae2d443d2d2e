"""A train stage on several Horovod workers: `python -m tfaccel.recipes.worker JOB` is one.

JOB is JSON, on the command line and not in a file, so that workers on other machines get it too.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from tfaccel.recipes.schema import Recipe, Stage
from tfaccel.recipes.stages import EpochListener, Task, run_stage

_POLL_SECONDS = 0.2


def train_on_workers(
    recipe: Recipe,
    stage: Stage,
    seed: int,
    path: Path,
    log: Path,
    on_epoch: EpochListener,
    hosts: str | None = None,
) -> None:
    """Runs a train stage on as many Horovod workers as it asks for, and keeps the model of rank 0.

    Args:
        recipe: where the data and the batch size come from.
        stage: a train stage.
        seed: of the stage.
        path: .keras file to write.
        log: file that the workers' output is appended to.
        on_epoch: hears of every epoch, its figures the mean over the workers.
        hosts: "a:2,b:2" for machines reached by ssh, this one first; None for this one alone. The
            others need the same Python with tfaccel at the same path, and the data.

    Raises:
        RuntimeError: Horovod is missing, or a worker failed; the message has its last lines.
    """
    from tfaccel.core.artifacts import write_aside
    from tfaccel.distributed import run_workers
    from tfaccel.distributed.hosts import parse_hosts
    from tfaccel.measurement.devices import usable_cores

    if stage.train is None:
        raise ValueError(f"Only a train stage runs on workers, but {stage.name!r} is none.")
    workers = stage.train.workers
    with tempfile.TemporaryDirectory(prefix="tfaccel-") as folder:
        progress = Path(folder, "progress.jsonl")
        # Not `path` itself: workers that outlive a killed run must not write into the next one.
        trained = Path(folder, "model.keras")
        content = {
            "recipe": recipe.model_dump(),
            "stage": stage.name,
            "seed": seed,
            "model": str(trained),
            "progress": str(progress),
            "parent": os.getpid(),
        }
        # Workers of one machine share its cores; left alone, each would start threads for all.
        here = workers if hosts is None else min(workers, parse_hosts(hosts)[0][1])
        threads = str(max(1, usable_cores() // here))
        env = {"TF_NUM_INTRAOP_THREADS": threads, "TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
        command = [sys.executable, "-m", "tfaccel.recipes.worker", json.dumps(content)]
        with _following(progress, on_epoch):
            run_workers(command, workers, hosts, env=env, log=log)
        with write_aside(path) as aside:
            shutil.copyfile(trained, aside)


def main(job_text: str) -> None:
    """Does the work of one worker; `job_text` is JSON."""
    import psutil

    import tfaccel.distributed as hvd
    from tfaccel.core.artifacts import save_model
    from tfaccel.recipes.data import load_data

    hvd.init()
    job = json.loads(job_text)
    recipe = Recipe.model_validate(job["recipe"])
    stage = next(stage for stage in recipe.stages if stage.name == job["stage"])
    progress = Path(job["progress"])

    def report(epoch: int, figures: Mapping[str, float]) -> None:
        if not psutil.pid_exists(job["parent"]):
            raise RuntimeError("The run that started this worker has ended.")
        with progress.open("a", encoding="utf-8") as file:
            file.write(json.dumps([epoch, dict(figures)]) + "\n")

    first = hvd.rank() == 0
    task = Task(
        load_data(recipe.data, recipe.seed),
        recipe.batch_size,
        job["seed"],
        recipe.data.augment,
        on_epoch=report if first else None,
        rank=hvd.rank(),
        workers=hvd.size(),
    )
    model = run_stage(stage, task)
    if first:
        save_model(model, job["model"])
    hvd.shutdown()


@contextlib.contextmanager
def _following(progress: Path, on_epoch: EpochListener) -> Iterator[None]:
    """Hands on the lines that rank 0 writes, while the block waits for the workers."""
    done = threading.Event()
    seen = 0

    def hand_on() -> None:
        nonlocal seen
        if not progress.exists():
            return
        text = progress.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()
        for line in lines[seen:]:
            epoch, figures = json.loads(line)
            on_epoch(epoch, figures)
        seen = len(lines)

    def follow() -> None:
        while not done.wait(_POLL_SECONDS):
            hand_on()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        hand_on()


if __name__ == "__main__":
    main(sys.argv[1])
