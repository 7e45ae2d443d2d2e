"""What each verb of a recipe does: data and earlier models in, a trained model out."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras

from tfaccel.recipes.batches import Batches
from tfaccel.recipes.data import Splits
from tfaccel.recipes.models import build_network
from tfaccel.recipes.schema import (
    AugmentSettings,
    DistillSettings,
    PruneChannelsSettings,
    PruneSettings,
    QuantizeAwareSettings,
    Stage,
    TrainSettings,
)

EpochListener = Callable[[int, Mapping[str, float]], None]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a stage works on.

    Attributes:
        data: the splits; only train and validation are touched.
        batch_size: samples of one step, of all workers together.
        seed: of weights, order of samples and dropout.
        augment: how training images are changed.
        inputs: models of earlier stages, by the key that names them in the recipe.
        on_epoch: called after each epoch with its number from 1 and its figures.
        rank: which of the workers this process is.
        workers: how many Horovod workers share the work.
    """

    data: Splits
    batch_size: int
    seed: int
    augment: AugmentSettings
    inputs: Mapping[str, keras.Model] = dataclasses.field(default_factory=dict)
    on_epoch: EpochListener | None = None
    rank: int = 0
    workers: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-len(self.data.train) // self.batch_size)


class EpochReport(keras.callbacks.Callback):
    """Hands each epoch's figures to a listener."""

    def __init__(self, listener: EpochListener) -> None:
        super().__init__()
        self._listener = listener

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Reports the epoch that has ended."""
        self._listener(epoch + 1, {key: float(value) for key, value in (logs or {}).items()})


def run_stage(stage: Stage, task: Task) -> keras.Model:
    """Runs one stage in this process.

    Returns:
        The trained model, not stripped: later stages go on from it.
    """
    # Workers get equal weights by broadcast; their dropout must differ.
    keras.utils.set_random_seed((task.seed + task.rank) % 2**32)
    return _VERBS[stage.verb](stage.settings, task)


def train(settings: TrainSettings, task: Task) -> keras.Model:
    """Trains a new network on the labels."""
    model = build_network(
        settings.architecture, settings.arguments, task.data.input_shape, task.data.classes
    )
    return fit(model, settings, task)


def distill(settings: DistillSettings, task: Task) -> keras.Model:
    """Trains a new network on the labels and on the teacher's answers (Hinton et al. 2015)."""
    model = build_network(
        settings.architecture, settings.arguments, task.data.input_shape, task.data.classes
    )
    return fit(model, settings, task)


def prune(settings: PruneSettings, task: Task) -> keras.Model:
    """Sets weights to zero, more of them as training goes on (Zhu & Gupta 2017)."""
    from tfaccel.core.schedules import PolynomialDecay
    from tfaccel.pruning import UpdatePruning
    from tfaccel.pruning import prune as prune_model

    ramp = max(1, round(settings.ramp * settings.epochs * task.steps_per_epoch))
    frequency = max(1, ramp // 20)
    schedule = PolynomialDecay(
        initial_sparsity=settings.initial_sparsity,
        final_sparsity=settings.sparsity,
        begin_step=0,
        # The last update must fall on a step at which masks are updated.
        end_step=ramp // frequency * frequency,
        frequency=frequency,
    )
    model = prune_model(
        task.inputs["model"],
        schedule,
        pattern=settings.pattern,
        scope=settings.scope,
        include=settings.include,
        exclude=settings.exclude,
        seed=task.seed,
    )
    return fit(model, settings, task, [UpdatePruning()])


def prune_channels(settings: PruneChannelsSettings, task: Task) -> keras.Model:
    """Takes the least important channels out, judged on training data (Molchanov et al. 2019)."""
    from tfaccel.pruning import prune_channels as prune_model

    model = prune_model(
        task.inputs["model"],
        {settings.of: settings.keep},
        settings.criterion,
        task.data.train.arrays,
        settings.multiple_of,
        allocation=settings.allocation,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        include=settings.include,
        exclude=settings.exclude,
        seed=task.seed,
    )
    return fit(model, settings, task)


def quantize_aware(settings: QuantizeAwareSettings, task: Task) -> keras.Model:
    """Trains with the rounding of integers in the model (Jacob et al. 2018)."""
    from tfaccel.quantization import quantize_aware as quantize_model

    model = quantize_model(
        task.inputs["model"],
        settings.scheme,
        include=settings.include,
        exclude=settings.exclude,
    )
    return fit(model, settings, task)


_VERBS: dict[str, Callable[[Any, Task], keras.Model]] = {
    "train": train,
    "distill": distill,
    "prune": prune,
    "prune_channels": prune_channels,
    "quantize_aware": quantize_aware,
}


def make_optimizer(settings: Any, steps: int) -> keras.optimizers.Optimizer:
    """Returns Adam with the stage's learning rate, falling as a cosine to zero over `steps`."""
    rate: Any = settings.learning_rate
    if settings.decay == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, steps)
    return keras.optimizers.Adam(rate)


def compile_classifier(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Compiles a model that gives logits of integer classes, with accuracy as its metric."""
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )


def fit(
    model: keras.Model,
    settings: Any,
    task: Task,
    callbacks: list[keras.callbacks.Callback] | None = None,
) -> keras.Model:
    """Fits a model on the train split, with the teacher if the stage has one; returns it."""
    optimizer = make_optimizer(settings, settings.epochs * task.steps_per_epoch)
    callbacks = list(callbacks or [])
    if task.workers > 1:
        import tfaccel.distributed as hvd

        optimizer = hvd.DistributedOptimizer(optimizer)
        callbacks += [hvd.BroadcastGlobalVariablesCallback(0), hvd.MetricAverageCallback()]
    if task.on_epoch:
        callbacks.append(EpochReport(task.on_epoch))
    trained = _taught(model, settings, task)
    compile_classifier(trained, optimizer)
    batches = Batches(
        task.data.train, task.batch_size, task.seed, task.augment, task.rank, task.workers
    )
    trained.fit(
        batches,
        epochs=settings.epochs,
        validation_data=task.data.validation.arrays,
        verbose=0,
        callbacks=callbacks,
    )
    return model


def _taught(model: keras.Model, settings: Any, task: Task) -> keras.Model:
    """Returns the model, or a distiller whose student it is."""
    if "teacher" not in task.inputs:
        return model
    from tfaccel.distillation import Distiller

    return Distiller(
        task.inputs["teacher"], model, alpha=settings.alpha, temperature=settings.temperature
    )
