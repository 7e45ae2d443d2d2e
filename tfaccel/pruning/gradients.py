"""Gradient times weight, on samples: what a loss would change by, to first order."""

from typing import Any

import keras
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BATCH = 32


def gradient_products(
    model: keras.Model,
    data: Any,
    loss: Any,
    samples: int,
    seed: int,
    who: str,
    *,
    training: bool = False,
) -> list[dict[int, Array]]:
    """Returns for each batch, by the id of a variable, gradient of the loss times value.

    Args:
        model: a built model; not changed, batch-norm statistics included.
        data: (x, y): arrays, or x a tree of them.
        loss: `loss(y_true, y_pred)`, a Keras loss or its name; its mean over a batch is taken.
        samples: at most so many are taken, a random choice.
        seed: of the choice.
        who: the beginning of an error, such as "The criterion 'taylor'".
        training: whether the model runs as in training, with the statistics of each batch.

    Raises:
        ValueError: data or loss is missing, or Keras does not run on TensorFlow.
    """
    if loss is None or not isinstance(data, tuple) or len(data) != 2:
        raise ValueError(
            f"{who} needs data=(x, y) and a loss, such as "
            "loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), but got "
            f"data of type {type(data).__name__} and loss={loss!r}."
        )
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"{who} takes gradients with TensorFlow, but Keras runs on "
            f"{keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow."
        )
    import tensorflow as tf

    loss = keras.losses.get(loss)
    labels = np.asarray(data[1])
    chosen = np.sort(np.random.default_rng(seed).permutation(len(labels))[:samples])
    x = keras.tree.map_structure(lambda leaf: np.asarray(leaf)[chosen], data[0])
    labels = labels[chosen]
    # Frozen weights are judged as well; tensors, since a scope without state takes no variables.
    trainable = [v.value + 0 for v in model.trainable_variables]
    others = [tf.identity(v.value) for v in model.non_trainable_variables]
    pairs = [*zip(model.trainable_variables, trainable, strict=True)]
    pairs += zip(model.non_trainable_variables, others, strict=True)
    watched = [(variable, value) for variable, value in pairs if "float" in variable.dtype]
    found = []
    for start in range(0, len(labels), _BATCH):
        part = slice(start, start + _BATCH)
        batch = keras.tree.map_structure(lambda leaf, part=part: leaf[part], x)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([value for _, value in watched])
            outputs, _ = model.stateless_call(trainable, others, batch, training=training)
            mean = tf.reduce_mean(loss(labels[part], outputs))
        gradients = tape.gradient(mean, [value for _, value in watched])
        found.append(
            {
                id(variable): keras.ops.convert_to_numpy(tf.convert_to_tensor(gradient) * value)
                for (variable, value), gradient in zip(watched, gradients, strict=True)
                if gradient is not None
            }
        )
    return found
