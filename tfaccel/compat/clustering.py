"""TFMOT's clustering verbs on Keras 3: `cluster_weights`, `strip_clustering`, `cluster_scope`."""

import abc
import enum
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np

from tfaccel.compat.handover import is_tf_keras, tfmot_clustering
from tfaccel.compat.wrapping import LateTransformedLayer
from tfaccel.core import keras_private
from tfaccel.core.checks import check_model
from tfaccel.core.cloning import clone_built, clone_operation
from tfaccel.core.graph import flat_layers
from tfaccel.core.stripping import strip
from tfaccel.core.transforms import (
    TransformedLayer,
    WeightTransform,
    transform_model,
    weight_keys,
)
from tfaccel.quantization.clustering import NearestCentroids, clusterable_keys, pruned_weights

_AGGREGATIONS = {"SUM": "sum", "AVG": "mean"}


class CentroidInitialization(str, enum.Enum):
    """Where centroids begin; `tfaccel.quantization.cluster` says what each means."""

    LINEAR = "CentroidInitialization.LINEAR"
    RANDOM = "CentroidInitialization.RANDOM"
    DENSITY_BASED = "CentroidInitialization.DENSITY_BASED"
    KMEANS_PLUS_PLUS = "CentroidInitialization.KMEANS_PLUS_PLUS"


_INITIALIZATIONS = {
    CentroidInitialization.LINEAR: "linear",
    CentroidInitialization.RANDOM: "random",
    CentroidInitialization.DENSITY_BASED: "density",
    CentroidInitialization.KMEANS_PLUS_PLUS: "kmeans++",
}


class ClusterableLayer(abc.ABC):
    """Mixin for a layer of the user's that says which of its weights may be clustered."""

    @abc.abstractmethod
    def get_clusterable_weights(self) -> list[tuple[str, keras.Variable]]:
        """Returns pairs of a name and a variable of the built layer."""

    def get_clusterable_algorithm(self, weight_name: str) -> Any:  # noqa: ARG002
        """Returns None: the nearest centroid. Another look-up cannot be given here."""
        return None


