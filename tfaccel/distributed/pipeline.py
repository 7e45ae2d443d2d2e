"""Model parallelism: a model cut into stages that work on micro-batches at the same time."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tfaccel.core.checks import check_type
from tfaccel.distributed import runtime
from tfaccel.distributed.arguments import check_count
from tfaccel.distributed.batches import Batch, batches_of
from tfaccel.distributed.cutting import Calls
from tfaccel.distributed.layer_times import time_calls
from tfaccel.distributed.micro_batches import expected_bubble
from tfaccel.distributed.objects import broadcast_object, broadcast_variables
from tfaccel.distributed.pipeline_step import PipelineStep
from tfaccel.distributed.stage_runner import StageRunner
from tfaccel.distributed.stages import build_stage, carry_back, plan_stages
from tfaccel.distributed.transport import make_transport


@dataclasses.dataclass(frozen=True)
class PipelineTimes:
    """Where the time of training steps went.

    Attributes:
        steps: how many were timed; the first of a `fit` is not.
        step_ms: milliseconds of a step.
        busy_ms: of these, how long a stage computed, the mean of all stages.
        bubble: share of its time in which a stage waited or sent; None with all stages in one
            process, where they take turns.
        expected_bubble: (S - 1) / (M + S - 1).
    """

    steps: int
    step_ms: float
    busy_ms: float
    bubble: float | None
    expected_bubble: float


class Pipeline:
    """Trains a model whose stages lie on different ranks (GPipe, Huang et al. 2019).

    The ranks of the job are shared out to pipelines: with S stages, rank r is stage r mod S of
    pipeline r // S. With more ranks than stages several pipelines share every batch and average
    their gradients. In a process that no launcher started all stages are here and take turns.

    A step does what `model.fit` does with the whole batch: losses and gradients of the
    micro-batches are added up by their share of samples, and the weights change once. Two things
    see micro-batches instead of batches, as in the paper: batch norm takes its statistics from each
    (and its moving averages move with each), and dropout draws anew for each. Metrics and loss are
    computed on the last stage. A tensor that skips stages is passed on by those between.

    Every rank makes the same model and passes the same data. `fit` trains `model` itself: when it
    returns, all ranks have all weights in it, and it is a plain Keras model.

    Args:
        model: a built Functional or Sequential model; ranks get the weights of rank 0.
        stages: how many. The cuts are then placed so that the slowest stage is fastest, by the time
            that each layer takes on rank 0.
        micro_batches: parts of each pipeline's share of a batch; more of them wait less, until they
            are too small to be computed well. About four times the stages is usual.
        cuts: names of layers to cut after, in place of measuring; one fewer than stages.
        layer_seconds: time of each layer by name, in place of measuring.
        timing_samples: of the batch that layers are timed with.

    Raises:
        TypeError: `model` is no Functional or Sequential model, or has a train_step of its own.
        ValueError: the model cannot be cut so, the numbers do not fit, or ranks differ.

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    >>> pipeline = Pipeline(model, micro_batches=2, cuts=[model.layers[0].name])
    >>> pipeline.compile(keras.optimizers.Adam(0.01), "mse")
    >>> x, y = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
    >>> sorted(pipeline.fit(x, y, batch_size=8, epochs=2, verbose=0).history)
    ['loss']
    """

    def __init__(
        self,
        model: keras.Model,
        stages: int | None = None,
        micro_batches: int = 4,
        *,
        cuts: Sequence[str] | None = None,
        layer_seconds: Mapping[str, float] | None = None,
        timing_samples: int = 32,
    ) -> None:
        check_count("micro_batches", micro_batches)
        count = _count_stages(stages, cuts)
        calls = Calls(model)
        if calls.masked_output() is not None:
            raise ValueError(
                f"The output {calls.masked_output()!r} of {model.name!r} carries a mask, and a "
                "masked loss does not add up from micro-batches. End the mask before the output, "
                "or give sample weights."
            )
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                f"A pipeline runs on TensorFlow, but KERAS_BACKEND is {keras.backend.backend()!r}."
            )
        self.model = model
        self.micro_batches = micro_batches
        self.optimizer: keras.optimizers.Optimizer | None = None
        self.stop_training = False
        self.times: PipelineTimes | None = None
        self._transport = make_transport(count)
        self._agree(calls, count, cuts)
        if cuts is not None:
            positions = calls.positions_of(cuts)
        else:
            positions = self._balance(calls, count, layer_seconds, timing_samples)
        self._calls = calls
        self._stages = plan_stages(calls, positions)
        self._last = count - 1
        names = {cut.position: cut.after for cut in calls.cuts()}
        self.cuts = tuple(names[position] for position in positions)
        broadcast_variables(model.weights)
        self._models = {n: build_stage(calls, self._stages[n]) for n in self._transport.local}
        self._runners: list[StageRunner] = []
        self._step: PipelineStep | None = None

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """The names of the layers and operations of each stage, in the order in which they run."""
        return tuple(tuple(node.name for node in stage.nodes) for stage in self._stages)

    def compile(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        loss: Any,
        metrics: Any = None,
        weighted_metrics: Any = None,
        loss_weights: Any = None,
    ) -> None:
        """Says how to train; the arguments are those of `keras.Model.compile`.

        Raises:
            ValueError: the optimizer scales the loss, or the loss is no mean over samples.
        """
        optimizer = keras.optimizers.get(optimizer)
        _check_trainable(optimizer, loss, self.model)
        self.optimizer = optimizer
        self._runners = []
        for number, model in self._models.items():
            last = number == self._last
            if last:
                model.compile(
                    "sgd",  # never used
                    loss,
                    metrics=metrics,
                    weighted_metrics=weighted_metrics,
                    loss_weights=loss_weights,
                )
            self._runners.append(StageRunner(self._stages[number], model, last))
        self._step = PipelineStep(
            self._runners, self._transport, len(self._stages), self.micro_batches, optimizer
        )

    def fit(
        self,
        x: Any,
        y: Any = None,
        batch_size: int = 32,
        epochs: int = 1,
        verbose: str | int = "auto",
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
        validation_data: Any = None,
        shuffle: bool = True,
        sample_weight: Any = None,
        *,
        seed: int = 0,
    ) -> keras.callbacks.History:
        """Trains the model, as `keras.Model.fit`.

        Args:
            x: arrays [samples, ...] in any structure that the model takes, the same on all ranks;
                or a `tf.data.Dataset` of whole batches, in the same order on all ranks.
            y: targets.
            batch_size: samples of a step, of all pipelines together.
            epochs: passes over the data.
            verbose: as in Keras; only rank 0 speaks.
            callbacks: hear of epochs (their logs are the same on all ranks). They see this object
                as their model, with the weights of all stages.
            validation_data: (x, y) or (x, y, sample weights), or a data set.
            shuffle: whether samples of arrays are mixed anew in each epoch.
            sample_weight: [samples].
            seed: of the shuffling.

        Returns:
            The history, on every rank.
        """
        step = self._ready()
        check_count("epochs", epochs)
        batches = batches_of(x, y, sample_weight, batch_size, shuffle, seed)
        self._agree_on_data(batches(0))
        verbose = {"auto": 1}.get(str(verbose), verbose) if runtime_rank() == 0 else 0
        history = keras.callbacks.History()
        hears = keras.callbacks.CallbackList(
            [history, *(callbacks or [])],
            add_progbar=bool(verbose),
            model=self,
            verbose=verbose,
            epochs=epochs,
            steps=None,
        )
        self.stop_training = False
        logs: dict[str, float] = {}
        step.reset_times()
        hears.on_train_begin()
        for epoch in range(epochs):
            hears.on_epoch_begin(epoch)
            logs = self._run_epoch(batches(epoch), training=True, hears=hears)
            if validation_data is not None:
                held = self._run_epoch(_held_out(validation_data, batch_size), training=False)
                logs.update({f"val_{name}": value for name, value in held.items()})
            if callbacks:
                self._collect()
            hears.on_epoch_end(epoch, logs)
            if self.stop_training:
                break
        step.finish()
        self.times = self._summarize_times(step)
        self._collect()
        hears.on_train_end(logs)
        return history

    def evaluate(
        self, x: Any, y: Any = None, batch_size: int = 32, sample_weight: Any = None
    ) -> dict[str, float]:
        """Returns loss and metrics, by name, on every rank; arguments as for `fit`."""
        self._ready()
        return self._run_epoch(
            batches_of(x, y, sample_weight, batch_size, False, 0)(0), training=False
        )

    def predict(self, x: Any, **options: Any) -> Any:
        """Returns `model.predict`, of this process alone: after `fit` it has all weights."""
        return self.model.predict(x, **options)

    # What callbacks ask of a model

    def get_weights(self) -> list[Any]:
        """Returns the weights of all stages."""
        return self.model.get_weights()

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the weights of all stages; call it on all ranks."""
        self.model.set_weights(weights)
        for number, stage_model in self._models.items():
            for layer in self._stages[number].layers:
                stage_model.get_layer(layer.name).set_weights(layer.get_weights())

    def save(self, filepath: Any, overwrite: bool = True, **options: Any) -> None:
        """Saves the model as a plain Keras file, on rank 0 only."""
        if runtime_rank() == 0:
            self.model.save(filepath, overwrite=overwrite, **options)

    def save_weights(self, filepath: Any, overwrite: bool = True) -> None:
        """Saves the weights of all stages, on rank 0 only."""
        if runtime_rank() == 0:
            self.model.save_weights(filepath, overwrite=overwrite)

    # Parts

    def _ready(self) -> PipelineStep:
        if self._step is None:
            raise ValueError("Call pipeline.compile(optimizer, loss) before fit or evaluate.")
        return self._step

    def _agree(self, calls: Calls, count: int, cuts: Sequence[str] | None) -> None:
        nodes = calls.graph.nodes
        lines = [f"{count} stages, cuts {cuts}, {self.micro_batches} micro-batches"]
        lines += [f"{node.name} {[(t.shape, t.dtype) for t in node.outputs]}" for node in nodes]
        runtime.require_agreement("the model of the pipeline", lines)

    def _agree_on_data(self, batches: Iterator[Batch]) -> None:
        """Finds a data set that is shuffled without a seed: x here would not belong to y there."""
        if runtime.workers() == 1:
            return
        first = next(batches, None)
        leaves = keras.tree.flatten((first.x, first.y)) if first is not None else []
        lines = [
            f"{tuple(leaf.shape)}, {hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()[:8]}"
            for leaf in leaves
        ]
        runtime.require_agreement("the first batch (shape and digest of each array)", lines)

    def _balance(
        self,
        calls: Calls,
        count: int,
        layer_seconds: Mapping[str, float] | None,
        samples: int,
    ) -> list[int]:
        seconds = layer_seconds
        if seconds is None and count > 1 and runtime_rank() == 0:
            seconds = time_calls(calls, samples)
        if count > 1:
            seconds = broadcast_object(seconds, name="tfaccel_layer_times")
        return calls.balance(seconds or {}, count)

    def _run_epoch(
        self,
        batches: Iterator[Batch],
        *,
        training: bool,
        hears: keras.callbacks.CallbackList | None = None,
    ) -> dict[str, float]:
        step = self._ready()
        last = next((r for r in self._runners if r.stage.number == self._last), None)
        for runner in self._runners:
            runner.take_loss()
        if last is not None:
            last.model.reset_metrics()
        loss, seen, own = 0.0, 0, 0
        for number, batch in enumerate(batches):
            if hears is not None:
                hears.on_train_batch_begin(number)
            own += step.run(batch, training=training)
            loss += batch.samples * sum(runner.take_loss() for runner in self._runners)
            seen += batch.samples
            if hears is not None:
                hears.on_train_batch_end(number)
        if not seen:
            raise ValueError("There are no samples to train on or to evaluate.")
        metrics: dict[str, Any] = {}
        if last is not None:
            metrics = keras.tree.map_structure(float, last.model.get_metrics_result())
            # Keras's own figures of each output's loss count micro-batches of all sizes alike.
            for name in ("loss", *(f"{output}_loss" for output in last.model.output_names)):
                metrics.pop(name, None)
        everyone = self._transport.everyone((loss, own, metrics))
        logs = {"loss": sum(part for part, _, _ in everyone) / seen}
        told = [(samples, found) for _, samples, found in everyone if found]
        for name in told[0][1] if told else ():
            logs[name] = sum(samples * found[name] for samples, found in told) / seen
        return logs

    def _collect(self) -> None:
        """Gives every rank the weights of all stages, in the whole model."""
        for number, stage_model in self._models.items():
            carry_back(self._stages[number], stage_model)
        if runtime.workers() == 1:
            return
        for stage in self._stages:
            variables = [v for layer in stage.layers for v in layer.weights]
            broadcast_variables(variables, root_rank=stage.number)

    def _summarize_times(self, step: PipelineStep) -> PipelineTimes | None:
        everyone = self._transport.everyone((step.timed_steps, step.busy_s, step.total_s))
        steps = everyone[0][0]
        if not steps:
            return None
        busy, total = (float(np.mean([row[i] for row in everyone])) for i in (1, 2))
        return PipelineTimes(
            steps,
            1e3 * total / steps,
            1e3 * busy / steps / len(self._transport.local),
            1 - busy / total if len(everyone) > 1 else None,
            expected_bubble(len(self._stages), self.micro_batches),
        )


