"""Learning rates that warm up and follow a schedule, as Horovod's callbacks set them."""

import logging
from collections.abc import Callable
from typing import Any

import keras

from tfaccel.core.checks import check_positive
from tfaccel.distributed import runtime

_log = logging.getLogger("tfaccel.distributed")


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Sets the learning rate to `initial_lr * multiplier(epoch)` between two epochs.

    With momentum correction the momentum of what was learned at the old rate is scaled as the rate
    is (Goyal 2017, section 2.3, eq. 10).

    Args:
        initial_lr: what is multiplied.
        multiplier: a function of the epoch (float if not `staircase`), or a number: then its power
            of `epoch - start_epoch`.
        start_epoch: the first epoch it sets, from 0.
        end_epoch: the first epoch it leaves alone again; None for no end.
        staircase: sets the rate as each epoch begins; False does so before each batch.
        momentum_correction: scales momentum as well, for optimizers that have `momentum`.
        steps_per_epoch: batches of an epoch, where Keras does not know it.
    """

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        check_positive("initial_lr", initial_lr)
        self.initial_lr = initial_lr
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.current_epoch = 0
        self.multiplier = multiplier if callable(multiplier) else self._powers_of(multiplier)

    def _powers_of(self, base: float) -> Callable[[float], float]:
        return lambda epoch: base ** (epoch - self.start_epoch)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Checks that there is a rate to set, and how many batches an epoch has."""
        optimizer = _rate_holder(self.model.optimizer)
        try:
            optimizer.learning_rate = float(optimizer.learning_rate)
        except TypeError as error:
            raise ValueError(
                f"{type(self).__name__} sets the learning rate, but {optimizer.name!r} has a "
                "schedule of its own. Make the optimizer with a number."
            ) from error
        if self.staircase or self.steps_per_epoch:
            return
        self.steps_per_epoch = self.params.get("steps")
        if not self.steps_per_epoch:
            raise ValueError(
                f"{type(self).__name__} needs the number of batches of an epoch, which this data "
                "does not tell. Give it steps_per_epoch."
            )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Notes the epoch."""
        self.current_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Sets the rate, if it is time."""
        epoch = self.current_epoch
        if epoch < self.start_epoch or (self.end_epoch is not None and epoch >= self.end_epoch):
            return
        if self.staircase:
            if batch == 0:
                self._set(epoch)
        else:
            self._set(epoch + batch / float(self.steps_per_epoch or 1))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Tells the other callbacks the rate, as `lr`."""
        if logs is not None:
            logs["lr"] = float(_rate_holder(self.model.optimizer).learning_rate)

    def _set(self, epoch: float) -> None:
        optimizer = _rate_holder(self.model.optimizer)
        old, new = float(optimizer.learning_rate), self.initial_lr * self.multiplier(epoch)
        optimizer.learning_rate = new
        if not self.momentum_correction or not getattr(optimizer, "momentum", 0) or old == 0:
            return
        # Keras writes the momentum itself into the compiled step, so that it cannot be changed for
        # one batch. To scale what it is multiplied with comes to the same.
        for variable in optimizer.variables:
            if variable.name.endswith("momentum"):
                variable.assign(variable * (new / old))


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate from `initial_lr / N` to `initial_lr` in the first epochs.

    Large batches need the large rate, and the first steps do not stand it (Goyal 2017, section
    2.2). The rate grows with each batch, by a straight line.

    Args:
        initial_lr: the rate after the warm-up, usually that of one worker times N.
        warmup_epochs: how long it takes.
        momentum_correction: as for `LearningRateScheduleCallback`.
        steps_per_epoch: batches of an epoch, where Keras does not know it.
        verbose: 1 says so in the log when it is over.
    """

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        check_positive("warmup_epochs", warmup_epochs)
        super().__init__(
            initial_lr,
            self._grow,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.verbose = verbose

    def _grow(self, epoch: float) -> float:
        size, length = runtime.workers(), float(self.end_epoch or 1)
        # Counted from the end of the batch, so that an epoch ends at a round number.
        epoch += 1.0 / float(self.steps_per_epoch or 1)
        return (epoch * (size - 1) / length + 1) / size

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Tells the other callbacks the rate, and the log that the warm-up is over."""
        super().on_epoch_end(epoch, logs)
        last = self.end_epoch is not None and epoch == self.end_epoch - 1
        if last and self.verbose > 0 and (runtime.workers() == 1 or runtime.rank() == 0):
            rate = float(_rate_holder(self.model.optimizer).learning_rate)
            _log.info("epoch %d: the learning rate has warmed up to %g", epoch + 1, rate)


def _rate_holder(optimizer: Any) -> Any:
    """The optimizer that has the learning rate: the one inside a LossScaleOptimizer."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    several = getattr(keras.optimizers, "MultiOptimizer", None)
    if several is not None and isinstance(optimizer, several):
        raise ValueError(
            "A MultiOptimizer has no learning rate of its own. Give each of its optimizers a "
            "keras.optimizers.schedules.LearningRateSchedule."
        )
    return optimizer
