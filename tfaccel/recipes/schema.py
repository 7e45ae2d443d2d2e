"""The recipe: what is in it and what makes sense."""

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
Architecture = Literal[
    "cnn",
    "mobile",
    "NIN",
    "VGG11",
    "VGG13",
    "VGG16",
    "VGG19",
    "GoogLeNet",
    "SqueezeNet",
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV3Large",
    "MobileNetV3Small",
    "ShuffleNetV1",
    "ShuffleNetV2",
]
IODtype = Literal["float32", "int8", "uint8"]
DATA_NAMES = ("digits", "fashion_mnist", "cifar10")
VERBS = ("train", "distill", "prune", "prune_channels", "quantize_aware")

Place = tuple[str | int, ...]


class RecipeError(ValueError):
    """A recipe file that cannot be used; the message names the file, the line and what to write."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class AugmentSettings(_Part):
    """How training images are changed each time: moved by up to `shift` pixels, mirrored or not."""

    shift: int = Field(default=0, ge=0)
    mirror: bool = False


class DataSettings(_Part):
    """Which data, and how much of it is held out.

    Attributes:
        name: digits, fashion_mnist, cifar10, or the path of an .npz file with x_train, y_train and,
            if it has a test split of its own, x_test and y_test.
        validation: share of the training samples held out to choose settings by.
        test: share held out to measure on, where the data has no test split of its own.
        limit: at most this many samples of each split, for a trial.
        augment: how training images are changed.
    """

    name: str
    validation: float = Field(default=0.1, gt=0, lt=1)
    test: float = Field(default=0.2, gt=0, lt=1)
    limit: int | None = Field(default=None, gt=0)
    augment: AugmentSettings = AugmentSettings()

    @model_validator(mode="after")
    def _is_known(self) -> "DataSettings":
        if self.name not in DATA_NAMES and not self.name.endswith(".npz"):
            raise _problem(
                f"there is no data set {self.name!r}.{hint_for(self.name, DATA_NAMES)} "
                f"Give {', '.join(DATA_NAMES)}, or the path of an .npz file.",
                ("name",),
            )
        return self


class _Fit(_Part):
    epochs: int = Field(gt=0)
    learning_rate: float = Field(default=0.001, gt=0)
    decay: Literal["cosine", "none"] = "cosine"


class _Taught(_Fit):
    """Training in which the model of an earlier stage may be the teacher (Hinton et al. 2015).

    `alpha` is the weight of the labels, 1 - alpha that of the teacher's answers.
    """

    teacher: str | None = None
    temperature: float = Field(default=4.0, gt=0)
    alpha: float = Field(default=0.3, ge=0, le=1)


class TrainSettings(_Fit):
    """A new network, trained on the labels; with `workers` above 1 on that many Horovod workers."""

    architecture: Architecture
    arguments: dict[str, Any] = Field(default_factory=dict)
    workers: int = Field(default=1, gt=0)


class DistillSettings(_Taught):
    """A new network, trained to answer as the teacher does."""

    teacher: str
    architecture: Architecture
    arguments: dict[str, Any] = Field(default_factory=dict)


class PruneSettings(_Taught):
    """Weights of a stage's model set to zero while it trains on (Zhu & Gupta 2017).

    Sparsity rises from `initial_sparsity` to `sparsity` over the first `ramp` share of the steps.
    """

    model: str
    sparsity: float = Field(gt=0, lt=1)
    initial_sparsity: float = Field(default=0.0, ge=0, lt=1)
    ramp: float = Field(default=0.5, gt=0, le=1)
    pattern: str = "element"
    scope: Literal["layer", "global"] = "layer"
    include: list[str] | None = None
    exclude: list[str] | None = None

    @model_validator(mode="after")
    def _rises(self) -> "PruneSettings":
        if self.initial_sparsity > self.sparsity:
            raise _problem(
                f"initial_sparsity ({self.initial_sparsity}) must not be above "
                f"sparsity ({self.sparsity}).",
                ("initial_sparsity",),
            )
        return self


class PruneChannelsSettings(_Taught):
    """A stage's model without the channels that matter least, trained on (Molchanov et al. 2019).

    `keep` is the share of `of` that is left.
    """

    model: str
    keep: float = Field(gt=0, lt=1)
    of: Literal["macs", "parameters", "channels"] = "macs"
    criterion: Literal["l1", "l2", "bn_gamma", "fpgm", "taylor", "activation", "apoz", "random"] = (
        "taylor"
    )
    allocation: Literal["global", "uniform"] = "global"
    multiple_of: int = Field(default=8, gt=0)
    include: list[str] | None = None
    exclude: list[str] | None = None


class QuantizeAwareSettings(_Taught):
    """A stage's model trained with the rounding of integers in it (Jacob et al. 2018)."""

    model: str
    scheme: Literal["int8"] = "int8"
    include: list[str] | None = None
    exclude: list[str] | None = None


