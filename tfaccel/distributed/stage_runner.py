"""One stage at work: forward and backward passes of its micro-batches."""

import time
from collections.abc import Sequence
from typing import Any

import keras

from tfaccel.distributed.stages import Stage, differentiable


class StageRunner:
    """Runs the model of a stage, and holds what its backward passes need.

    The results of a micro-batch's forward pass stay in memory until its backward pass.

    Args:
        stage: which it is.
        model: of the stage; the last one is compiled with loss and metrics.
        last: whether it is the last of the pipeline.
    """

    def __init__(self, stage: Stage, model: keras.Model, last: bool) -> None:
        import tensorflow as tf

        self.stage, self.model = stage, model
        self.busy_s = 0.0
        self.loss_sum = 0.0
        self._last = last
        self._sent = differentiable(stage.sent)
        self._received = differentiable(stage.received)
        self._pending: dict[int, tuple[Any, list[Any], list[Any], list[Any]]] = {}
        self._gradients: list[Any] = []
        # Without AutoGraph, which takes long and finds nothing to translate.
        self._step = tf.function(self._run, autograph=False, reduce_retracing=True)

    @property
    def variables(self) -> list[Any]:
        """The Keras variables that the stage trains."""
        return self.model.trainable_variables

    def forward(
        self,
        number: int,
        received: Sequence[Any],
        data: Sequence[Any],
        targets: tuple[Any, Any],
        share: float,
        *,
        training: bool,
    ) -> list[Any]:
        """Runs one micro-batch forward.

        Args:
            number: of the micro-batch.
            received: tensors from the stage before.
            data: the model's inputs that this stage reads.
            targets: (y, sample weights or None), which the last stage needs.
            share: of the batch's samples that are in this micro-batch.
            training: whether it will be run backward.

        Returns:
            What the stage behind it gets.
        """
        import tensorflow as tf

        begin = time.perf_counter()
        scale = tf.constant(share, tf.float32)
        if training:
            with tf.GradientTape() as tape:
                sources = [received[i] for i in self._received]
                tape.watch(sources)
                outputs, loss = self._step([*received, *data], targets, scale, True)
            results = [*(outputs[i] for i in self._sent), loss]
            self._pending[number] = (tape, sources, results, outputs)
        else:
            outputs, loss = self._step([*received, *data], targets, scale, False)
        self.loss_sum += float(loss)
        self.busy_s += time.perf_counter() - begin
        return outputs

    def backward(self, number: int, gradients: Sequence[Any]) -> list[Any]:
        """Runs one micro-batch backward and adds its gradients up.

        Args:
            number: of the micro-batch.
            gradients: of the loss by what this stage sent, floats only.

        Returns:
            The gradients by what it received, floats only.
        """
        import tensorflow as tf

        begin = time.perf_counter()
        tape, sources, results, _ = self._pending.pop(number)
        variables = [variable.value for variable in self.variables]
        found = tape.gradient(
            results, [*sources, *variables], [*gradients, tf.ones_like(results[-1])]
        )
        to_send = [
            tf.zeros_like(source) if gradient is None else tf.convert_to_tensor(gradient)
            for source, gradient in zip(sources, found[: len(sources)], strict=True)
        ]
        own = [
            None if gradient is None else tf.convert_to_tensor(gradient)
            for gradient in found[len(sources) :]
        ]
        self._gradients = [
            _add(total, gradient)
            for total, gradient in zip(self._gradients or [None] * len(own), own, strict=True)
        ]
        self.busy_s += time.perf_counter() - begin
        return to_send

    def take_gradients(self) -> list[Any]:
        """Returns the summed gradients of all micro-batches, and forgets them.

        That of a variable which the loss does not depend on is None.
        """
        gradients, self._gradients = self._gradients, []
        return gradients

    def take_loss(self) -> float:
        """Returns the loss since the last time, each micro-batch counted by its share."""
        loss, self.loss_sum = self.loss_sum, 0.0
        return loss

    def _run(
        self, inputs: list[Any], targets: tuple[Any, Any], scale: Any, training: bool
    ) -> tuple[list[Any], Any]:
        import tensorflow as tf

        outputs = self.model(inputs, training=training)
        if not self._last:
            losses = [tf.cast(loss, tf.float32) for loss in self.model.losses]
            regularization = scale * tf.add_n(losses) if losses else 0.0 * scale
            return keras.tree.flatten(outputs), regularization
        y, sample_weight = targets
        loss = self.model.compute_loss(None, y, outputs, sample_weight, training)
        self.model.compute_metrics(None, y, outputs, sample_weight)
        return [], scale * tf.cast(loss, tf.float32)


def _add(total: Any, gradient: Any) -> Any:
    if total is None or gradient is None:
        return gradient if total is None else total
    return total + gradient
