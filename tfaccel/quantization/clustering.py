"""Weight clustering: a kernel shares a few values, and these are trained.

Every weight is replaced by the nearest of the kernel's centroids. A centroid's gradient is the sum
of the gradients of its weights (Han et al. 2016, eq. 3); the raw weights get their own, straight
through, so that a weight may move to another cluster. A kernel then needs log2(clusters) bits per
weight and a table of centroids: `huffman_size` says what that comes to.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from tfaccel.core.checks import check_in, check_model, check_type
from tfaccel.core.selection import Choice, Selector, select_layers
from tfaccel.core.transforms import (
    CLUSTER,
    PRUNE,
    StateSpec,
    WeightTransform,
    transform_model,
    transformed_layers,
    weight_keys,
)
from tfaccel.quantization.centroids import INITIALIZATIONS, initial_centroids, nearest_centroids

Array = npt.NDArray[Any]

AGGREGATIONS = ("sum", "mean")
# With fewer weights than this for each centroid, the table is what takes the space.
_WEIGHTS_PER_CLUSTER = 4
_KERNELS = ("kernel", "recurrent_kernel", "pointwise_kernel", "embeddings")
_CONVOLUTIONS = (
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.SeparableConv1D,
    layers.SeparableConv2D,
)
_CHANNEL_AXES: dict[type, int] = {
    layers.Conv1D: -1,
    layers.Conv2D: -1,
    layers.Conv3D: -1,
    layers.Conv1DTranspose: -2,
    layers.Conv2DTranspose: -2,
    layers.Conv3DTranspose: -2,
}


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(eq=False)
class NearestCentroids(WeightTransform):
    """Replaces each weight by the nearest of some centroids, which are trained.

    Args:
        clusters: how many values the kernel may have, 2 or more.
        initialization: where centroids begin, see `cluster`.
        preserve_sparsity: whether zero is one of the values, stays zero, and zeros stay zeros.
        channel_axis: the axis of the kernel whose slices have centroids of their own; None for one
            table in all.
        gradient_aggregation: "sum" or "mean" of the weights' gradients.
        refine: whether k-means refines the centroids before training.
        seed: of initializations that draw lots; a number of this weight alone.

    Raises:
        ValueError: an argument is not known or out of range.
    """

    stage: ClassVar[int] = CLUSTER

    clusters: int = 16
    initialization: str = "kmeans++"
    preserve_sparsity: bool = False
    channel_axis: int | None = None
    gradient_aggregation: str = "sum"
    refine: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_clusters(self.clusters)
        check_in("initialization", self.initialization, tuple(INITIALIZATIONS))
        check_in("gradient_aggregation", self.gradient_aggregation, AGGREGATIONS)
        # What `initialize` looks at in place of the raw weight: the pruned one.
        self.given: Any = None
        # Whether a mask says which weights are zero, so that they may come back.
        self.masked = False

    def state_spec(self, shape: tuple[int, ...], dtype: str) -> dict[str, StateSpec]:
        """Returns the centroids, [tables, clusters], without zero if it is held; what may train."""
        tables = 1 if self.channel_axis is None else shape[self.channel_axis]
        free = self.clusters - 1 if self.preserve_sparsity else self.clusters
        specs = {"centroids": StateSpec((tables, free), dtype, "zeros", trainable=True)}
        if self.preserve_sparsity:
            specs["kept"] = StateSpec(shape, "bool", "ones")
        return specs

    def initialize(self, weight: Any) -> None:
        """Sets the centroids by the weight's values, and holds its zeros if they are to stay."""
        given = weight if self.given is None else self.given
        values = keras.ops.convert_to_numpy(given)
        self.given = None
        self.state["centroids"].assign(self._tables(values))
        if self.preserve_sparsity and not self.masked:
            self.state["kept"].assign(values != 0)

    def _tables(self, values: Array) -> Array:
        """Returns [tables, clusters] by the values, without the zero that is held."""
        rows = values.reshape(1, -1)
        if self.channel_axis is not None:
            rows = np.moveaxis(values, self.channel_axis, 0)
            rows = rows.reshape(len(rows), -1)
        seeds = np.random.SeedSequence(self.seed).generate_state(len(rows))
        tables = []
        for row, seed in zip(rows, seeds, strict=True):
            table = initial_centroids(
                row,
                self.clusters,
                self.initialization,
                zero=self.preserve_sparsity,
                refine=self.refine,
                seed=int(seed),
            )
            if self.preserve_sparsity:
                table = np.delete(table, np.flatnonzero(table == 0)[0])
            tables.append(table)
        return np.stack(tables)

    def __call__(self, weight: Any, training: bool | None = None) -> Any:  # noqa: ARG002
        """Returns the centroids in place of the weights, of the weight's shape."""
        ops = keras.ops
        if self.preserve_sparsity:
            kept = ops.convert_to_tensor(self.state["kept"])
            weight = ops.where(kept, weight, ops.zeros_like(weight))
        tables = ops.convert_to_tensor(self.state["centroids"])
        if self.preserve_sparsity:
            tables = ops.concatenate([tables, ops.zeros_like(tables[:, :1])], axis=1)
        rows = self._to_rows(weight)
        places = nearest_centroids(ops.stop_gradient(rows), ops.stop_gradient(tables))
        flat = ops.reshape(tables, (-1,))
        if self.gradient_aggregation == "mean":
            ones = ops.ones_like(ops.reshape(places, (-1,)), dtype=flat.dtype)
            sizes = ops.segment_sum(ones, ops.reshape(places, (-1,)), flat.shape[0])
            # The second term is zero, and its gradient is the sum over a cluster by its size.
            moving = (flat - ops.stop_gradient(flat)) / ops.maximum(sizes, ops.ones_like(sizes))
            flat = ops.stop_gradient(flat) + moving
        shared = self._from_rows(ops.take(flat, places), tuple(weight.shape))
        # Exact: what is added is zero. It carries the gradient to the raw weight.
        return shared + (weight - ops.stop_gradient(weight))

    def _to_rows(self, weight: Any) -> Any:
        if self.channel_axis is None:
            return keras.ops.reshape(weight, (1, -1))
        first = keras.ops.moveaxis(weight, self.channel_axis, 0)
        return keras.ops.reshape(first, (first.shape[0], -1))

    def _from_rows(self, rows: Any, shape: tuple[int, ...]) -> Any:
        if self.channel_axis is None:
            return keras.ops.reshape(rows, shape)
        axis = self.channel_axis % len(shape)
        first = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        return keras.ops.moveaxis(keras.ops.reshape(rows, first), 0, axis)


