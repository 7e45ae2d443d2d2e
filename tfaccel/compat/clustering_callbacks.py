"""TFMOT's clustering callback on Keras 3."""

import importlib.util
from pathlib import Path
from typing import Any

import keras

from tfaccel.core.transforms import transformed_layers
from tfaccel.quantization.clustering import NearestCentroids


class ClusteringSummaries(keras.callbacks.TensorBoard):
    """TensorBoard with a histogram of the centroids of each clustered kernel.

    Args:
        log_dir: folder for the event files.
        cluster_update_freq: "epoch", "batch", or after how many batches one is written.

    Raises:
        ImportError: TensorBoard, which writes the event files, is not installed.
        ValueError: `log_dir` is empty or no string.
    """

    def __init__(
        self, log_dir: str = "logs", cluster_update_freq: Any = "epoch", **kwargs: Any
    ) -> None:
        if not isinstance(log_dir, (str, Path)) or not str(log_dir):
            raise ValueError(f"log_dir must name a folder, but got {log_dir!r}.")
        if importlib.util.find_spec("tensorboard") is None:
            raise ImportError(
                "ClusteringSummaries writes for TensorBoard, which is not installed. "
                "Run pip install tensorboard, or leave the callback out."
            )
        super().__init__(log_dir=str(log_dir), **kwargs)
        self.cluster_update_freq = 1 if cluster_update_freq == "batch" else cluster_update_freq
        self._centroids: Any = None
        self._batches = 0

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes after every so many batches."""
        super().on_train_batch_end(batch, logs)
        self._batches += 1
        often = self.cluster_update_freq != "epoch"
        if often and self._batches % self.cluster_update_freq == 0:
            self._write_centroids()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes after an epoch."""
        super().on_epoch_end(epoch, logs)
        if self.cluster_update_freq == "epoch":
            self._write_centroids()

    def _write_centroids(self) -> None:
        import tensorflow as tf

        if self._centroids is None:
            self._centroids = tf.summary.create_file_writer(str(Path(self.log_dir) / "clustering"))
        with self._centroids.as_default():
            for layer in transformed_layers(self.model):
                for key, transform in layer.transforms:
                    if isinstance(transform, NearestCentroids):
                        values = keras.ops.convert_to_numpy(transform.state["centroids"])
                        name = f"clustering/{layer.name}/{key}"
                        tf.summary.histogram(name, values, step=self._batches)
            self._centroids.flush()