@keras.saving.register_keras_serializable("tfaccel")
class ClusterWeights(LateTransformedLayer):
    """A layer whose kernels are clustered; may be made before the layer has weights.

    `cluster_weights` gives it for a layer; a model comes with `TransformedLayer`s.

    Args:
        layer: any layer of Keras, or one with `get_clusterable_weights`.
        number_of_clusters: see `cluster_weights`, as the following.
        cluster_centroids_init: a `CentroidInitialization`.
        preserve_sparsity: whether zeros stay zeros.
        cluster_per_channel: whether channels of a Conv2D have values of their own.
        cluster_gradient_aggregation: "SUM" or "AVG" of the gradients of a centroid's weights.

    Raises:
        ValueError: an argument that does not fit, or a layer of the user's that does not name its
            clusterable weights.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        number_of_clusters: int,
        cluster_centroids_init: Any = CentroidInitialization.KMEANS_PLUS_PLUS,
        preserve_sparsity: bool = False,
        cluster_per_channel: bool = False,
        cluster_gradient_aggregation: Any = "SUM",
        **kwargs: Any,
    ) -> None:
        self._settings = _Settings(
            number_of_clusters,
            cluster_centroids_init,
            preserve_sparsity,
            cluster_per_channel,
            cluster_gradient_aggregation,
        )
        _check_layer(layer)
        self._begin(layer, kwargs)

    def _new_transforms(self) -> Mapping[str, WeightTransform]:
        return self._settings.transforms(self.layer)

    def _finish(self) -> None:
        super()._finish()
        try:
            for key, transform in self.transforms:
                transform.initialize(keras.ops.convert_to_tensor(self.variable(key)))
        except (NotImplementedError, TypeError) as error:
            # What TensorFlow and JAX say of a variable that gets its value inside a graph.
            raise ValueError(
                f"The centroids of {self.name!r} begin by its weights, but those have no values "
                "before the model's first batch. Begin the model with keras.Input(shape), or call "
                "model.build(input_shape) before fit()."
            ) from error

    def get_config(self) -> dict[str, Any]:
        """Returns the inner layer and the arguments."""
        config = super().get_config()
        config.pop("transforms")
        return {**config, **self._settings.to_config()}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "ClusterWeights":
        """Returns the layer that `get_config` described, built if it was."""
        config = dict(config)
        config["layer"] = keras.saving.deserialize_keras_object(
            config["layer"], custom_objects=custom_objects
        )
        return cls(**config)


def cluster_weights(
    to_cluster: Any,
    number_of_clusters: int,
    cluster_centroids_init: Any = CentroidInitialization.KMEANS_PLUS_PLUS,
    preserve_sparsity: bool = False,
    cluster_per_channel: bool = False,
    **kwargs: Any,
) -> Any:
    """Makes a layer, a list of layers or a model share few values in each kernel, as TFMOT does.

    All kernels of supported layers are clustered, the first convolution and small ones too, and
    centroids begin where the initialization puts them, without k-means;
    `tfaccel.quantization.cluster` chooses more carefully. Given an object of tf_keras, TFMOT itself
    is called.

    Args:
        to_cluster: a layer (built or not), a list of layers, or a Sequential or Functional model.
        number_of_clusters: distinct values of a kernel, above 1, above 2 if sparsity is preserved.
        cluster_centroids_init: a `CentroidInitialization`, TFMOT's own too.
        preserve_sparsity: whether zero is one of the values and zeros stay zeros.
        cluster_per_channel: whether each channel of a Conv2D has values of its own.
        **kwargs: `cluster_gradient_aggregation` ("SUM" or "AVG"); for a single layer also arguments
            of its wrapper, such as `input_shape`.

    Returns:
        The layer wrapped, the list, or a new model without an optimizer.

    Raises:
        ValueError: none of these, a subclassed model, an unsupported layer, or an argument that
            does not fit.
    """
    if is_tf_keras(to_cluster):
        return _hand_over(
            to_cluster,
            number_of_clusters,
            cluster_centroids_init,
            {
                "preserve_sparsity": preserve_sparsity,
                "cluster_per_channel": cluster_per_channel,
                **kwargs,
            },
        )
    aggregation = kwargs.pop("cluster_gradient_aggregation", "SUM")
    given = (
        number_of_clusters,
        cluster_centroids_init,
        preserve_sparsity,
        cluster_per_channel,
        aggregation,
    )
    settings = _Settings(*given)
    if isinstance(to_cluster, (list, tuple)):
        return [_wrap(layer, given, {}) for layer in to_cluster]
    if isinstance(to_cluster, keras.Sequential) and not keras_private.has_graph(to_cluster):
        wrapped = [_wrap(layer, given, {}) for layer in to_cluster.layers]
        return keras.Sequential(wrapped, name=to_cluster.name)
    if isinstance(to_cluster, keras.Model):
        return _cluster_model(to_cluster, settings)
    if isinstance(to_cluster, keras.layers.Layer):
        return _wrap(to_cluster, given, kwargs)
    raise ValueError(
        "cluster_weights() takes a Sequential or Functional keras.Model, a keras.layers.Layer or a "
        f"list of layers, but got {to_cluster!r} ({type(to_cluster).__name__})."
    )


def strip_clustering(model: keras.Model) -> keras.Model:
    """Returns a plain model whose kernels have the clustered values.

    Raises:
        ValueError: the model is subclassed or none.
    """
    if is_tf_keras(model):
        return tfmot_clustering().strip_clustering(model)
    _check_graph(model, "strip_clustering")
    return strip(model)


def cluster_scope() -> AbstractContextManager[Any]:
    """Returns a scope in which clustered models can be loaded.

    tfaccel registers its layers when `tfaccel.compat.tfmot` is imported, so that loading works
    without the scope too.
    """
    return keras.saving.custom_object_scope(
        {"ClusterWeights": ClusterWeights, "TransformedLayer": TransformedLayer}
    )


class _Settings:
    """What TFMOT's arguments mean here."""

    def __init__(
        self,
        number_of_clusters: int,
        cluster_centroids_init: Any,
        preserve_sparsity: bool,
        cluster_per_channel: bool,
        aggregation: Any,
    ) -> None:
        fewest = 3 if preserve_sparsity else 2
        if not isinstance(number_of_clusters, (int, np.integer)) or number_of_clusters < fewest:
            raise ValueError(
                f"number_of_clusters must be an integer of {fewest} or more"
                f"{' if zeros are preserved' if preserve_sparsity else ''}, but got "
                f"{number_of_clusters!r}."
            )
        self._clusters = int(number_of_clusters)
        self._initialization = _initialization(cluster_centroids_init)
        self._sparse = bool(preserve_sparsity)
        self._per_channel = bool(cluster_per_channel)
        self._aggregation = str(getattr(aggregation, "value", aggregation)).rpartition(".")[2]
        if self._aggregation not in _AGGREGATIONS:
            raise ValueError(
                f"cluster_gradient_aggregation must be 'SUM' or 'AVG', but got {aggregation!r}."
            )

    def transforms(self, layer: keras.layers.Layer) -> dict[str, NearestCentroids]:
        """Returns new centroids for each clusterable weight of a built layer."""
        if hasattr(layer, "get_clusterable_weights"):
            named = layer.get_clusterable_weights()
            wanted = {id(variable) for _, variable in named}
            keys = [key for key, variable in weight_keys(layer).items() if id(variable) in wanted]
        else:
            keys = list(clusterable_keys(layer, by_name=False))
        by_channel = self._per_channel and type(layer) is keras.layers.Conv2D
        if isinstance(layer, keras.layers.Conv2D) and not self._enough(layer, by_channel):
            return {}
        return {
            key: NearestCentroids(
                self._clusters,
                _INITIALIZATIONS[self._initialization],
                self._sparse,
                -1 if by_channel else None,
                _AGGREGATIONS[self._aggregation],
                refine=False,
            )
            for key in keys
        }

    def _enough(self, layer: keras.layers.Layer, by_channel: bool) -> bool:
        shape = layer.kernel.shape
        size = int(np.prod(shape[:-1] if by_channel else shape))
        if size <= self._clusters:
            warnings.warn(
                f"Layer {layer.name!r} is not clustered: {self._clusters} clusters for {size} "
                f"weights{' of each channel' if by_channel else ''}.",
                stacklevel=2,
            )
        return size > self._clusters

    def to_config(self) -> dict[str, Any]:
        return {
            "number_of_clusters": self._clusters,
            "cluster_centroids_init": self._initialization.value,
            "preserve_sparsity": self._sparse,
            "cluster_per_channel": self._per_channel,
            "cluster_gradient_aggregation": self._aggregation,
        }


