"""When learning ends: ranges that stay, and batch norm that computes as it is deployed."""

from collections.abc import Callable
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.checks import check_type
from tfaccel.core.graph import Graph, map_models
from tfaccel.core.transforms import TransformedLayer
from tfaccel.quantization.fake_quantization import FakeQuantize
from tfaccel.quantization.learned_ranges import LearnedStepWeights
from tfaccel.rewriting.freezable_norm import FreezableBatchNormalization


class FreezeRanges(keras.callbacks.Callback):
    """Holds ranges, and then or before them batch norm, from a step of training on.

    A quantized model has ranges that do not move and batch norm by its moving statistics. Training
    that ends so meets what is deployed; holding batch norm early ends the noise of its batches
    (Krishnamoorthi 2018, section 3.2.2). Weights, gamma and beta train on. What is held stays so
    when the model is saved, loaded and trained on.

    Args:
        step: update of the optimizer after which ranges, and trained steps of weights, are held; of
            several that are executed at once (`steps_per_execution`), the end of the execution.
        batch_norm_step: likewise for batch norm; by default with the ranges.

    Raises:
        TypeError: a step is no int.
        ValueError: a step is below 0, or training begins on a model without ranges.
    """

    def __init__(self, step: int, batch_norm_step: int | None = None) -> None:
        super().__init__()
        self.step = _checked("step", step)
        chosen = step if batch_norm_step is None else batch_norm_step
        self.batch_norm_step = _checked("batch_norm_step", chosen)
        self._waiting: list[tuple[int, Callable[[], None]]] = []
        self._pause = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Looks for what there is to hold."""
        self._waiting, self._pause = [], 0
        distills = isinstance(self.model, keras.distillation.Distiller)
        trained = self.model.student if distills else self.model
        for layer in keras_private.sublayers(trained):
            if isinstance(layer, FakeQuantize):
                self._waiting.append((self.step, layer.hold_range))
            elif isinstance(layer, TransformedLayer):
                learned = [t for _, t in layer.transforms if isinstance(t, LearnedStepWeights)]
                self._waiting += [(self.step, transform.hold) for transform in learned]
            elif isinstance(layer, FreezableBatchNormalization):
                self._waiting.append((self.batch_norm_step, layer.freeze_statistics))
        if not self._waiting:
            raise ValueError(
                f"FreezeRanges found no ranges in {trained.name!r}. Make the model with "
                "tfaccel.quantization.quantize_aware(model) first."
            )
        self._hold_due()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Holds what is due."""
        if self._pause:
            self._pause -= 1
        elif self._waiting:
            self._hold_due()

    def _hold_due(self) -> None:
        if hasattr(self.model, "jax_state_sync"):  # the state lives in the loop between steps
            self.model.jax_state_sync()
        steps = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
        for due, hold in self._waiting:
            if steps >= due:
                hold()
        self._waiting = [(due, hold) for due, hold in self._waiting if steps < due]
        if self._waiting:
            # Reading the step count waits for the device, so it is left until a step may be due.
            missing = min(due for due, _ in self._waiting) - steps
            self._pause = (missing - 1) // self.model.steps_per_execution


def _checked(name: str, step: int) -> int:
    check_type(name, step, int)
    if step < 0:
        raise ValueError(f"{name} must not be below 0, but got {step!r}.")
    return step


def freeze_ranges(model: keras.Model) -> keras.Model:
    """Returns a quantization-aware model as it is deployed: ranges are fixed, batch norm is plain.

    Raises:
        ValueError: a range was never learnt.
    """

    def edit(graph: Graph) -> None:
        for layer in graph.layers():
            if isinstance(layer, FakeQuantize):
                graph.replace_layer(layer, layer.frozen())
            elif isinstance(layer, FreezableBatchNormalization):
                graph.replace_layer(layer, layer.strip_layer())

    return map_models(model, edit)
