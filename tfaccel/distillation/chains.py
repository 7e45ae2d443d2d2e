"""Models that teach one another in turn: teacher assistants, born-again networks."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfaccel.core.artifacts import load_model, save_model, sha256, write_json
from tfaccel.core.checks import check_in, check_model, check_number, check_positive
from tfaccel.distillation.distiller import Distiller
from tfaccel.distillation.ensembles import ensemble as ensemble_of
from tfaccel.distillation.fingerprints import hash_model

Fit = Callable[[Distiller, str], Any]
Make = Callable[[keras.Model | None, keras.Model], Distiller]
Evaluate = Callable[[keras.Model], float]
_RECORD = "chain.json"


@dataclasses.dataclass(frozen=True)
class ChainStage:
    """One finished model of a chain.

    Attributes:
        name: of the stage, such as "assistant_1", "student", "generation_2".
        model: trained.
        parameters: how many the model has.
        accuracy: what `evaluate` returned for it; None without.
        resumed: whether it was read from a file instead of trained.
    """

    name: str
    model: keras.Model
    parameters: int
    accuracy: float | None
    resumed: bool


@dataclasses.dataclass(frozen=True)
class ChainResult:
    """What a chain of distillations gave.

    Attributes:
        stages: one for each model, in the order of training.
        ensemble: of all of them, if it was asked for.
    """

    stages: tuple[ChainStage, ...]
    ensemble: keras.Model | None = None

    @property
    def student(self) -> keras.Model:
        """The last model."""
        return self.stages[-1].model


@dataclasses.dataclass(frozen=True)
class Assistant:
    """A proposed teacher assistant.

    Attributes:
        width: what `build` was given for it.
        model: what `build` returned.
        parameters: how many it has.
        accuracy: what `evaluate` returned for it; None if that was not asked.
        target: the parameters or the accuracy that it was to come near.
    """

    width: Any
    model: keras.Model
    parameters: int
    accuracy: float | None
    target: float


def distill_chain(
    teacher: keras.Model,
    assistants: Sequence[keras.Model],
    student: keras.Model,
    fit: Fit,
    *,
    path: str | os.PathLike[str] | None = None,
    make: Make | None = None,
    evaluate: Evaluate | None = None,
    seed: int | None = 0,
) -> ChainResult:
    """Trains each assistant, then the student, with the model before it as teacher (Mirzadeh 2020).

    A student learns less from a teacher that is far above it than from one in between. The
    assistants and the student are trained in place; the teacher is left as it is.

    Args:
        teacher: a trained model.
        assistants: models between teacher and student, from large to small; none for one stage.
        student: the last model.
        fit: `fit(distiller, stage)` compiles and fits a Distiller; stage is "assistant_1", ...,
            "student", for names of logs and of backups within a stage.
        path: folder that each finished model is saved to; a rerun goes on after the last one. What
            `fit` does is not known to it: another `fit` wants another folder.
        make: `make(teacher, student)` gives the Distiller, such as `functools.partial(Distiller,
            alpha=0.1, temperature=5.0)`; `Distiller` by default.
        evaluate: `evaluate(model)` gives an accuracy to note.
        seed: of Keras's, numpy's and Python's global random numbers, set to seed + number of the
            stage before each, so that a resumed chain gives what an uninterrupted one does; None
            leaves them alone.

    Raises:
        TypeError: something is no model, or `fit` is not callable.
        ValueError: a model is not built, one comes twice, or `path` holds another chain.
    """
    models = [*assistants, student]
    for model in (teacher, *models):
        check_model(model, "distill_chain")
    if len({id(model) for model in (teacher, *models)}) < len(models) + 1:
        raise ValueError(
            "distill_chain() trains each model once, but the same model comes twice among teacher, "
            "assistants and student. Build one for each place."
        )
    names = [f"assistant_{number + 1}" for number in range(len(assistants))]
    run = _Run(fit, path, make, evaluate, seed, hash_model(teacher))
    before = teacher
    stages = []
    for number, (name, model) in enumerate(zip([*names, "student"], models, strict=True)):
        stages.append(run.stage(name, number, before, model))
        before = model
    return ChainResult(tuple(stages))


def born_again(
    model: keras.Model | Callable[[int], keras.Model],
    generations: int,
    fit: Fit,
    *,
    teacher: keras.Model | None = None,
    ensemble: bool = False,
    path: str | os.PathLike[str] | None = None,
    make: Make | None = None,
    evaluate: Evaluate | None = None,
    seed: int | None = 0,
) -> ChainResult:
    """Trains generations of one architecture, each taught by the one before (Furlanello 2018).

    Without a teacher, generation 0 learns from labels alone, and is a stage as well. The ensemble
    is the mean of the generations from 1 on, as in the paper.

    Args:
        model: the architecture, of which each generation is a new clone with new weights; or
            `build(generation)`, which returns a new model. The model itself is not trained.
        generations: how many students, 1 or more.
        fit: `fit(distiller, stage)` compiles and fits; stage is "generation_1", ....
        teacher: a trained model that teaches generation 1.
        ensemble: whether the result has the `ensemble` of the generations.
        path: as for `distill_chain`.
        make: as for `distill_chain`; not asked for generation 0.
        evaluate: as for `distill_chain`.
        seed: as for `distill_chain`; set before a generation is built too, which makes its weights.

    Raises:
        TypeError: something is no model, or `fit` is not callable.
        ValueError: the number of generations is too small, or `path` holds another chain.
    """
    check_number("generations", generations)
    least = 2 if ensemble else 1
    if generations != int(generations) or generations < least:
        why = " (an ensemble needs two)" if ensemble else ""
        raise ValueError(f"generations must be {least} or more{why}, but got {generations!r}.")
    if isinstance(model, keras.Model) or not callable(model):
        check_model(model, "born_again")
    if teacher is not None:
        check_model(teacher, "born_again")
    run = _Run(fit, path, make, evaluate, seed, hash_model(teacher) if teacher else "labels")
    stages = []
    before = teacher
    for number in range(0 if teacher is None else 1, int(generations) + 1):
        run.set_seed(number)
        new = keras.models.clone_model(model) if isinstance(model, keras.Model) else model(number)
        check_model(new, "born_again")
        if new is before:
            raise ValueError(
                f"build({number}) returned the model of the generation before. "
                "Make a new one at each call."
            )
        stages.append(run.stage(f"generation_{number}", number, before, new))
        before = new
    taught = [stage.model for stage in stages if stage.name != "generation_0"]
    return ChainResult(tuple(stages), ensemble_of(taught) if ensemble else None)


def propose_assistants(
    build: Callable[[Any], keras.Model],
    widths: Sequence[Any],
    teacher: keras.Model,
    student: keras.Model,
    count: int = 1,
    by: str = "parameters",
    evaluate: Evaluate | None = None,
) -> tuple[Assistant, ...]:
    """Returns assistants for `distill_chain`, from large to small, out of one family of models.

    By parameters: in geometric steps, sᵢ = student · (teacher / student)^(i / (count + 1)); for one
    assistant that is the geometric mean. By accuracy: in equal steps; for one assistant the mean of
    the teacher's and the student's (Mirzadeh 2020). Of all choices of `count`
    candidates, the one nearest to the steps in sum is taken.

    Args:
        build: `build(width)` returns a new model; called once for each width, in their order.
        widths: what to try; only models with fewer parameters than the teacher and more than the
            student are candidates.
        teacher: a trained model.
        student: a smaller model.
        count: how many assistants.
        by: "parameters" or "accuracy".
        evaluate: for "accuracy": `evaluate(model)` gives an accuracy; asked once for teacher,
            student and each candidate, which are fresh from `build`, so it trains them first.

    Raises:
        TypeError: something is no model.
        ValueError: the teacher is not larger than the student, there are fewer candidates than
            `count`, or an argument makes no sense.
    """
    check_in("by", by, ("parameters", "accuracy"))
    check_positive("count", count)
    if by == "accuracy" and evaluate is None:
        raise ValueError("by='accuracy' needs evaluate=, a function that gives a model's accuracy.")
    for model in (teacher, student):
        check_model(model, "propose_assistants")
    large, small = teacher.count_params(), student.count_params()
    if large <= small:
        raise ValueError(
            f"An assistant is between teacher and student, but the teacher {teacher.name!r} has "
            f"{large:,} parameters and the student {student.name!r} {small:,}. Swap them?"
        )
    built = [(width, build(width)) for width in widths]
    sizes = {width: model.count_params() for width, model in built}
    built = [(width, model) for width, model in built if small < model.count_params() < large]
    if len(built) < count:
        raise ValueError(
            f"{count} assistants need as many candidates of more than {small:,} and fewer than "
            f"{large:,} parameters, but there are {len(built)}: the widths give {sizes}. Give more "
            "widths in between."
        )
    ends, values = (float(large), float(small)), [float(m.count_params()) for _, m in built]
    accuracies: list[float | None] = [None] * len(built)
    scale: Callable[[float], float] = math.log
    back: Callable[[float], float] = math.exp
    if by == "accuracy" and evaluate is not None:
        ends = float(evaluate(teacher)), float(evaluate(student))
        values = [float(evaluate(model)) for _, model in built]
        accuracies = list(values)
        scale = back = float
    steps = np.linspace(scale(ends[0]), scale(ends[1]), count + 2)[1:-1]
    chosen = _nearest([scale(value) for value in values], list(steps))
    found = [
        Assistant(*built[place], built[place][1].count_params(), accuracies[place], back(step))
        for place, step in zip(chosen, steps, strict=True)
    ]
    return tuple(sorted(found, key=lambda assistant: -assistant.parameters))


def _nearest(values: Sequence[float], targets: Sequence[float]) -> list[int]:
    """Returns a place in `values` for each target, each once, with the least sum of distances."""
    # On a line the best pairs do not cross, so that sorted choices are enough.
    down = targets[0] >= targets[-1]
    order = sorted(range(len(values)), key=lambda place: -values[place] if down else values[place])
    return list(
        min(
            itertools.combinations(order, len(targets)),
            key=lambda places: sum(
                abs(values[place] - target) for place, target in zip(places, targets, strict=True)
            ),
        )
    )


class _Run:
    """Trains stages, or reads those that a run before has finished."""

    def __init__(
        self,
        fit: Fit,
        path: str | os.PathLike[str] | None,
        make: Make | None,
        evaluate: Evaluate | None,
        seed: int | None,
        origin: str,
    ) -> None:
        if not callable(fit):
            raise TypeError(f"fit must be a function (distiller, stage), but got {fit!r}.")
        self._fit, self._evaluate, self._seed = fit, evaluate, seed
        self._make: Make = Distiller if make is None else make
        self._folder = None if path is None else Path(path)
        self._origin = origin  # hash of what teaches the next stage
        self._earlier: dict[str, Any] = {}
        self._record: dict[str, Any] = {}
        if self._folder is not None and (self._folder / _RECORD).exists():
            self._earlier = json.loads((self._folder / _RECORD).read_text(encoding="utf-8"))

    def set_seed(self, number: int) -> None:
        if self._seed is not None:
            keras.utils.set_random_seed(self._seed + number)

    def stage(
        self, name: str, number: int, teacher: keras.Model | None, student: keras.Model
    ) -> ChainStage:
        facts = {"origin": self._origin, "weights": _shapes(student), "seed": self._seed}
        entry = self._resume(name, student, facts)
        resumed = entry is not None
        if entry is None:
            # What came after this stage was taught by another model than comes out of it now.
            self._earlier = {}
            self.set_seed(number)
            if teacher is None:
                distiller = Distiller(None, student, alpha=1.0)
            else:
                distiller = self._make(teacher, student)
            self._fit(distiller, name)
            entry = {**facts, "accuracy": None}
            if self._folder is not None:
                entry["sha256"] = sha256(save_model(student, self._folder / f"{name}.keras"))
            self._keep(name, entry)
        if entry["accuracy"] is None and self._evaluate is not None:
            entry = {**entry, "accuracy": float(self._evaluate(student))}
        self._keep(name, entry)
        self._origin = hash_model(student)
        return ChainStage(name, student, student.count_params(), entry["accuracy"], resumed)

    def _resume(
        self, name: str, student: keras.Model, facts: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Gives the student its finished weights and returns the entry, None if there is none.

        Raises:
            ValueError: what is there belongs to another chain.
        """
        if self._folder is None or name not in self._earlier:
            return None
        entry: dict[str, Any] = self._earlier[name]
        for key, what in (
            ("origin", "its teacher is another model"),
            ("weights", "its model has weights of other shapes"),
            ("seed", "its seed is another"),
        ):
            if entry[key] != facts[key]:
                raise ValueError(
                    f"{str(self._folder)!r} holds a stage {name!r} of another chain: {what}. "
                    "Give another path, or delete that folder."
                )
        file = self._folder / f"{name}.keras"
        if not file.exists() or sha256(file) != entry["sha256"]:
            return None
        student.set_weights(load_model(file).get_weights())
        return entry

    def _keep(self, name: str, entry: dict[str, Any]) -> None:
        if self._record.get(name) == entry:
            return
        self._record[name] = entry
        if self._folder is not None:
            write_json(self._folder / _RECORD, {**self._earlier, **self._record})


def _shapes(model: keras.Model) -> list[list[int]]:
    return [list(weight.shape) for weight in model.weights]
