"""Batches of samples with what a teacher said about them, epoch after epoch."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from tfaccel.distillation.views import Augment, augment_batch, view_seeds


def stored_batches(
    arrays: dict[str, Any],
    outputs: Callable[[Any, int], Any],
    order: "EpochOrder",
    *,
    augment: Augment | None,
    seed: int,
    views: int,
    batch_size: int | None,
) -> Any:
    """Returns a `tf.data.Dataset` of ({"inputs", "sample_index", "teacher_outputs"}, y, weight).

    Args:
        arrays: "inputs", and "y" and "sample_weight" if there are any, all samples of each.
        outputs: `outputs(indices, view)` gives what the teacher said.
        order: which samples each batch has.
        augment: makes a version of one sample.
        seed: of the versions.
        views: how many there are.
        batch_size: of every batch; None if they differ.
    """
    import tensorflow as tf

    def gather(indices: Any) -> dict[str, Any]:
        return dict(keras.tree.map_structure(lambda array: np.asarray(array[indices]), arrays))

    def batches() -> Iterator[dict[str, Any]]:
        for epoch, indices in order:
            view = epoch % views
            yield {
                **gather(indices),
                "sample_index": indices.astype("int32"),
                "teacher_outputs": outputs(indices, view),
                "seeds": view_seeds(seed, indices, view),
            }

    def arrange(batch: dict[str, Any]) -> Any:
        named = {key: batch[key] for key in ("inputs", "sample_index", "teacher_outputs")}
        if augment is not None:
            named["inputs"] = augment_batch(augment, batch["inputs"], batch["seeds"])
        if "sample_weight" in batch:
            return named, batch.get("y"), batch["sample_weight"]
        return (named, batch["y"]) if "y" in batch else named

    first = {
        **arrays,
        "sample_index": np.zeros(1, "int32"),
        "teacher_outputs": outputs([0], 0),
        "seeds": np.zeros((1, 2), "int32"),
    }
    signature = keras.tree.map_structure(
        lambda array: tf.TensorSpec((batch_size, *array.shape[1:]), array.dtype), first
    )
    made = tf.data.Dataset.from_generator(batches, output_signature=signature)
    made = made.apply(tf.data.experimental.assert_cardinality(order.batches))
    return made.map(arrange, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


class EpochOrder:
    """The samples of each batch, epoch after epoch; to iterate once more is the next epoch.

    Keras makes iterators that it never draws from, so an epoch counts when its last batch is drawn.
    """

    def __init__(
        self, samples: int, batch_size: int, batches: int, seed: int | None, first_epoch: int
    ) -> None:
        self._samples, self._batch_size, self.batches = samples, batch_size, batches
        self._seed, self._epoch = seed, first_epoch

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        epoch = self._epoch
        order = np.arange(self._samples)
        if self._seed is not None:
            np.random.default_rng((self._seed, epoch)).shuffle(order)
        for batch in range(self.batches):
            if batch == self.batches - 1:
                self._epoch = epoch + 1
            yield epoch, order[batch * self._batch_size : (batch + 1) * self._batch_size]


def as_arrays(name: str, value: Any) -> Any:
    """Returns a structure of arrays that can be indexed, tensors as numpy arrays.

    Raises:
        TypeError: a leaf is no array.
    """

    def as_array(leaf: Any) -> Any:
        if keras.ops.is_tensor(leaf):
            return keras.ops.convert_to_numpy(leaf)
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype") and hasattr(leaf, "__len__")):
            raise TypeError(
                f"{name} must be an array or a structure of arrays, but holds {leaf!r} "
                f"({type(leaf).__name__}). Use numpy.asarray({name})."
            )
        return leaf

    return keras.tree.map_structure(as_array, value)