def cluster(
    model: keras.Model,
    clusters: int = 16,
    *,
    initialization: str = "kmeans++",
    refine: bool = True,
    preserve_sparsity: bool | None = None,
    per_channel: bool = False,
    gradient_aggregation: str = "sum",
    include: Selector | None = None,
    exclude: Selector | None = None,
    seed: int | None = None,
) -> keras.Model:
    """Returns a model whose kernels have few distinct values each, which are trained.

    Compile and fit the result for a few epochs with a small learning rate, then take
    `tfaccel.strip(result)`. Begin with a trained model; prune it before, quantize it after.

    Args:
        model: a built Functional or Sequential model, plain or pruned; not changed.
        clusters: how many values a kernel may have, 2 or more; 16 are 4 bits, 32 are 5.
        initialization: "kmeans++" (Arthur & Vassilvitskii 2007), "linear" (evenly spaced between
            smallest and largest), "density" (quantiles) or "random" (uniformly drawn).
        refine: whether k-means moves the centroids before training, by which most initializations
            end at much the same place. Without it "linear" keeps a place for the largest weights.
        preserve_sparsity: whether zero is one of the values and zeros stay zeros. By default where
            a kernel is pruned: it has a pruning mask, or at least one in `clusters` weights is 0.
        per_channel: whether each output channel of a convolution has values of its own. More
            accurate and larger: a table for each channel.
        gradient_aggregation: "sum" or "mean" of the weights' gradients for their centroid.
        include: layers to cluster (names, patterns, predicate). By default the kernels of
            convolutions, dense, recurrent, attention and embedding layers, without the first
            convolution, depthwise kernels, and layers with fewer than four weights for each value.
        exclude: layers to leave alone.
        seed: for initializations that draw lots.

    Returns:
        The rewritten model, weights carried over; its outputs are those of the shared values.

    Raises:
        TypeError: the model is subclassed, or an argument is of another type.
        ValueError: the model is not built, an argument is not known, a selector matches nothing,
            a kernel is clustered already or not finite, or there is nothing to cluster.

    References:
        Han et al. 2016, Deep Compression.

    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(16)])
    >>> len(np.unique(cluster(model, 4)(np.eye(16))))
    4
    """
    check_model(model, "cluster")
    check_clusters(clusters)
    check_in("initialization", initialization, tuple(INITIALIZATIONS))
    check_in("gradient_aggregation", gradient_aggregation, AGGREGATIONS)
    check_type("refine", refine, bool)
    check_type("preserve_sparsity", preserve_sparsity, (bool, type(None)))
    choices = selection_for(model, clusters, include, exclude, per_channel=per_channel)
    chosen = {
        id(choice.layer): clusterable_keys(choice.layer, by_name=include is not None)
        for choice in choices
        if choice.chosen
    }
    if not chosen:
        reasons = "; ".join(f"{c.layer.name}: {c.reason}" for c in choices if c.layer.weights)
        raise ValueError(
            f"cluster() found nothing to cluster in {model.name!r} "
            f"({reasons or 'no layer has weights'}). Name the layers to cluster with include=."
        )
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    check_type("seed", seed, (int, np.integer))
    numbers = iter(np.random.SeedSequence(int(seed)).generate_state(sum(map(len, chosen.values()))))
    pruned = pruned_weights(model)

    def rules(layer: keras.layers.Layer) -> Mapping[str, WeightTransform] | None:
        transforms = {}
        for key, variable in chosen.get(id(layer), {}).items():
            masked = (id(layer), key) in pruned
            value = pruned.get((id(layer), key))
            values = keras.ops.convert_to_numpy(variable) if value is None else value
            sparse = masked or float((values == 0).mean()) * clusters >= 1
            transform = NearestCentroids(
                clusters,
                initialization,
                sparse if preserve_sparsity is None else preserve_sparsity,
                channel_axis_of(layer, key) if per_channel else None,
                gradient_aggregation,
                refine,
                int(next(numbers)),
            )
            transform.given, transform.masked = values, masked
            transforms[key] = transform
        return transforms or None

    return transform_model(model, rules)


