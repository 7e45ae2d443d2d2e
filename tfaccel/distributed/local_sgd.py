"""Local SGD: ranks train on their own and average their weights now and then."""

from typing import Any

import keras

from tfaccel.core.checks import check_type
from tfaccel.distributed import runtime
from tfaccel.distributed.objects import broadcast_variables
from tfaccel.distributed.optimizer import exchanges_of
from tfaccel.distributed.reduction import reduce_tensors
from tfaccel.distributed.runtime import Average

_NAME = "tfaccel_local_sgd"


class LocalSGD(keras.callbacks.Callback):
    """Averages the weights of all ranks every so many batches (Stich 2019; Lin et al. 2020).

    Between two averages nothing is sent: H batches cost one exchange of the weights instead of H of
    the gradients. Give it to `fit` with an optimizer that is not distributed; the training step may
    be compiled by XLA. Weights begin as rank 0's, and are averaged before each validation and at
    the end of training.

    Args:
        every: batches between two averages, H.
        average_optimizer: whether the optimizer's floating-point state (momenta) is averaged too;
            otherwise each rank keeps its own.
        post_local_from: batches that are averaged one by one first: "post-local SGD" (Lin et al.
            2020) begins when the learning rate falls.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    def __init__(
        self, every: int = 8, average_optimizer: bool = False, post_local_from: int = 0
    ) -> None:
        super().__init__()
        for name, value, least in (("every", every, 1), ("post_local_from", post_local_from, 0)):
            check_type(name, value, int)
            if isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an int from {least}, but got {value!r}.")
        check_type("average_optimizer", average_optimizer, bool)
        self.every = every
        self.average_optimizer = average_optimizer
        self.post_local_from = post_local_from
        self._batches = 0  # of this and earlier epochs
        self._before_epoch = 0
        self._averaged_at = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Checks the model and gives all ranks rank 0's weights.

        Raises:
            ValueError: the optimizer is distributed, the model is not built, or the ranks have
                different numbers of batches.
        """
        if exchanges_of(self.model.optimizer):
            raise ValueError(
                "LocalSGD averages weights, but the optimizer exchanges gradients already. Give "
                "compile() the optimizer without DistributedOptimizer."
            )
        if not self.model.built:
            raise ValueError(
                f"LocalSGD needs a built model, but {self.model.name!r} has no weights yet. Call "
                f"{self.model.name}.build(input_shape)."
            )
        self._batches = self._before_epoch = self._averaged_at = 0
        if runtime.workers() == 1:
            return
        steps = self.params.get("steps")
        runtime.require_agreement("the batches of an epoch", [f"{steps} batches"])
        optimizer = self.model.optimizer
        if not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        broadcast_variables([*self.model.weights, *optimizer.variables])

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Averages if it is time."""
        # With steps_per_execution it is called after several batches, with the last one's number.
        self._batches = self._before_epoch + batch + 1
        every = 1 if self._batches <= self.post_local_from else self.every
        if self._batches - self._averaged_at >= every:
            self._average()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Counts the epoch's batches."""
        self._before_epoch = self._batches

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Averages, so that all ranks validate the same model."""
        self._average()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Averages a last time."""
        self._average()

    def _average(self) -> None:
        if self._averaged_at == self._batches or runtime.workers() == 1:
            return
        self._averaged_at = self._batches
        variables = list(self.model.weights)
        if self.average_optimizer:
            variables += self.model.optimizer.variables
        variables = [v for v in variables if keras.backend.is_float_dtype(v.dtype)]
        means = reduce_tensors([v.value for v in variables], Average, _NAME)
        for variable, mean in zip(variables, means, strict=True):
            variable.assign(mean)
