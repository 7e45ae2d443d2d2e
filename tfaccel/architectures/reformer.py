"""Reformer: a Transformer for long sequences."""

import math
from typing import Any

import keras
from keras import layers, ops

from tfaccel.architectures.chunked_feed_forward import ChunkedFeedForward
from tfaccel.architectures.lsh_attention import LSHSelfAttention
from tfaccel.architectures.recomputation import call_options
from tfaccel.architectures.reversible import ReversibleBlocks
from tfaccel.core.checks import check_fraction, check_positive, check_type


@keras.saving.register_keras_serializable("tfaccel")
class AxialPositionEmbedding(layers.Layer):
    """Adds learned positions, of two small tables in place of a long one.

    Position t stands in row t // columns and column t % columns of a grid. Its embedding is that of
    its row beside that of its column (Kitaev et al. 2020, section 5, where positions are axial).

    Input and output: [batch, time, features]. A Keras mask goes on to the next layer.

    Args:
        rows: of the grid.
        columns: of the grid; rows * columns positions at most.
        row_features: how many of the features tell the row; the others tell the column. By default
            half of them.
        kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: a number is not above 0.
    """

    def __init__(
        self, rows: int, columns: int, *, row_features: int | None = None, **kwargs: Any
    ) -> None:
        numbers = {"rows": rows, "columns": columns}
        if row_features is not None:
            numbers["row_features"] = row_features
        for name, value in numbers.items():
            check_positive(name, value)
            check_type(name, value, int)
        super().__init__(**kwargs)
        self.rows = rows
        self.columns = columns
        self.row_features = row_features
        self.supports_masking = True

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the two tables.

        Raises:
            ValueError: the sequence has no known length, is longer than the grid, or has fewer
                features than the rows alone take.
        """
        time, features = input_shape[1:]
        if time is None or features is None or time > self.rows * self.columns:
            raise ValueError(
                f"{self.name!r} has {self.rows} x {self.columns} positions, but got inputs "
                f"{input_shape}. Give keras.Input a fixed length of at most as many."
            )
        of_rows = features // 2 if self.row_features is None else self.row_features
        if not 0 < of_rows < features:
            raise ValueError(
                f"row_features must leave some of the {features} features to the columns, but got "
                f"{of_rows}."
            )
        # The spread of a token's embedding in Keras.
        table: dict[str, Any] = {"initializer": keras.initializers.RandomUniform(-0.05, 0.05)}
        self.row_table = self.add_weight(shape=(self.rows, 1, of_rows), name="rows", **table)
        self.column_table = self.add_weight(
            shape=(1, self.columns, features - of_rows), name="columns", **table
        )
        super().build(input_shape)

    def call(self, inputs: Any) -> Any:
        """Returns [batch, time, features]."""
        grid = (self.rows, self.columns)
        tables = [
            ops.broadcast_to(table, (*grid, table.shape[-1]))
            for table in (self.row_table, self.column_table)
        ]
        _, time, features = inputs.shape
        positions = ops.reshape(ops.concatenate(tables, axis=-1), (-1, features))
        return inputs + positions[None, :time]

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the shape of the input."""
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {
            **super().get_config(),
            "rows": self.rows,
            "columns": self.columns,
            "row_features": self.row_features,
        }