def selection_for(
    model: keras.Model,
    clusters: int = 16,
    include: Selector | None = None,
    exclude: Selector | None = None,
    *,
    per_channel: bool = False,
) -> list[Choice]:
    """Returns for each layer whether `cluster` would touch it, and why; arguments as there."""
    first = True
    choices = []
    for choice in select_layers(model, include, exclude):
        layer = choice.layer
        leading = first and isinstance(layer, _CONVOLUTIONS)
        first = first and not leading
        if not choice.chosen:
            choices.append(choice)
            continue
        by_name = choice.reason == "included"
        sizes = _sizes(layer, by_name, per_channel)
        refusal = "" if sizes else "no kernel" if layer.weights else "no weights"
        if sizes and not by_name:
            few = _WEIGHTS_PER_CLUSTER * clusters
            if leading:
                refusal = "first convolution: few weights, all else rests on them"
            elif max(sizes.values()) < few:
                refusal = f"too small: {max(sizes.values())} weights in a table, fewer than {few}"
        kernels = ", ".join(f"{key}: {size} weights in a table" for key, size in sizes.items())
        choices.append(Choice(layer, not refusal, refusal or kernels))
    return choices


def clusterable_keys(layer: keras.layers.Layer, *, by_name: bool) -> dict[str, keras.Variable]:
    """Returns the kernels of a layer by key, depthwise ones only if the layer is named."""
    names = (*_KERNELS, "depthwise_kernel") if by_name else _KERNELS
    if isinstance(layer, (layers.DepthwiseConv1D, layers.DepthwiseConv2D)) and not by_name:
        return {}
    return {
        key: variable
        for key, variable in weight_keys(layer).items()
        if key.rsplit("/", 1)[-1].split("#")[0] in names
    }


def channel_axis_of(layer: keras.layers.Layer, key: str) -> int | None:
    """Returns the axis of a convolution's kernel that is output channels, None for others."""
    return _CHANNEL_AXES.get(type(layer)) if key == "kernel" else None


def check_clusters(clusters: int) -> None:
    """Raises unless `clusters` is an integer of 2 or more."""
    check_type("clusters", clusters, (int, np.integer))
    if isinstance(clusters, bool) or clusters < 2:
        raise ValueError(f"clusters must be an integer of 2 or more, but got {clusters!r}.")


def _sizes(layer: keras.layers.Layer, by_name: bool, per_channel: bool) -> dict[str, int]:
    sizes = {}
    for key, variable in clusterable_keys(layer, by_name=by_name).items():
        axis = channel_axis_of(layer, key) if per_channel else None
        sizes[key] = int(np.prod(variable.shape)) // (1 if axis is None else variable.shape[axis])
    return sizes


def pruned_weights(model: keras.Model) -> dict[tuple[int, str], Array]:
    """Returns the weights that have a mask, masked, by inner layer and key."""
    found: dict[tuple[int, str], Array] = {}
    for layer in transformed_layers(model):
        for key, transform in layer.transforms:
            if transform.stage == PRUNE:
                raw = found.get((id(layer.layer), key))
                weight = keras.ops.convert_to_tensor(layer.variable(key) if raw is None else raw)
                masked = transform(weight, training=False)
                found[id(layer.layer), key] = keras.ops.convert_to_numpy(masked)
    return found