def runtime_rank() -> int:
    """The rank of this process, 0 for one that is alone."""
    return runtime.rank() if runtime.workers() > 1 else 0


def _count_stages(stages: int | None, cuts: Sequence[str] | None) -> int:
    if isinstance(cuts, str):
        raise TypeError(f"cuts must be a list of layers' names, but got {cuts!r}.")
    if cuts is None:
        if stages is None:
            raise ValueError("Give stages (how many) or cuts (the layers to cut after).")
        return check_count("stages", stages)
    if stages is not None and stages != len(cuts) + 1:
        raise ValueError(
            f"{len(cuts)} cuts make {len(cuts) + 1} stages, but stages={stages!r}. "
            "Give one of them."
        )
    return len(cuts) + 1


def _check_trainable(optimizer: keras.optimizers.Optimizer, loss: Any, model: keras.Model) -> None:
    check_type("optimizer", optimizer, keras.optimizers.Optimizer)
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if scaled or model.dtype_policy.name == "mixed_float16":
        raise ValueError(
            "A pipeline does not scale the loss, which float16 needs. Use mixed_bfloat16 or "
            "float32, and a plain optimizer."
        )
    if optimizer.global_clipnorm and optimizer.gradient_accumulation_steps:
        raise ValueError(
            "A pipeline cannot clip accumulated gradients by their global norm. Raise "
            "micro_batches in place of gradient_accumulation_steps."
        )
    if loss is None:
        raise ValueError("compile() needs a loss for the pipeline, but got None.")
    for leaf in keras.tree.flatten(loss):
        found = keras.losses.get(leaf) if leaf is not None else None
        reduction = getattr(found, "reduction", "sum_over_batch_size")
        if reduction != "sum_over_batch_size":
            raise ValueError(
                f"The loss of a pipeline must be a mean over samples (reduction="
                f"'sum_over_batch_size'), so that it adds up from micro-batches; "
                f"{getattr(found, 'name', found)!r} has {reduction!r}."
            )


def _held_out(data: Any, batch_size: int) -> Iterator[Batch]:
    parts: Callable[[int], Iterator[Batch]]
    if isinstance(data, tuple):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        parts = batches_of(x, y, sample_weight, batch_size, False, 0)
    else:
        parts = batches_of(data, None, None, batch_size, False, 0)
    return parts(0)
