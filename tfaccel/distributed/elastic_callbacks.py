"""Callbacks that keep the state of an elastic job up to date in `fit`.

In whatever order they are given: what a batch changes is noted at its end and committed before the
next begins.
"""

from typing import Any

import keras

from tfaccel.core.checks import check_positive
from tfaccel.distributed.elastic_states import State


class CommitStateCallback(keras.callbacks.Callback):
    """Commits the state every so many batches and after each epoch.

    Args:
        state: what `elastic.run` was given.
        batches_per_commit: how many; fewer lose less work when a worker dies, more cost less time.
    """

    def __init__(self, state: State, batches_per_commit: int = 1) -> None:
        super().__init__()
        check_positive("batches_per_commit", batches_per_commit)
        self.state = state
        self.batches_per_commit = batches_per_commit
        self._finished = 0
        self._due = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Counts anew, as every rank does after a change."""
        self._finished, self._due = 0, False

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Counts."""
        self._finished += 1
        self._due = self._finished % self.batches_per_commit == 0

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """An epoch is always committed."""
        self._due = True

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Commits, if it is time."""
        self._commit()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Commits the epoch before."""
        self._commit()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Commits the last epoch."""
        self._commit()

    def _commit(self) -> None:
        if self._due:
            self._due = False
            self.state.commit()


class UpdateBatchStateCallback(keras.callbacks.Callback):
    """Keeps `state.batch` at the number of batches that the epoch has finished; 0 between epochs.

    After a change of workers the epoch goes on where it was: give `fit` the rest of its data, as
    `dataset.skip(state.batch)` does.

    Args:
        state: what `elastic.run` was given, with a `batch`.
    """

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state: Any = state
        self._before = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Notes how much of the first epoch was done before."""
        self._before = self.state.batch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Counts."""
        self.state.batch = self._before + batch + 1

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Begins anew."""
        self._before = self.state.batch = 0


class UpdateEpochStateCallback(keras.callbacks.Callback):
    """Keeps `state.epoch` at the number of epochs finished, those before a change included.

    Args:
        state: what `elastic.run` was given, with an `epoch`.
    """

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state: Any = state
        self._before, self._finished = 0, 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Notes how many epochs were finished before."""
        self._before, self._finished = self.state.epoch, 0

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Counts, whatever number Keras gives the epoch."""
        self._finished += 1
        self.state.epoch = self._before + self._finished
