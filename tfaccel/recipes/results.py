"""What a run leaves behind: a record per stage, results.json and report.html."""

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfaccel import __version__
from tfaccel.core.artifacts import sha256, write_json
from tfaccel.measurement import Measurement
from tfaccel.recipes.data import Splits
from tfaccel.recipes.schema import Recipe

_PACKAGES = ("keras", "tensorflow", "ai-edge-litert", "numpy", "horovod")


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage left behind.

    Attributes:
        name: of the stage.
        verb: what it did, such as train or prune.
        model: its .keras file.
        tflite: its .tflite file.
        seconds: how long the training took.
        figures: loss and accuracy after the last epoch, by Keras's names.
        exported: scheme of the .tflite file, and how far it is from Keras.
        reused: whether the model was there from an earlier run.
        measurement: of the .tflite file, on the test split.
    """

    name: str
    verb: str
    model: Path
    tflite: Path
    seconds: float
    figures: Mapping[str, float]
    exported: Mapping[str, Any]
    reused: bool
    measurement: Measurement


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: where everything lies.
        stages: one result per stage, in their order.
    """

    folder: Path
    stages: tuple[StageResult, ...]

    @property
    def measurements(self) -> list[Measurement]:
        """The measurement of every stage."""
        return [stage.measurement for stage in self.stages]


def write_results(
    folder: Path, recipe: Recipe, data: Splits, results: Sequence[StageResult]
) -> None:
    """Writes results.json: versions, device, seed, recipe, data and all stages so far."""
    content = {
        "name": recipe.name,
        "finished": len(results) == len(recipe.stages),
        "seed": recipe.seed,
        "device": results[-1].measurement.device,
        "versions": versions(),
        "recipe": recipe.model_dump(exclude_none=True),
        "data": {
            "sha256": data.digest,
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
            "classes": data.classes,
            "input_shape": list(data.input_shape),
        },
        "stages": [
            {
                "name": result.name,
                "verb": result.verb,
                "seconds": result.seconds,
                "figures": dict(result.figures),
                "export": dict(result.exported),
                "files": {path.name: sha256(path) for path in (result.model, result.tflite)},
                "measurement": dataclasses.asdict(result.measurement),
            }
            for result in results
        ],
    }
    write_json(folder / "results.json", content)


def write_report(
    folder: Path, recipe: Recipe, data: Splits, results: Sequence[StageResult]
) -> None:
    """Writes report.html: the measurements as a table and as plots."""
    import yaml

    from tfaccel.reporting import render_html

    content = recipe.model_dump(exclude_none=True, exclude_defaults=True)
    render_html(
        [result.measurement for result in results],
        folder / "report.html",
        recipe.name,
        facts={
            "measured on": f"{len(data.test):,} held-out samples",
            "device": results[-1].measurement.device,
            "seed": str(recipe.seed),
            "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
            "trained in": ", ".join(f"{r.name} {r.seconds:.0f} s" for r in results),
        },
        sources={"recipe": yaml.safe_dump(content, sort_keys=False)},
    )


def versions() -> dict[str, str]:
    """Returns the versions of Python, tfaccel and the packages that decide a result."""
    found = {"python": platform.python_version(), "tfaccel": __version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
