"""Callbacks that stop, slow down or save training, and decide alike on all ranks."""

from typing import Any

import keras
import numpy as np

from tfaccel.core.checks import check_in
from tfaccel.distributed import runtime
from tfaccel.distributed.collectives import allreduce, barrier
from tfaccel.distributed.runtime import Max, Sum


class EarlyStopping(keras.callbacks.EarlyStopping):
    """`keras.callbacks.EarlyStopping` that watches the mean over all ranks, so that all stop.

    Otherwise a rank that stops alone leaves the others waiting for it. Takes Keras's arguments.
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Decides by the mean of the watched metric."""
        super().on_epoch_end(epoch, averaged(self.monitor, logs))


class ReduceLROnPlateau(keras.callbacks.ReduceLROnPlateau):
    """`keras.callbacks.ReduceLROnPlateau` that watches the mean over all ranks.

    Takes Keras's arguments.
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Decides by the mean of the watched metric."""
        means = averaged(self.monitor, logs)
        super().on_epoch_end(epoch, means)
        if logs is not None:
            logs.update({name: means[name] for name in means if name not in logs})


class ModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """`keras.callbacks.ModelCheckpoint` that writes on rank 0 and decides by the mean of all.

    With an integer `save_freq` it is rank 0's own metrics that decide which model is best. When
    `fit` returns, the files are there for every rank. Takes Keras's arguments.
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves, if it is time."""
        means = averaged(self.monitor, logs) if self.save_freq == "epoch" else logs
        if _writes():
            super().on_epoch_end(epoch, means)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves, if it is time."""
        if _writes():
            super().on_train_batch_end(batch, logs)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Waits until the last file is written."""
        super().on_train_end(logs)
        barrier()


class StopTogetherCallback(keras.callbacks.Callback):
    """Stops training on all ranks as soon as it is stopped on one.

    Put it last, after callbacks that may stop one rank alone: `TerminateOnNaN`, or your own.

    Args:
        every: "batch" asks after each batch, for one small message; "epoch" after each epoch, for
            callbacks that stop nowhere else.
    """

    def __init__(self, every: str = "batch") -> None:
        super().__init__()
        check_in("every", every, ("batch", "epoch"))
        self.every = every

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Asks the others."""
        if self.every == "batch":
            self._agree()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Asks the others."""
        self._agree()

    def _agree(self) -> None:
        if runtime.workers() == 1:
            return
        own = np.array([bool(self.model.stop_training)], np.int32)
        stopped = int(allreduce(own, op=Max, name="tfaccel_stop")[0])
        self.model.stop_training = bool(stopped)


def averaged(name: str, logs: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the metrics of an epoch with one of them replaced by its mean over all ranks.

    Args:
        name: of the metric.
        logs: metrics of this rank.

    Returns:
        A dictionary of its own.

    Raises:
        ValueError: on all ranks, if some of them do not have the metric.
    """
    logs = dict(logs or {})
    count = runtime.workers()
    if count == 1:
        return logs
    own = logs.get(name)
    values = np.array([0.0 if own is None else float(own), own is not None], np.float64)
    total, owners = np.asarray(allreduce(values, op=Sum, name="tfaccel_monitor")).tolist()
    if 0 < owners < count:
        raise ValueError(
            f"The metric {name!r} is measured on {int(owners)} of {count} ranks. Give validation "
            "data to all of them, or to none."
        )
    if owners:
        logs[name] = total / count
    return logs


def _writes() -> bool:
    return runtime.workers() == 1 or runtime.rank() == 0