class ExportSettings(_Part):
    """How a stage becomes a .tflite file.

    `scheme` is float32 if none is given; a quantization-aware stage brings its own. `io_dtype` is
    the type of inputs and outputs of int8 files; other files keep float32.
    """

    scheme: Literal["float32", "float16", "dynamic_int8", "int8"] | None = None
    io_dtype: IODtype = "float32"


class MeasureSettings(_Part):
    """How latency is taken: `runs` timed calls, with 1 thread and with `threads` threads."""

    runs: int = Field(default=200, gt=0)
    threads: list[Annotated[int, Field(gt=0)]] = Field(default=[1, 2], min_length=1, max_length=2)

    @model_validator(mode="after")
    def _starts_with_one(self) -> "MeasureSettings":
        if self.threads[0] != 1:
            raise _problem(
                "threads must be [1] or [1, N], since latency is always taken with one thread too; "
                f"got {self.threads}.",
                ("threads",),
            )
        return self


class Stage(_Part):
    """One step of a recipe: a name, one of the verbs, and how its model is exported."""

    name: Name
    train: TrainSettings | None = None
    distill: DistillSettings | None = None
    prune: PruneSettings | None = None
    prune_channels: PruneChannelsSettings | None = None
    quantize_aware: QuantizeAwareSettings | None = None
    export: ExportSettings | None = None

    @model_validator(mode="after")
    def _has_one_verb(self) -> "Stage":
        given = [verb for verb in VERBS if getattr(self, verb) is not None]
        if len(given) != 1:
            raise _problem(
                f"stage {self.name!r} needs exactly one of {', '.join(VERBS)}; "
                f"got {' and '.join(given) or 'none'}."
            )
        if self.quantize_aware and self.export and self.export.scheme:
            raise _problem(
                f"stage {self.name!r} is exported by the scheme it was trained for "
                f"({self.quantize_aware.scheme}). Take the scheme out of its export.",
                ("export", "scheme"),
            )
        return self

    @property
    def verb(self) -> str:
        """What the stage does: one of VERBS."""
        return next(verb for verb in VERBS if getattr(self, verb) is not None)

    @property
    def settings(
        self,
    ) -> (
        TrainSettings
        | DistillSettings
        | PruneSettings
        | PruneChannelsSettings
        | QuantizeAwareSettings
    ):
        """The settings below the verb."""
        return getattr(self, self.verb)

    @property
    def inputs(self) -> dict[str, str]:
        """The stages that this one needs, as {"teacher": name, "model": name} or less."""
        named = {key: getattr(self.settings, key, None) for key in ("model", "teacher")}
        return {key: name for key, name in named.items() if name is not None}


class Recipe(_Part):
    """A whole recipe file."""

    name: Name
    seed: int = Field(default=0, ge=0, lt=2**32)
    data: DataSettings
    batch_size: int = Field(default=32, gt=0)
    stages: list[Stage] = Field(min_length=1)
    export: ExportSettings = ExportSettings()
    measure: MeasureSettings = MeasureSettings()

    @model_validator(mode="after")
    def _refers_to_earlier_stages(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        for index, stage in enumerate(self.stages):
            place: Place = ("stages", index)
            if names.index(stage.name) != index:
                raise _problem(
                    f"there are two stages named {stage.name!r}. Give each a name of its own.",
                    (*place, "name"),
                )
            for key, wanted in stage.inputs.items():
                if wanted in names[:index]:
                    continue
                if wanted in names:
                    how = "itself" if wanted == stage.name else f"the later stage {wanted!r}"
                    message = (
                        f"stage {stage.name!r} refers to {how}. Stages run from top to bottom."
                    )
                else:
                    known = ", ".join(names[:index]) or "none: it is the first"
                    message = (
                        f"stage {stage.name!r} refers to {wanted!r}, which is no stage."
                        f"{hint_for(wanted, names[:index])} Stages before it: {known}."
                    )
                raise _problem(message, (*place, stage.verb, key))
            if stage.train and self.batch_size % stage.train.workers:
                raise _problem(
                    f"batch_size ({self.batch_size}) is shared by the workers of stage "
                    f"{stage.name!r} and must be a multiple of {stage.train.workers}.",
                    (*place, "train", "workers"),
                )
        return self


def hint_for(given: str, known: Sequence[str]) -> str:
    """Returns " Did you mean ...?" if a known name is close, else nothing."""
    close = difflib.get_close_matches(given, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _problem(message: str, place: Place = ()) -> PydanticCustomError:
    return PydanticCustomError("recipe", "{message}", {"message": message, "place": place})
