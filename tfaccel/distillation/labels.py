"""Labels in the forms that `fit` takes them."""

from typing import Any

import keras


def class_ids(labels: Any, logits: Any = None) -> Any:
    """Returns the class of each sample, int32.

    Args:
        labels: ids [batch, ...], ids with a last axis of size 1, or one-hot [batch, ..., classes].
        logits: [batch, ..., classes], of the same samples; without them ids are [batch].

    Raises:
        ValueError: the labels have another number of dimensions or of classes.
    """
    ops = keras.ops
    labels = ops.convert_to_tensor(labels)
    rank = 1 if logits is None else len(logits.shape) - 1
    if len(labels.shape) == rank:
        return ops.cast(labels, "int32")
    if len(labels.shape) == rank + 1:
        last = labels.shape[-1]
        if last == 1:
            return ops.cast(ops.squeeze(labels, axis=-1), "int32")
        if logits is None or last == logits.shape[-1]:
            return ops.cast(ops.argmax(labels, axis=-1), "int32")
    wanted = "[batch] or [batch, classes]" if logits is None else f"the ids of {logits.shape}"
    raise ValueError(
        f"Labels must be class ids or one-hot, {wanted}, but have the shape {tuple(labels.shape)}."
    )
