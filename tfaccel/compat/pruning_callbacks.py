"""TFMOT's pruning callbacks on Keras 3."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfaccel.compat.handover import is_tf_keras, tfmot_pruning
from tfaccel.core.checks import check_type
from tfaccel.core.transforms import transformed_layers
from tfaccel.pruning.callbacks import UpdatePruning
from tfaccel.pruning.masks import PruningMask


class UpdatePruningStep(UpdatePruning):
    """`tfaccel.pruning.UpdatePruning` by TFMOT's name; needed in every `fit` of a pruned model.

    As with TFMOT, a model without masks is let pass, with a warning. In `fit` of tf_keras, TFMOT's
    callback does the work.

    Raises:
        ValueError: at the start of `fit`, if the model is not built.
    """

    def __init__(self) -> None:
        super().__init__()
        self._theirs: Any = None
        self._idle = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds the masks."""
        if is_tf_keras(self.model):
            self._theirs = tfmot_pruning().UpdatePruningStep()
            self._theirs.set_model(self.model)
            self._theirs.on_train_begin(logs)
            return
        if not self.model.built:
            raise ValueError(
                f"UpdatePruningStep needs a built model, but {self.model.name!r} has no weights to "
                "mask before its first batch. Begin it with keras.Input(shape), or call "
                f"{self.model.name}.build(input_shape) before fit()."
            )
        self._idle = not _masks(self.model)
        if self._idle:
            warnings.warn(
                f"UpdatePruningStep found nothing to prune in {self.model.name!r}. Train what "
                "prune_low_magnitude() returned.",
                stacklevel=2,
            )
            return
        super().on_train_begin(logs)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Decides masks that are due before the coming step."""
        if self._theirs is None and not self._idle:
            super().on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Makes up for turns inside an execution of several steps."""
        if self._theirs is None and not self._idle:
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Leaves zeros in the raw weights for whoever saves them."""
        if self._theirs is not None:
            self._theirs.on_epoch_end(epoch, logs)
        elif not self._idle:
            super().on_epoch_end(epoch, logs)

    # What the callback list of tf_keras asks of each callback: TFMOT's looks at epochs alone.

    def _implements_train_batch_hooks(self) -> bool:
        return False

    def _implements_test_batch_hooks(self) -> bool:
        return False

    def _implements_predict_batch_hooks(self) -> bool:
        return False


class PruningSummaries(keras.callbacks.TensorBoard):
    """TensorBoard with the sparsity and threshold of each mask, at the beginning of each epoch.

    A threshold is the smallest magnitude that is kept.

    Args:
        log_dir: folder for the event files; the masks' lie in `metrics` below it.
        update_freq: as in `keras.callbacks.TensorBoard`, as what follows.

    Raises:
        ImportError: TensorBoard, which writes the event files, is not installed.
        ValueError: `log_dir` is empty.
    """

    def __init__(self, log_dir: str, update_freq: Any = "epoch", **kwargs: Any) -> None:
        check_type("log_dir", log_dir, (str, Path))
        if not str(log_dir):
            raise ValueError("log_dir must name a folder, but got ''.")
        if importlib.util.find_spec("tensorboard") is None:
            raise ImportError(
                "PruningSummaries writes for TensorBoard, which is not installed. "
                "Run pip install tensorboard, or leave the callback out."
            )
        super().__init__(log_dir=str(log_dir), update_freq=update_freq, **kwargs)
        self._metrics: Any = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes sparsity and threshold of each mask at the optimizer's step."""
        import tensorflow as tf

        super().on_epoch_begin(epoch, logs)
        if self._metrics is None:
            self._metrics = tf.summary.create_file_writer(str(Path(self.log_dir) / "metrics"))
        step = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
        with self._metrics.as_default():
            for name, value in _masks(self.model).items():
                tf.summary.scalar(name, value, step=step)
            self._metrics.flush()


def _masks(model: keras.Model) -> dict[str, float]:
    found = {}
    for layer in transformed_layers(model):
        for key, transform in layer.transforms:
            if isinstance(transform, PruningMask):
                mask = keras.ops.convert_to_numpy(transform.state["mask"])
                weight = np.abs(keras.ops.convert_to_numpy(layer.variable(key)))
                found[f"{layer.name}/{key}/sparsity"] = float(1 - mask.mean())
                found[f"{layer.name}/{key}/threshold"] = float(weight[mask].min(initial=np.inf))
    return found
