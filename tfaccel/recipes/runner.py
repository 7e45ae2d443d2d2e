"""A recipe from top to bottom: each stage trained, exported and measured, finished ones kept."""

import contextlib
import dataclasses
import hashlib
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tfaccel import __version__
from tfaccel.core.artifacts import load_model, save_model, sha256
from tfaccel.measurement import Measurement, measure
from tfaccel.recipes.cache import StepCache, hash_of
from tfaccel.recipes.data import load_data
from tfaccel.recipes.models import build_network
from tfaccel.recipes.reading import with_workers
from tfaccel.recipes.results import RunResult, StageResult, write_report, write_results
from tfaccel.recipes.schema import ExportSettings, Recipe, Stage
from tfaccel.recipes.stages import Task, run_stage

_log = logging.getLogger("tfaccel.recipes")


class RunListener:
    """Hears how a run goes on; override what you need."""

    def run_started(self, recipe: Recipe, folder: Path) -> None:
        """The recipe is sound, and work begins."""

    def stage_started(self, stage: Stage) -> None:
        """A stage is next."""

    def epoch_done(self, stage: Stage, epoch: int, figures: Mapping[str, float]) -> None:
        """An epoch of a stage has ended; epochs count from 1."""

    def step_started(self, stage: Stage, step: str) -> None:
        """A stage goes on to "training", "exporting" or "measuring"; steps kept are passed over."""

    def stage_done(self, stage: Stage, result: StageResult) -> None:
        """A stage is finished."""


def run_recipe(
    recipe: Recipe,
    output: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    hosts: str | None = None,
    listener: RunListener | None = None,
) -> RunResult:
    """Runs a recipe, and goes on from the last finished stage if it ran here before.

    Args:
        recipe: what `load_recipe` read.
        output: folder of the run; by default runs/<name of the recipe>.
        workers: number of Horovod workers in place of what the recipe says.
        hosts: "a:2,b:2" for train stages on several machines, reached by ssh, this one first; with
            no `workers`, as many as they have room for.
        listener: hears of every stage and epoch.

    Returns:
        The files and measurements; the same is in results.json and report.html of the folder.

    Raises:
        RecipeError: the recipe names a network or an argument that does not exist.
        DataError: the data cannot be used.
        RuntimeError: Horovod is needed and not installed.
        ValueError: the hosts have too little room, or the first is another machine.
    """
    if hosts is not None:
        from tfaccel.distributed.hosts import check_begins_here, check_hosts

        workers = check_hosts(hosts, workers)
        check_begins_here(hosts)
    if workers is not None:
        recipe = with_workers(recipe, workers)
    folder = Path("runs", recipe.name) if output is None else Path(output)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"The run is to be written to the folder {str(folder)!r}, but that is a file. "
            "Give another --output."
        )
    return _Run(recipe, folder, listener or RunListener(), hosts).run()


