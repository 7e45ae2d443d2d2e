"""One step of a pipeline: all forward passes, all backward passes, one update (GPipe)."""

import time
from collections.abc import Sequence
from typing import Any

import keras

from tfaccel.core.graph import Tensor
from tfaccel.distributed.batches import Batch
from tfaccel.distributed.messages import pack, unpack
from tfaccel.distributed.micro_batches import beats, share_out
from tfaccel.distributed.stage_runner import StageRunner
from tfaccel.distributed.stages import differentiable
from tfaccel.distributed.transport import Transport


class PipelineStep:
    """Runs batches through the stages of this process, and exchanges with the others.

    Args:
        runners: the stages of this process, in order.
        transport: reaches the others.
        stages: of the whole pipeline.
        micro_batches: of each pipeline's share of a batch.
        optimizer: for the variables of the stages here.
    """

    def __init__(
        self,
        runners: Sequence[StageRunner],
        transport: Transport,
        stages: int,
        micro_batches: int,
        optimizer: keras.optimizers.Optimizer,
    ) -> None:
        self._runners = {runner.stage.number: runner for runner in runners}
        self._transport = transport
        self._stages, self._micro_batches = stages, micro_batches
        self._optimizer = optimizer
        self._variables = [variable for runner in runners for variable in runner.variables]
        self._apply: Any = None
        self.reset_times()

    def reset_times(self) -> None:
        """Forgets what was timed."""
        self.timed_steps, self.busy_s, self.total_s = 0, 0.0, 0.0
        self._warm = False

    def run(self, batch: Batch, *, training: bool) -> int:
        """Works on a batch; returns how many of its samples were this pipeline's.

        Raises:
            ValueError: there are fewer samples than pipelines.
        """
        begin, busy = time.perf_counter(), self._total_busy()
        shares = share_out(batch.samples, self._transport.replicas, self._micro_batches)
        own = shares[self._transport.replica]
        parts = [batch.part(samples) for samples in own]
        # The shares of all replicas' micro-batches add up to one.
        weights = [part.samples / batch.samples for part in parts]
        self._forward(parts, weights, training)
        applied = 0.0
        if training:
            self._backward(len(parts))
            gradients = [g for runner in self._runners.values() for g in runner.take_gradients()]
            gradients = self._sum_and_clip(gradients)
            applying = time.perf_counter()
            self._update(gradients)
            applied = time.perf_counter() - applying
        if training and self._warm:
            self.timed_steps += 1
            self.busy_s += self._total_busy() - busy + applied
            self.total_s += time.perf_counter() - begin
        self._warm = True
        return sum(part.samples for part in parts)

    def finish(self) -> None:
        """Ends a `fit`: an optimizer that keeps an average of the weights puts it in place."""
        if self._apply is not None:
            self._optimizer.finalize_variable_values(self._variables)

    def _total_busy(self) -> float:
        return sum(runner.busy_s for runner in self._runners.values())

    def _forward(self, parts: Sequence[Batch], weights: Sequence[float], training: bool) -> None:
        arrived: dict[int, Any] = {}
        for beat, work in enumerate(beats(self._stages, len(parts))):
            outgoing: dict[int, Any] = {}
            for stage, number in work.items():
                runner = self._runners.get(stage)
                if runner is None:
                    continue
                sent = runner.forward(
                    number,
                    unpack(arrived[stage], runner.stage.received) if stage else [],
                    _data_of(parts[number], runner),
                    _targets_of(parts[number]),
                    weights[number],
                    training=training,
                )
                if stage + 1 < self._stages:
                    outgoing[stage + 1] = pack(sent)
            arrived = self._exchange(outgoing, f"forward{beat}", work, self._stages - 1)

    def _backward(self, count: int) -> None:
        arrived: dict[int, Any] = {}
        for beat, mirrored in enumerate(beats(self._stages, count)):
            work = {self._stages - 1 - stage: number for stage, number in mirrored.items()}
            outgoing: dict[int, Any] = {}
            for stage, number in work.items():
                runner = self._runners.get(stage)
                if runner is None:
                    continue
                gradients = []
                if stage + 1 < self._stages:
                    gradients = unpack(arrived[stage], _floats(runner.stage.sent))
                sent = runner.backward(number, gradients)
                if stage:
                    outgoing[stage - 1] = pack(sent)
            arrived = self._exchange(outgoing, f"backward{beat}", work, 0)

    def _exchange(
        self, outgoing: dict[int, Any], label: str, work: dict[int, int], end: int
    ) -> dict[int, Any]:
        # After the last beat nobody sends; all ranks know that from the schedule.
        if set(work) <= {end}:
            return {}
        return self._transport.exchange(outgoing, label)

    def _sum_and_clip(self, gradients: list[Any]) -> list[Any]:
        places = [i for i, gradient in enumerate(gradients) if gradient is not None]
        summed = self._transport.sum_over_replicas([gradients[i] for i in places])
        limit = self._optimizer.global_clipnorm
        if limit:
            # The norm over all stages. What the optimizer clips afterwards is within it already.
            squares = sum(float(keras.ops.sum(keras.ops.square(g))) for g in summed)
            norm = self._transport.sum_over_stages(squares) ** 0.5
            summed = [
                gradient * min(1.0, limit / norm) if norm else gradient for gradient in summed
            ]
        for i, gradient in zip(places, summed, strict=True):
            gradients[i] = gradient
        return gradients

    def _update(self, gradients: list[Any]) -> None:
        import tensorflow as tf

        if not self._variables:
            return
        if self._apply is None:
            self._optimizer.build(self._variables)

            def apply(gradients: list[Any]) -> None:
                self._optimizer.apply(gradients, self._variables)

            self._apply = tf.function(apply, autograph=False)
        self._apply(gradients)


def _data_of(part: Batch, runner: StageRunner) -> list[Any]:
    stage = runner.stage
    if isinstance(part.x, dict) and set(stage.data_names) <= set(part.x):
        found = [part.x[name] for name in stage.data_names]
    else:
        flat = keras.tree.flatten(part.x)
        found = [flat[place] for place in stage.data]
    return [keras.ops.convert_to_tensor(array) for array in found]


def _targets_of(part: Batch) -> tuple[Any, Any]:
    def to_tensor(tree: Any) -> Any:
        return keras.tree.map_structure(keras.ops.convert_to_tensor, tree)

    weight = None if part.sample_weight is None else to_tensor(part.sample_weight)
    return to_tensor(part.y), weight


def _floats(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensors[i] for i in differentiable(tensors)]
