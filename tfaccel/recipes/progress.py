"""A run on the terminal: one bar per stage, with its epoch and accuracy."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tfaccel.recipes.results import StageResult
from tfaccel.recipes.runner import RunListener
from tfaccel.recipes.schema import Recipe, Stage


class ProgressBars(RunListener):
    """Shows a run as progress bars; where there is no terminal, as one line per finished stage.

    Use it as a context manager around `run_recipe`.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.fields[stage]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "ProgressBars":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def run_started(self, recipe: Recipe, folder: Path) -> None:
        """Draws a bar for every stage."""
        self._console.print(
            f"{recipe.name}: {len(recipe.stages)} stages on {recipe.data.name}, to {folder}/",
            highlight=False,
        )
        for stage in recipe.stages:
            self._bars[stage.name] = self._progress.add_task(
                "waiting", start=False, total=stage.settings.epochs, stage=stage.name
            )

    def step_started(self, stage: Stage, step: str) -> None:
        """Writes what the stage is doing."""
        if step == "training":
            self._progress.start_task(self._bars[stage.name])
        self._progress.update(self._bars[stage.name], description=step)

    def epoch_done(self, stage: Stage, epoch: int, figures: Mapping[str, float]) -> None:
        """Moves the bar on."""
        accuracy = figures.get("val_accuracy")
        described = "" if accuracy is None else f", validation {accuracy:.1%}"
        self._progress.update(
            self._bars[stage.name], completed=epoch, description=f"training{described}"
        )

    def stage_done(self, stage: Stage, result: StageResult) -> None:
        """Fills the bar and writes what came out."""
        how = "kept from before" if result.reused else f"trained in {result.seconds:.0f} s"
        accuracy = result.measurement.accuracy
        gained = "" if accuracy is None else f", {accuracy:.2%} on held-out data"
        self._progress.start_task(self._bars[stage.name])
        self._progress.update(
            self._bars[stage.name],
            completed=stage.settings.epochs,
            description=f"{how}{gained}",
        )
        self._progress.stop_task(self._bars[stage.name])
        if not self._console.is_terminal:
            self._console.print(f"{stage.name}: {how}{gained}", highlight=False, soft_wrap=True)
