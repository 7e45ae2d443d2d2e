"""Callbacks for `fit` on several workers, with the names of `horovod.keras.callbacks`."""

import logging
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfaccel.core.checks import check_type
from tfaccel.distributed import runtime
from tfaccel.distributed.collectives import allreduce
from tfaccel.distributed.drift import WeightsCheck
from tfaccel.distributed.learning_rates import (
    LearningRateScheduleCallback,
    LearningRateWarmupCallback,
)
from tfaccel.distributed.objects import broadcast_variables
from tfaccel.distributed.optimizer import is_distributed
from tfaccel.distributed.rank_zero import on_rank_0
from tfaccel.distributed.stopping import (
    EarlyStopping,
    ModelCheckpoint,
    ReduceLROnPlateau,
    StopTogetherCallback,
)

__all__ = [
    "BroadcastGlobalVariablesCallback",
    "EarlyStopping",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "ModelCheckpoint",
    "ReduceLROnPlateau",
    "StopTogetherCallback",
    "on_rank_0",
]

_COMPARED_AFTER = 2  # batches
_log = logging.getLogger("tfaccel.distributed")


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Gives every rank the weights and the optimizer state of one, as each `fit` begins.

    Random-seed states are left alone, so that dropout differs between ranks. The model should be
    built; one that is not gets its weights in the first batch, and they are broadcast after it.

    An optimizer that exchanges no gradients lets the ranks' weights part without a word. If it is
    no `DistributedOptimizer`, they are compared once, after the second batch, and a difference is
    an error: something else (a tape, a training step of your own) has to keep them together.

    XLA cannot compile the exchange of gradients. Where `jit_compile="auto"` has turned it on, as
    Keras does on GPUs, this callback turns it off.

    Args:
        root_rank: the rank whose values they get.
        device: accepted for Horovod's sake.
        local_variables: those that stay as they are on each rank.
    """

    def __init__(
        self,
        root_rank: int = 0,
        device: str = "",  # noqa: ARG002
        local_variables: Sequence[keras.Variable] | None = None,
    ) -> None:
        super().__init__()
        check_type("root_rank", root_rank, int)
        if root_rank < 0:
            raise ValueError(f"root_rank must be a rank, from 0, but got {root_rank}.")
        self.root_rank = root_rank
        self._local_variables = list(local_variables or ())
        self._batches = 0
        self.broadcast_done = False

    def register_local_var(self, var: keras.Variable) -> None:
        """Has one more variable stay as it is on each rank.

        Args:
            var: a variable of the model.
        """
        self._local_variables.append(var)

    def set_model(self, model: keras.Model) -> None:
        """Turns off XLA before Keras makes the training step."""
        super().set_model(model)
        if runtime.workers() > 1 and model.jit_compile and _keras_chooses_xla():
            _log.info("XLA is turned off for %s: Horovod cannot be compiled", model.name)
            model.jit_compile = False
            model.train_function = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Checks the rank, and gets ready."""
        runtime.check_rank(self.root_rank)
        self.broadcast_done = runtime.workers() == 1
        self._batches = 0

    def on_train_batch_begin(
        self,
        batch: int,  # noqa: ARG002
        logs: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> None:
        """Broadcasts before the first batch."""
        if self.broadcast_done:
            return
        if self.model.built and self.model.weights:
            self._broadcast()
        elif self.model.steps_per_execution > 1:
            raise ValueError(
                f"{self.model.name!r} has no weights yet, and with steps_per_execution="
                f"{self.model.steps_per_execution} it would be trained for several steps before "
                "they can be broadcast. Build it first: model.build(input_shape)."
            )

    def on_train_batch_end(
        self,
        batch: int,  # noqa: ARG002
        logs: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> None:
        """Broadcasts after the first batch if there was nothing to broadcast before."""
        if not self.broadcast_done:
            self._broadcast()
        self._batches += 1
        if self._batches == _COMPARED_AFTER and runtime.workers() > 1:
            self._compare()

    def _compare(self) -> None:
        optimizer = self.model.optimizer
        if optimizer is None or is_distributed(optimizer):
            return
        own = {id(variable) for variable in self._local_variables}
        trained = [v for v in self.model.trainable_variables if id(v) not in own]
        different = WeightsCheck("tfaccel_first_batches").find(trained)
        if different:
            raise RuntimeError(
                f"After {_COMPARED_AFTER} batches the weights of the ranks differ: {different[0]} "
                f"(and {len(different) - 1} more of {len(trained)}). {optimizer.name!r} does not "
                "exchange gradients: give compile() a DistributedOptimizer. (LocalSGD broadcasts "
                "the weights itself: leave this callback out.)"
            )

    def _broadcast(self) -> None:
        optimizer = self.model.optimizer
        variables = list(self.model.weights)
        if optimizer is not None:
            if not optimizer.built:
                optimizer.build(self.model.trainable_variables)
            variables += optimizer.variables
        own = {id(variable) for variable in self._local_variables}
        broadcast_variables([v for v in variables if id(v) not in own], self.root_rank)
        self.broadcast_done = True


class MetricAverageCallback(keras.callbacks.Callback):
    """Replaces the metrics of each epoch by their mean over all ranks.

    Put it before callbacks that read metrics, so that all ranks decide alike.

    Args:
        device: accepted for Horovod's sake.
    """

    def __init__(self, device: str = "") -> None:  # noqa: ARG002
        super().__init__()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Averages `logs` in place."""
        if not logs or runtime.workers() == 1:
            return
        names = sorted(name for name, value in logs.items() if np.ndim(value) == 0)
        runtime.require_agreement("the metrics of an epoch", names)
        own = np.array([float(logs[name]) for name in names], np.float64)
        means = keras.ops.convert_to_numpy(allreduce(own, name="tfaccel_metrics"))
        logs.update(zip(names, means.tolist(), strict=True))


def _keras_chooses_xla() -> bool:
    """Whether `jit_compile="auto"` means XLA here, as Keras decides it: not on a mere CPU."""
    import tensorflow as tf

    return any(device.device_type != "CPU" for device in tf.config.list_physical_devices())