def _initialization(given: Any) -> CentroidInitialization:
    try:
        return CentroidInitialization(getattr(given, "value", given))
    except ValueError as error:
        known = ", ".join(str(member.value) for member in CentroidInitialization)
        raise ValueError(
            f"cluster_centroids_init must be one of {known}, but got {given!r}."
        ) from error


def _cluster_model(model: keras.Model, settings: _Settings) -> keras.Model:
    _check_graph(model, "cluster_weights")
    clustered_already = set()
    for layer in flat_layers(model):
        if isinstance(layer, TransformedLayer):
            if any(isinstance(transform, NearestCentroids) for _, transform in layer.transforms):
                clustered_already.add(id(layer.layer))
        elif not isinstance(layer, keras.layers.InputLayer):
            _check_layer(layer)
    pruned = pruned_weights(model)

    def rules(layer: keras.layers.Layer) -> Mapping[str, WeightTransform] | None:
        if id(layer) in clustered_already:
            return None
        transforms = settings.transforms(layer)
        for key, transform in transforms.items():
            if (id(layer), key) in pruned:
                transform.given, transform.masked = pruned[id(layer), key], True
        return transforms

    return transform_model(model, rules)


def _wrap(layer: Any, given: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if isinstance(layer, TransformedLayer):
        return layer
    if isinstance(layer, keras.layers.InputLayer):
        return clone_operation(layer)
    _check_layer(layer)
    # A layer with weights belongs to a model, which a rewrite leaves as it is.
    inner = clone_built(layer) if layer.built else layer
    return ClusterWeights(inner, *given, **kwargs)


def _hand_over(to_cluster: Any, clusters: int, initialization: Any, options: dict[str, Any]) -> Any:
    theirs = tfmot_clustering()
    member = theirs.CentroidInitialization[_initialization(initialization).name]
    return theirs.cluster_weights(to_cluster, clusters, member, **options)


def _check_layer(layer: Any) -> None:
    if not isinstance(layer, keras.layers.Layer) or isinstance(layer, keras.Model):
        raise ValueError(  # noqa: TRY004  TFMOT's kind of error
            f"A clustered layer is a keras.layers.Layer and no model, but got {layer!r}."
        )
    builtin = type(layer).__module__.partition(".")[0] in ("keras", "tfaccel")
    if not builtin and not hasattr(layer, "get_clusterable_weights"):
        raise ValueError(
            f"cluster_weights() does not know the layer {layer.name!r} of class "
            f"{type(layer).__name__}. Give the class a method get_clusterable_weights() that "
            "returns pairs of a name and a variable (see ClusterableLayer; an empty list if there "
            "are none), or cluster by tfaccel.quantization.cluster, which leaves unknown layers "
            "alone."
        )


def _check_graph(model: Any, verb: str) -> None:
    try:
        check_model(model, verb)
    except TypeError as error:  # TFMOT's kind of error, which callers may expect
        raise ValueError(str(error)) from error