@keras.saving.register_keras_serializable("tfaccel")
class NormalizedLayer(layers.Wrapper):
    """Layer normalization, a layer, and dropout: what a residual is made of.

    Args:
        layer: any layer from [batch, time, features] to the same shape.
        dropout: share of its outputs dropped in training.
        seed: of dropout.
        kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Raises:
        ValueError: `dropout` is no fraction.
    """

    def __init__(
        self,
        layer: layers.Layer,
        dropout: float = 0.0,
        *,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_fraction("dropout", dropout)
        super().__init__(layer, **kwargs)
        self.dropout = dropout
        self.seed = seed
        self.supports_masking = True
        self.norm = layers.LayerNormalization(name="norm", dtype=self.dtype_policy)
        self._drop = layers.Dropout(dropout, seed=seed, name="drop", dtype=self.dtype_policy)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Builds the parts."""
        self.norm.build(input_shape)
        super().build(input_shape)

    def call(self, inputs: Any, mask: Any = None, training: bool | None = None) -> Any:
        """Returns [batch, time, features]."""
        y = self.layer(self.norm(inputs), **call_options(self.layer, training, mask))
        return self._drop(y, training=training)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the shape of the input."""
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Returns the layer, serialized, and the arguments."""
        return {**super().get_config(), "dropout": self.dropout, "seed": self.seed}


def Reformer(  # noqa: N802  named as in keras.applications
    vocabulary: int,
    length: int,
    *,
    depth: int = 6,
    width: int = 512,
    heads: int = 8,
    feed_forward: int | None = None,
    bucket_size: int = 64,
    hashes: int = 4,
    chunks: int = 8,
    causal: bool = True,
    classes: int | None = None,
    mask_zero: bool = False,
    dropout: float = 0.0,
    axial_shape: tuple[int, int] | None = None,
    recompute: bool = True,
    seed: int | None = None,
    name: str = "reformer",
) -> keras.Model:
    """Builds a Reformer (Kitaev, Kaiser & Levskaya 2020, "Reformer: The Efficient Transformer").

    Token and axial position embeddings, reversible blocks of LSH attention and chunked feed-forward
    (each behind a layer normalization), normalization of both streams, logits. Sizes default to a
    base Transformer's. Attention takes time * hashes * bucket_size, and training keeps activations
    for no more than one block at a time.

    Args:
        vocabulary: number of different tokens.
        length: tokens in a sequence.
        depth: blocks.
        width: features of a token.
        heads: attention heads, of width / heads features each.
        feed_forward: width of the hidden layer of feed-forward; by default 4 * width.
        bucket_size: see `LSHSelfAttention`. Sequences of up to this length are attended to whole.
        hashes: see `LSHSelfAttention`.
        chunks: of the feed-forward.
        causal: whether a token sees only those before it. The logits at a token are then those of
            the token after it.
        classes: None for logits of tokens; else logits of so many classes for the whole sequence,
            from the mean of its tokens.
        mask_zero: whether token 0 is padding, which nobody attends to and no mean contains.
        dropout: share of features dropped behind each attention and feed-forward, in training.
        axial_shape: (rows, columns) of the positions, at least `length` together; by default about
            square.
        recompute: False keeps all activations in training, for comparison.
        seed: of hashing and dropout.
        name: name of the model.

    Returns:
        A new model from tokens [batch, length] to logits [batch, length, vocabulary] or
        [batch, classes].

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: an argument is out of range, or the heads do not divide the width.
    """
    feed_forward = 4 * width if feed_forward is None else feed_forward
    sizes = {
        "vocabulary": vocabulary,
        "length": length,
        "depth": depth,
        "width": width,
        "heads": heads,
        "feed_forward": feed_forward,
        **({} if classes is None else {"classes": classes}),
    }
    for size_name, size in sizes.items():
        check_positive(size_name, size)
        check_type(size_name, size, int)
    check_fraction("dropout", dropout)
    if width % heads:
        raise ValueError(f"heads must divide the width, but got {heads} heads of {width} features.")
    rows, columns = axial_shape or _square(length)
    if rows * columns < length:
        raise ValueError(
            f"axial_shape must have a place for each of the {length} positions, but got "
            f"{rows} x {columns}."
        )

    def block(number: int) -> tuple[layers.Layer, layers.Layer]:
        seeds = [None if seed is None else seed + 4 * number + place for place in range(3)]
        attention = LSHSelfAttention(
            heads,
            width // heads,
            bucket_size,
            hashes,
            causal=causal,
            seed=seeds[0],
            name="attention",
        )
        feed = ChunkedFeedForward(feed_forward, min(chunks, length), name="feed_forward")
        f, g = (
            NormalizedLayer(layer, dropout, seed=drop_seed, name=f"block_{number}_{layer.name}")
            for layer, drop_seed in ((attention, seeds[1]), (feed, seeds[2]))
        )
        return f, g

    inputs = keras.Input((length,), dtype="int32", name="tokens")
    x = layers.Embedding(vocabulary, width, mask_zero=mask_zero, name="embedding")(inputs)
    x = AxialPositionEmbedding(rows, columns, name="positions")(x)
    if dropout:
        x = layers.Dropout(dropout, seed=seed, name="dropout")(x)
    blocks = [block(number) for number in range(depth)]
    x = ReversibleBlocks(blocks, recompute=recompute, name="blocks")([x, x])
    x = layers.Concatenate(name="streams")(x)
    x = layers.LayerNormalization(name="norm")(x)
    if classes is not None:
        x = layers.GlobalAveragePooling1D(name="average")(x)
    outputs = layers.Dense(vocabulary if classes is None else classes, name="logits")(x)
    return keras.Model(inputs, outputs, name=name)


def _square(length: int) -> tuple[int, int]:
    rows = math.isqrt(length - 1) + 1
    return rows, math.ceil(length / rows)
