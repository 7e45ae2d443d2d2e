"""What an elastic job keeps of its training: committed, restored, and handed to new workers."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from tfaccel.core.checks import check_type
from tfaccel.distributed import runtime
from tfaccel.distributed.objects import broadcast_object, broadcast_variables
from tfaccel.distributed.optimizer import exchanges_of


class State:
    """State that `elastic.run` commits, restores and hands on. Others are made of it.

    With the methods that Horovod's elastic driver calls.
    """

    def __init__(self) -> None:
        self._messages: list[tuple[float, int]] = []
        self._last_update = 0.0
        self._reset_callbacks: list[Callable[[], None]] = []

    def register_reset_callbacks(self, callbacks: Sequence[Callable[[], None]]) -> None:
        """Has functions called after the workers have changed, before the state is handed on.

        Args:
            callbacks: functions without arguments, such as one that sets the learning rate.
        """
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """Called by the driver after the workers have changed."""
        self._messages = []
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def on_hosts_updated(self, timestamp: float, update_res: int) -> None:
        """Called by the driver, from a thread of its own, when workers can come or have to go."""
        self._messages.append((timestamp, int(update_res)))

    def commit(self) -> None:
        """Keeps the state as it is now, to be restored after a failure; all ranks call it.

        Raises:
            HostsUpdatedInterrupt: workers can come or have to go. `elastic.run` catches it.
        """
        self.save()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Raises Horovod's HostsUpdatedInterrupt, on all ranks, if any was told of a change."""
        hvd = runtime.horovod()
        news = [message for message in self._messages if message[0] > self._last_update]
        latest = max([timestamp for timestamp, _ in news], default=self._last_update)
        kinds = 0
        for _, kind in news:
            kinds |= kind
        if hvd is not None:
            # The driver tells one rank; which, the others need not know.
            own = np.array([latest, kinds], np.float64)
            agreed = hvd.allreduce(own, op=hvd.Max, name="tfaccel_hosts").numpy()
            latest, kinds = float(agreed[0]), int(agreed[1])
        before, self._last_update = self._last_update, latest
        if latest > before:
            from horovod.common.exceptions import HostsUpdatedInterrupt
            from horovod.runner.elastic.worker import HostUpdateResult

            raise HostsUpdatedInterrupt(kinds == HostUpdateResult.removed)

    def save(self) -> None:
        """Keeps a copy of the state on this rank."""

    def restore(self) -> None:
        """Goes back to the copy."""

    def sync(self) -> None:
        """Gives every rank the state of rank 0, which has been there longest."""

    def reset(self) -> None:
        """Forgets what was made for the old workers."""


class ObjectState(State):
    """State of Python objects, each an attribute of its own.

    Args:
        kwargs: the objects by name, such as `epoch=0`; what they are may change, but not which.

    >>> state = ObjectState(epoch=0)
    >>> state.save()
    >>> state.epoch = 5
    >>> state.restore()
    >>> state.epoch
    0
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self._names = list(kwargs)
        for name, value in kwargs.items():
            setattr(self, name, value)
        self._saved = self._copies()

    def _copies(self) -> dict[str, Any]:
        return {name: copy.deepcopy(getattr(self, name)) for name in self._names}

    def save(self) -> None:
        """Keeps copies of the objects."""
        self._saved = self._copies()

    def restore(self) -> None:
        """Sets the attributes to copies of what was kept."""
        for name, value in copy.deepcopy(self._saved).items():
            setattr(self, name, value)

    def sync(self) -> None:
        """Takes the objects that rank 0 has kept."""
        if self._names:
            self._saved = broadcast_object(self._saved, name="tfaccel_state")
            self.restore()


class TensorFlowState(ObjectState):
    """State of variables, and of objects besides.

    Args:
        variables: Keras or TensorFlow variables.
        kwargs: objects by name, as for `ObjectState`.
    """

    def __init__(self, variables: Sequence[Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.variables = list(variables)
        self._values = self._read()

    def _read(self) -> list[np.ndarray[Any, Any]]:
        # Copies: on a CPU an array may be a view of the variable itself.
        return [np.array(keras.ops.convert_to_numpy(v)) for v in self._kept()]

    def _kept(self) -> list[Any]:
        return self.variables

    def _shared(self) -> list[Any]:
        """The variables that new workers get from rank 0."""
        return self._kept()

    def save(self) -> None:
        """Keeps copies of the values and of the objects."""
        self._values = self._read()
        super().save()

    def restore(self) -> None:
        """Sets variables and attributes to what was kept."""
        for variable, value in zip(self._kept(), self._values, strict=True):
            variable.assign(value)
        super().restore()

    def sync(self) -> None:
        """Takes the values and the objects of rank 0."""
        broadcast_variables(self._shared(), root_rank=0)
        self._values = self._read()
        super().sync()


class TensorFlowKerasState(TensorFlowState):
    """State of a Keras model and its optimizer, and of objects besides.

    The states of random-seed generators, and what a compressor of gradients holds back, are kept
    and restored, but each rank has its own.

    Args:
        model: a built Keras model.
        optimizer: its optimizer, if the model is not compiled with it.
        backend: accepted for Horovod's sake.
        kwargs: objects by name, such as `epoch=0, batch=0`.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: the model has no weights yet, or no optimizer.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer | None = None,
        backend: None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        check_type("model", model, keras.Model)
        optimizer = optimizer or getattr(model, "optimizer", None)
        if not model.built or not model.weights:
            raise ValueError(
                f"The state of {model.name!r} cannot be kept: it has no weights yet. Call "
                f"{model.name}.build(input_shape) first."
            )
        if optimizer is None:
            raise ValueError(
                f"The state of {model.name!r} needs its optimizer. Compile the model first, or "
                "give optimizer=."
            )
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        self.model = model
        self.optimizer = optimizer
        self._held_back: list[Any] = []
        super().__init__([], **kwargs)

    def _kept(self) -> list[Any]:
        metrics = {id(variable) for variable in self.model.metrics_variables}
        own = [v for v in self.model.variables if id(v) not in metrics]
        return [*own, *self.optimizer.variables]

    def _shared(self) -> list[Any]:
        return [*self.model.weights, *self.optimizer.variables]

    def _compressors(self) -> list[Any]:
        found = [exchange.compressor for exchange in exchanges_of(self.optimizer)]
        return [compressor for compressor in found if hasattr(compressor, "get_state")]

    def save(self) -> None:
        """Keeps copies of weights, optimizer, objects and what compressors hold back."""
        self._held_back = [copy.deepcopy(c.get_state()) for c in self._compressors()]
        super().save()

    def restore(self) -> None:
        """Sets all of it to what was kept."""
        super().restore()
        for compressor, held in zip(self._compressors(), self._held_back, strict=False):
            if held:
                compressor.set_state(held)

    def reset(self) -> None:
        """Has Keras trace its steps anew: they hold the number of workers."""
        for step in ("train_function", "test_function", "predict_function"):
            setattr(self.model, step, None)


class KerasState(TensorFlowKerasState):
    """`TensorFlowKerasState` under the name that `horovod.keras.elastic` gives it."""