class _Run:
    """One run of a recipe in a folder."""

    def __init__(
        self, recipe: Recipe, folder: Path, listener: RunListener, hosts: str | None
    ) -> None:
        self._recipe = recipe
        self._hosts = hosts
        self._folder = folder
        self._listener = listener
        self._data = load_data(recipe.data, recipe.seed)
        self._cache = StepCache(folder / "cache.json")

    def run(self) -> RunResult:
        self._check()
        self._folder.mkdir(parents=True, exist_ok=True)
        with _log_file(self._folder / "log.txt"):
            _log.info("run %s, tfaccel %s", self._recipe.name, __version__)
            self._listener.run_started(self._recipe, self._folder)
            # The page of an earlier run would not belong to the files that are about to change.
            (self._folder / "report.html").unlink(missing_ok=True)
            results: list[StageResult] = []
            try:
                for stage in self._recipe.stages:
                    results.append(self._run_stage(stage))
                    write_results(self._folder, self._recipe, self._data, results)
            except BaseException as error:
                _log.error("stopped by %s: %s", type(error).__name__, error)
                raise
            write_report(self._folder, self._recipe, self._data, results)
            _log.info("finished")
        return RunResult(self._folder, tuple(results))

    def _check(self) -> None:
        """Finds what would fail later, before any work is spent."""
        for stage in self._recipe.stages:
            settings = stage.train or stage.distill
            if settings is None:
                continue
            build_network(
                settings.architecture,
                settings.arguments,
                self._data.input_shape,
                self._data.classes,
            )
            if stage.train and stage.train.workers > 1 and self._find_model(stage) is None:
                self._check_horovod(stage.name, stage.train.workers)

    @staticmethod
    def _check_horovod(stage: str, workers: int) -> None:
        from tfaccel.distributed import check_horovod

        try:
            check_horovod(workers)
        except RuntimeError as error:
            raise RuntimeError(
                f"Stage {stage!r}: {error} On the command line that is --workers 1."
            ) from error

    def _run_stage(self, stage: Stage) -> StageResult:
        self._listener.stage_started(stage)
        trained = self._find_model(stage)
        reused = trained is not None
        if trained is None:
            self._listener.step_started(stage, "training")
            trained = self._train(stage)
        model = self._model_path(stage)
        tflite = model.with_suffix(".tflite")
        exported = self._export(stage, model, tflite)
        result = StageResult(
            name=stage.name,
            verb=stage.verb,
            model=model,
            tflite=tflite,
            seconds=trained["seconds"],
            figures=trained["figures"],
            exported=exported,
            reused=reused,
            measurement=self._measure(stage, tflite),
        )
        _log.info("stage %s: %s", stage.name, result.measurement)
        self._listener.stage_done(stage, result)
        return result

    def _model_path(self, stage: Stage) -> Path:
        return self._folder / f"{stage.name}.keras"

    def _model_key(self, stage: Stage) -> str:
        return hash_of(
            __version__,
            stage.verb,
            stage.settings.model_dump(),
            self._recipe.batch_size,
            self._recipe.data.augment.model_dump(),
            self._seed(stage),
            self._data.digest,
            {key: sha256(self._folder / f"{name}.keras") for key, name in stage.inputs.items()},
        )

    def _find_model(self, stage: Stage) -> dict[str, Any] | None:
        return self._cache.find(
            f"{stage.name}.model", self._model_key(stage), self._model_path(stage)
        )

    def _train(self, stage: Stage) -> dict[str, Any]:
        figures: dict[str, float] = {}

        def on_epoch(epoch: int, new: Mapping[str, float]) -> None:
            figures.update(new)
            _log.info("stage %s, epoch %d: %s", stage.name, epoch, dict(new))
            self._listener.epoch_done(stage, epoch, new)

        key = self._model_key(stage)
        path = self._model_path(stage)
        begin = time.perf_counter()
        if stage.train and stage.train.workers > 1:
            from tfaccel.recipes.worker import train_on_workers

            train_on_workers(
                self._recipe,
                stage,
                self._seed(stage),
                path,
                self._folder / f"{stage.name}.workers.txt",
                on_epoch,
                self._hosts,
            )
        else:
            inputs = {
                name: load_model(self._folder / f"{source}.keras")
                for name, source in stage.inputs.items()
            }
            task = Task(
                self._data,
                self._recipe.batch_size,
                self._seed(stage),
                self._recipe.data.augment,
                inputs,
                on_epoch,
            )
            save_model(run_stage(stage, task), path)
        facts = {"seconds": time.perf_counter() - begin, "figures": figures}
        self._cache.keep(f"{stage.name}.model", key, path, facts)
        return facts

    def _export(self, stage: Stage, model: Path, tflite: Path) -> dict[str, Any]:
        settings = stage.export or self._recipe.export
        if stage.quantize_aware:
            settings = settings.model_copy(update={"scheme": None})
        key = hash_of(__version__, sha256(model), settings.model_dump(), self._data.digest)
        facts = self._cache.find(f"{stage.name}.tflite", key, tflite)
        if facts is None:
            self._listener.step_started(stage, "exporting")
            facts = self._convert(stage, model, tflite, settings)
            self._cache.keep(f"{stage.name}.tflite", key, tflite, facts)
        return facts

    def _convert(
        self, stage: Stage, model: Path, tflite: Path, settings: ExportSettings
    ) -> dict[str, Any]:
        from tfaccel.export import to_tflite

        whole = stage.quantize_aware is not None or settings.scheme == "int8"
        artifact = to_tflite(
            model,
            tflite,
            settings.scheme,
            io_dtype=settings.io_dtype if whole else "float32",
            representative_data=self._data.train.x[:256] if settings.scheme == "int8" else None,
            # Checked against Keras on samples that were not trained on, nor are measured on.
            verify_data=self._data.validation.x[:64],
            metadata={
                "recipe": self._recipe.name,
                "stage": stage.name,
                "data_sha256": self._data.digest,
            },
        )
        return {
            "scheme": artifact.scheme,
            "io_dtype": artifact.io_dtype,
            "float_tensors": list(artifact.float_tensors),
            "verification": dataclasses.asdict(artifact.verification)
            if artifact.verification
            else None,
        }

    def _measure(self, stage: Stage, tflite: Path) -> Measurement:
        settings = self._recipe.measure
        key = hash_of(
            __version__, sha256(tflite), settings.model_dump(), self._data.digest, platform.node()
        )
        facts = self._cache.find(f"{stage.name}.measurement", key, tflite)
        if facts is None:
            self._listener.step_started(stage, "measuring")
            measurement = measure(
                tflite,
                self._data.test.arrays,
                threads=settings.threads[-1],
                runs=settings.runs,
                name=stage.name,
            )
            facts = dataclasses.asdict(measurement)
            self._cache.keep(f"{stage.name}.measurement", key, tflite, facts)
        return Measurement(**facts)

    def _seed(self, stage: Stage) -> int:
        # From the name, so that a stage put in between does not change the others.
        text = f"{self._recipe.seed}/{stage.name}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    logger = logging.getLogger("tfaccel")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level, propagate = logger.level, logger.propagate
    # What the file is told must not appear on the terminal of someone who did not ask for it.
    logger.propagate = propagate and logger.isEnabledFor(logging.INFO)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.removeHandler(handler)
        handler.close()
