"""What attention is made of, as layers of their own, so that each part can be looked at."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import layers, ops

from tfaccel.core.checks import check_fraction, check_positive, check_type

Shape = tuple[int | None, ...]

# Small beside every score of attention, and finite in float16.
_NEVER = -1e4


@keras.saving.register_keras_serializable("tfaccel")
class TokenMask(layers.Layer):
    """Tells tokens from padding: 1 where the token is not 0.

    Input: integers [batch, length]. Output: [batch, length, 1], in the layer's compute dtype.
    """

    def call(self, inputs: Any) -> Any:
        """Returns [batch, length, 1]."""
        return ops.cast(ops.not_equal(inputs, 0), self.compute_dtype)[..., None]

    def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
        """Returns shape and dtype of the output, which is float though the input is not."""
        return keras.KerasTensor((*inputs.shape, 1), dtype=self.compute_dtype)


@keras.saving.register_keras_serializable("tfaccel")
class PositionEmbedding(layers.Layer):
    """Adds a learned vector for each position (Devlin et al. 2019).

    Input and output: [batch, length, features].

    Args:
        initializer: of the table.
        kwargs: `name`, `dtype` and `trainable` of a Keras layer.
    """

    def __init__(self, initializer: Any = "uniform", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.initializer = keras.initializers.get(initializer)

    def build(self, input_shape: Shape) -> None:
        """Makes the table, [length, features].

        Raises:
            ValueError: the length is not known.
        """
        if None in input_shape[1:]:
            raise ValueError(
                f"{self.name!r} has a vector for each position, but got inputs {input_shape}. "
                "Give keras.Input a fixed length."
            )
        self.table = self.add_weight(
            shape=tuple(input_shape[1:]), initializer=self.initializer, name="positions"
        )

    def call(self, inputs: Any) -> Any:
        """Returns [batch, length, features]."""
        return inputs + ops.cast(self.table, inputs.dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns the shape of the input."""
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        initializer = keras.initializers.serialize(self.initializer)
        return {**super().get_config(), "initializer": initializer}


@keras.saving.register_keras_serializable("tfaccel")
class AttentionScores(layers.Layer):
    """How much each token has to do with each other, before any softmax.

    scores = query · keyᵀ / √(features of a head)  (Vaswani et al. 2017, eq. 1), and 0 where one of
    the two tokens is padding.

    Inputs: queries and keys, [batch, length, features] each, and a mask [batch, length, 1] as
    `TokenMask` makes it. Output: [batch, heads, length, length], queries before keys.

    Args:
        heads: attention heads, which share the features evenly.
        kwargs: `name` and `dtype` of a Keras layer.

    Raises:
        TypeError: `heads` is no integer.
        ValueError: `heads` is not above 0 or does not divide the features.
    """

    def __init__(self, heads: int, **kwargs: Any) -> None:
        check_positive("heads", heads)
        check_type("heads", heads, int)
        super().__init__(**kwargs)
        self.heads = heads

    def build(self, input_shape: Sequence[Shape]) -> None:
        """Checks that the heads share the features evenly."""
        features = input_shape[0][-1]
        if features is None or features % self.heads:
            raise ValueError(
                f"{self.heads} heads do not share {features} features evenly. Take a number of "
                "heads that divides them."
            )

    def call(self, inputs: Sequence[Any]) -> Any:
        """Returns [batch, heads, length, length]."""
        query, key, mask = inputs
        query, key = split_heads(query, self.heads), split_heads(key, self.heads)
        query = query / math.sqrt(query.shape[-1])  # before the product: float16 ends at 65504
        scores = ops.matmul(query, ops.transpose(key, (0, 1, 3, 2)))
        both = mask * ops.transpose(mask, (0, 2, 1))
        return scores * both[:, None]

    def compute_output_shape(self, input_shape: Sequence[Shape]) -> Shape:
        """Returns [batch, heads, length, length]."""
        (batch, queries, _), (_, keys, _) = input_shape[:2]
        return (batch, self.heads, queries, keys)

    def count_macs(self, input_shapes: Sequence[tuple[int, ...]]) -> int:
        """Returns the multiply-accumulates for inputs of these shapes."""
        batch, length, features = input_shapes[0]
        return batch * length * input_shapes[1][1] * features

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {**super().get_config(), "heads": self.heads}


@keras.saving.register_keras_serializable("tfaccel")
class AttentionMix(layers.Layer):
    """Mixes the values of all tokens by the softmax of attention scores (Vaswani 2017, eq. 1).

    Inputs: scores [batch, heads, length, length], values [batch, length, features], and a mask
    [batch, length, 1]: nobody attends to what is 0 there. Output: [batch, length, features]. The
    softmax is computed in float32.

    Args:
        dropout: share of the attention dropped in training, as in BERT.
        seed: of dropout.
        kwargs: `name` and `dtype` of a Keras layer.

    Raises:
        ValueError: `dropout` is no fraction.
    """

    def __init__(self, dropout: float = 0.0, *, seed: int | None = None, **kwargs: Any) -> None:
        check_fraction("dropout", dropout)
        super().__init__(**kwargs)
        self.dropout = dropout
        self.seed = seed
        self._drop = layers.Dropout(dropout, seed=seed, name="drop", dtype=self.dtype_policy)

    def build(self, input_shape: Sequence[Shape]) -> None:
        """Builds nothing: there are no weights."""

    def call(self, inputs: Sequence[Any], training: bool | None = None) -> Any:
        """Returns [batch, length, features]."""
        scores, value, mask = inputs
        mask = ops.cast(ops.transpose(mask, (0, 2, 1))[:, None], "float32")
        probabilities = ops.softmax(ops.cast(scores, "float32") + (1.0 - mask) * _NEVER)
        probabilities = self._drop(ops.cast(probabilities, value.dtype), training=training)
        mixed = ops.matmul(probabilities, split_heads(value, scores.shape[1]))
        return ops.reshape(ops.transpose(mixed, (0, 2, 1, 3)), (-1, *value.shape[1:]))

    def compute_output_shape(self, input_shape: Sequence[Shape]) -> Shape:
        """Returns the shape of the values."""
        return tuple(input_shape[1])

    def count_macs(self, input_shapes: Sequence[tuple[int, ...]]) -> int:
        """Returns the multiply-accumulates for inputs of these shapes."""
        batch, _, queries, keys = input_shapes[0]
        return batch * queries * keys * input_shapes[1][-1]

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {**super().get_config(), "dropout": self.dropout, "seed": self.seed}


@keras.saving.register_keras_serializable("tfaccel")
class FirstToken(layers.Layer):
    """Takes the first token, which stands for its whole sequence in BERT.

    Input: [batch, length, features]. Output: [batch, features].
    """

    def call(self, inputs: Any) -> Any:
        """Returns [batch, features]."""
        return inputs[:, 0]

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns [batch, features]."""
        return (input_shape[0], *input_shape[2:])


def split_heads(x: Any, heads: int) -> Any:
    """Returns [batch, length, features] as [batch, heads, length, features / heads]."""
    _, length, features = x.shape
    x = ops.reshape(x, (-1, length, heads, features // heads))
    return ops.transpose(x, (0, 2, 1, 3))
