"""Attention among those positions only that hash alike: LSH attention."""

from math import ceil, prod
from typing import Any

import keras
from keras import layers, ops

from tfaccel.architectures.hashing import (
    bucket_factors,
    hash_columns,
    hash_vectors,
    restore_rows,
    sort_by_bucket,
    sort_rows,
    take_rows,
)
from tfaccel.architectures.recomputation import decide
from tfaccel.core.checks import check_fraction, check_positive, check_type


@keras.saving.register_keras_serializable("tfaccel")
class LSHSelfAttention(layers.Layer):
    """Locality-sensitive-hashing self-attention (Kitaev, Kaiser & Levskaya 2020, section 2).

    Queries and keys are one projection: k_j = q_j / |q_j|, and the logit of i and j is q_i . k_j.
    Each of `hashes` rounds hashes the queries by a random rotation, sorts the positions by bucket
    and position, and cuts them into chunks of `bucket_size`. A position attends to those of its own
    bucket in its own chunk and in `chunks_before` chunks before it (and `chunks_after` after it).
    It attends to itself only when no round gives it another one; the paper's logit of -1e5 for
    itself has that effect. Rounds are put together by their log-sum-exp, and a position that
    several rounds find counts once (appendix A), so that the result is the softmax over the union
    of what all rounds find.

    Time and memory grow with time * hashes * bucket_size, not with the square of time.

    In training the rotations are drawn anew at each call. In inference they are fixed, and saved
    with the layer, so that a saved or exported model gives the same outputs each time. Sequences
    are padded to whole chunks inside. What a Keras mask leaves out is not attended to, and takes
    no room in the chunks.

    Input and output: [batch, time, features].

    Args:
        heads: attention heads.
        key_dim: size of queries and values of one head.
        bucket_size: length of a chunk, twice the average bucket: what a bucket may grow to and
            still be seen whole by its last position.
        hashes: rounds of hashing.
        causal: whether a position attends only to those before it.
        buckets: their number, 1 or even, or a pair of such numbers, whose product is meant: two
            hashes are cheaper than one into many buckets. By default 1 for sequences of up to
            `bucket_size`, else 2 * time / bucket_size, as a pair from 128 up.
        chunks_before: chunks before its own that a position looks into; 1 in the paper.
        chunks_after: chunks after its own, likewise; 0 in the paper. For attention that is not
            causal, 1 shows a position all of its bucket that is cut in two.
        correct_duplicates: whether a position that n rounds find is weighed by 1 / n in each
            (N_ij of appendix A). Costs hashes ** 2 comparisons for each pair that is looked at;
            without it, a position counts as often as it is found.
        dropout: share of the attention weights dropped in training.
        use_bias: whether the projections have biases.
        seed: of the rotations and of dropout.
        kwargs: `name`, `dtype` and `trainable` of a Keras layer.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        heads: int,
        key_dim: int,
        bucket_size: int = 64,
        hashes: int = 4,
        *,
        causal: bool = False,
        buckets: int | tuple[int, int] | None = None,
        chunks_before: int = 1,
        chunks_after: int = 0,
        correct_duplicates: bool = True,
        dropout: float = 0.0,
        use_bias: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        counts = {"heads": heads, "key_dim": key_dim, "bucket_size": bucket_size, "hashes": hashes}
        for name, value in counts.items():
            check_positive(name, value)
            check_type(name, value, int)
        for name, value in {"chunks_before": chunks_before, "chunks_after": chunks_after}.items():
            check_type(name, value, int)
            if value < 0:
                raise ValueError(f"{name} must not be negative, but got {value!r}.")
        check_fraction("dropout", dropout)
        super().__init__(**kwargs)
        self.heads = heads
        self.key_dim = key_dim
        self.bucket_size = bucket_size
        self.hashes = hashes
        self.causal = causal
        self.buckets = _checked_buckets(buckets)
        self.chunks_before = chunks_before
        self.chunks_after = chunks_after
        self.correct_duplicates = correct_duplicates
        self.dropout = dropout
        self.use_bias = use_bias
        self.seed = seed
        self.supports_masking = True
        dense: dict[str, Any] = {"use_bias": use_bias, "dtype": self.dtype_policy}
        self.query_dense = layers.Dense(heads * key_dim, name="query", **dense)
        self.value_dense = layers.Dense(heads * key_dim, name="value", **dense)
        self._dense = dense
        self._weight_dropout = layers.Dropout(dropout, seed=seed, dtype=self.dtype_policy)
        self._rotation_seeds = keras.random.SeedGenerator(seed)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the projections and the rotations of inference.

        Raises:
            ValueError: the input has no time axis, its size there is not known and `buckets` was
                not given, or the sequence is too long for one sort.
        """
        if len(input_shape) != 3 or input_shape[-1] is None:
            raise ValueError(
                f"{self.name!r} needs inputs [batch, time, features], but got {input_shape}."
            )
        time, features = input_shape[1:]
        if self.buckets is not None:
            self.factors = self.buckets
        elif time is not None:
            self.factors = bucket_factors(time, self.bucket_size)
        else:
            raise ValueError(
                f"The number of buckets of {self.name!r} follows from the length of the sequence, "
                "which is not known. Give keras.Input a fixed length, or the layer buckets=."
            )
        if time is not None and (prod(self.factors) + 2) * (time + self.bucket_size) >= 2**31:
            raise ValueError(
                f"{time} positions in {prod(self.factors)} buckets are too many to sort as 32-bit "
                "numbers. Use a larger bucket_size, or fewer buckets=."
            )
        self.query_dense.build(input_shape)
        self.value_dense.build(input_shape)
        self.output_dense = layers.Dense(features, name="output", **self._dense)
        self.output_dense.build((*input_shape[:2], self.heads * self.key_dim))
        self._rotations_shape = (self.key_dim, self.hashes, hash_columns(self.factors))
        self.rotations = None
        if prod(self.factors) > 1:
            self.rotations = self.add_weight(
                shape=self._rotations_shape,
                initializer=keras.initializers.RandomNormal(stddev=1.0, seed=self.seed),
                trainable=False,
                name="rotations",
            )
        super().build(input_shape)

    def call(self, inputs: Any, mask: Any = None, training: bool | None = None) -> Any:
        """Returns [batch, time, features]; `mask` is [batch, time], true where there is input."""
        batch, time = ops.shape(inputs)[:2]
        query = self._split_heads(self.query_dense(inputs), batch, time)
        value = self._split_heads(self.value_dense(inputs), batch, time)
        buckets = self._hash(query, training)
        outside = prod(self.factors)  # one more bucket, the last: what nobody attends to
        if mask is not None:
            seen = ops.repeat(ops.cast(mask, "bool"), self.heads, axis=0)
            buckets = ops.where(seen[:, None], buckets, outside)
        missing = -time % self.bucket_size
        if not (isinstance(missing, int) and missing == 0):
            padding = ((0, 0), (0, missing), (0, 0))
            query, value = ops.pad(query, padding), ops.pad(value, padding)
            padding = ((0, 0), (0, 0), (0, missing))
            buckets = ops.pad(buckets, padding, constant_values=outside)
        attended = self._attend(query, value, buckets, training)[:, :time]
        attended = ops.reshape(attended, (batch, self.heads, time, self.key_dim))
        attended = ops.transpose(attended, (0, 2, 1, 3))
        return self.output_dense(ops.reshape(attended, (batch, time, self.heads * self.key_dim)))

    def _split_heads(self, x: Any, batch: Any, time: Any) -> Any:
        x = ops.reshape(x, (batch, time, self.heads, self.key_dim))
        return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (-1, time, self.key_dim))

    def _hash(self, query: Any, training: bool | None) -> Any:
        if self.rotations is None:
            rows, time, _ = ops.shape(query)
            return ops.zeros((rows, self.hashes, time), dtype="int32")
        small = prod(self.factors) < 2**15
        kept = decide(
            lambda: ops.cast(
                hash_vectors(query, self._draw_rotations(training), self.factors),
                "int16" if small else "int32",
            )
        )
        return ops.cast(kept, "int32")

    def _draw_rotations(self, training: bool | None) -> Any:
        if training:
            shape = self._rotations_shape
            return keras.random.normal(shape, seed=self._rotation_seeds, dtype=self.compute_dtype)
        return ops.convert_to_tensor(self.rotations)

    def _attend(self, query: Any, value: Any, buckets: Any, training: bool | None) -> Any:
        """Attends within buckets: [rows, time, key_dim], of whole chunks, to the same shape."""
        rows, time = ops.shape(query)[:2]
        order, places, sorted_buckets = sort_by_bucket(buckets, time)
        queries = self._cut(sort_rows(query, order, places))
        # Below the length that float16 can square, no vector is normalised to full length.
        lengths = ops.sqrt(ops.sum(ops.square(queries), axis=-1, keepdims=True) + 1e-6)
        keys = self._look_around(queries / lengths)
        values = self._look_around(self._cut(sort_rows(value, order, places)))
        logits = ops.einsum("ncid,ncjd->ncij", queries, keys)
        seen = self._seen(self._cut(order), self._cut(sorted_buckets))
        # Half precision has too few digits for sums over a chunk.
        logits, lengths = ops.cast(logits, "float32"), ops.cast(lengths, "float32")
        # No key is longer than 1, so no logit is below -|q|: a neutral value for what is not seen,
        # near enough to the others that the logits can be quantized.
        logits = ops.where(seen, logits, -lengths)
        highest = ops.stop_gradient(ops.max(logits, axis=-1, keepdims=True))
        weights = ops.exp(logits - highest)
        if self.correct_duplicates and self.hashes > 1:
            weights = weights / self._count_rounds(buckets, order, places)
        weights = ops.where(seen, weights, 0.0)
        total = ops.sum(weights, axis=-1, keepdims=True)
        weights = ops.cast(self._weight_dropout(weights, training=training), value.dtype)
        mixed = ops.einsum("ncij,ncjd->ncid", weights, values)

        def restore(x: Any) -> Any:
            x = ops.reshape(x, (rows, self.hashes, time, x.shape[-1]))
            return ops.cast(restore_rows(x, order, places), "float32")

        mixed, total = restore(mixed), restore(total)
        highest = ops.stop_gradient(restore(highest))
        # exp(z_r - z) o_r with z = log of the sum of exp z_r, both sides multiplied out.
        shares = ops.exp(highest - ops.max(highest, axis=1, keepdims=True))
        mixed = ops.sum(shares * mixed, axis=1)
        total = ops.sum(shares * total, axis=1)
        alone = ops.cast(total == 0, "float32")
        mixed = (mixed + alone * ops.cast(value, "float32")) / (total + alone)
        return ops.cast(mixed, value.dtype)

    def _cut(self, x: Any) -> Any:
        """[rows, hashes, time, ...] to [rows * hashes, chunks, bucket_size, ...]."""
        rows, hashes, time, *rest = ops.shape(x)
        chunks = time // self.bucket_size
        return ops.reshape(x, (rows * hashes, chunks, self.bucket_size, *rest))

    def _look_around(self, x: Any, fill: float = 0) -> Any:
        """Puts the positions of the chunks around each chunk beside its own.

        Args:
            x: [rows, chunks, bucket_size, ...].
            fill: what stands before the first chunk and after the last.

        Returns:
            [rows, chunks, (chunks_before + 1 + chunks_after) * bucket_size, ...].
        """
        before, after = self._reach(x.shape[1])
        if not before and not after:
            return x
        chunks = ops.shape(x)[1]
        padding = [(0, 0), (before, after)] + [(0, 0)] * (len(x.shape) - 2)
        padded = ops.pad(x, padding, constant_values=fill) if fill else ops.pad(x, padding)
        parts = [padded[:, place : place + chunks] for place in range(before + 1 + after)]
        return ops.concatenate(parts, axis=2)

    def _reach(self, chunks: int | None) -> tuple[int, int]:
        if chunks is None:
            return self.chunks_before, self.chunks_after
        return min(self.chunks_before, chunks - 1), min(self.chunks_after, chunks - 1)

    def _seen(self, positions: Any, buckets: Any) -> Any:
        """Tells which keys each query may attend to, itself excepted.

        Args:
            positions: [rows, chunks, bucket_size] int32, where each comes from.
            buckets: likewise, the bucket of each.

        Returns:
            [rows, chunks, bucket_size, keys] bool.
        """
        others = self._look_around(positions)[:, :, None]
        their_buckets = self._look_around(buckets, fill=-1)
        # Nobody's bucket is -1 or -2.
        known = ops.where(their_buckets < prod(self.factors), their_buckets, -2)[:, :, None]
        positions = positions[..., None]
        apart = others < positions if self.causal else others != positions
        return ops.logical_and(apart, known == buckets[..., None])

    def _count_rounds(self, buckets: Any, order: Any, places: Any) -> Any:
        """Counts in how many rounds each query finds each key: N_ij of appendix A, at least 1.

        Returns:
            [rows * hashes, chunks, bucket_size, keys] float32.
        """
        chunks = ops.shape(buckets)[-1] // self.bucket_size
        # One number tells both: equal buckets differ by as much as their chunks are apart, and
        # unequal ones by more than anybody looks.
        apart = chunks + max(self.chunks_before, self.chunks_after)
        codes = buckets * apart + places // self.bucket_size
        codes = self._cut(take_rows(ops.transpose(codes, (0, 2, 1)), order))
        around = self._look_around(codes)
        found: Any = 0.0
        for number in range(self.hashes):
            difference = codes[..., number][..., None] - around[..., number][:, :, None]
            near = difference <= self.chunks_before
            near = ops.logical_and(near, difference >= -self.chunks_after)
            found = found + ops.cast(near, "float32")
        return ops.maximum(found, 1.0)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns the shape of the input."""
        return tuple(input_shape)

    def count_macs(self, input_shape: tuple[int, ...]) -> int:
        """Returns the multiply-accumulates of one call: projections, hashing and attention."""
        batch, time, features = input_shape
        width = self.heads * self.key_dim
        factors = self.buckets or bucket_factors(time, self.bucket_size)
        chunks = ceil(time / self.bucket_size)
        keys = (1 + sum(self._reach(chunks))) * self.bucket_size
        columns = hash_columns(factors)
        hashing = batch * time * width * self.hashes * columns
        attention = batch * chunks * self.bucket_size * width * self.hashes * keys * 2
        return 3 * batch * time * features * width + hashing + attention

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {
            **super().get_config(),
            "heads": self.heads,
            "key_dim": self.key_dim,
            "bucket_size": self.bucket_size,
            "hashes": self.hashes,
            "causal": self.causal,
            "buckets": self.buckets,
            "chunks_before": self.chunks_before,
            "chunks_after": self.chunks_after,
            "correct_duplicates": self.correct_duplicates,
            "dropout": self.dropout,
            "use_bias": self.use_bias,
            "seed": self.seed,
        }


def _checked_buckets(buckets: Any) -> tuple[int, ...] | None:
    """Returns the factors of a number of buckets."""
    if buckets is None:
        return None
    factors = (buckets,) if isinstance(buckets, int) else tuple(buckets)
    alone = factors == (1,)
    if not all(isinstance(n, int) and n > 0 and n % 2 == 0 for n in factors) and not alone:
        raise ValueError(
            f"buckets must be 1, an even number or a pair of even numbers, but got {buckets!r}: a "
            "rotation gives two buckets for each direction."
        )
    return factors
