"""TFMOT's pruning verbs on Keras 3: `prune_low_magnitude`, `strip_pruning`, `prune_scope`."""

import abc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras

from tfaccel.compat.handover import is_tf_keras, tfmot_pruning, to_tfmot
from tfaccel.compat.wrapping import LateTransformedLayer
from tfaccel.core import keras_private, schedules
from tfaccel.core.checks import check_in, check_model
from tfaccel.core.cloning import clone_built, clone_operation
from tfaccel.core.graph import flat_layers
from tfaccel.core.stripping import strip
from tfaccel.core.transforms import (
    TransformedLayer,
    WeightTransform,
    transform_model,
    weight_keys,
)
from tfaccel.pruning.criteria import Magnitude
from tfaccel.pruning.kernels import prunable_keys
from tfaccel.pruning.masks import PruningMask
from tfaccel.pruning.patterns import Block, Element, NofM, Pattern

_HALF = schedules.ConstantSparsity(0.5, 0)
_POOLINGS = {"AVG": "mean", "MAX": "max"}


class PrunableLayer(abc.ABC):
    """Mixin for a layer of the user's that says which of its weights may be pruned."""

    @abc.abstractmethod
    def get_prunable_weights(self) -> list[keras.Variable]:
        """Returns variables of the built layer."""


class PruningSchedule(abc.ABC):
    """Base class for a schedule of the user's, as in TFMOT.

    `tfaccel.pruning.prune` takes any callable `step -> (should_prune, sparsity)`.
    """

    @abc.abstractmethod
    def __call__(self, step: Any) -> tuple[Any, Any]:
        """Returns (prune at this step?, share of zeros in [0, 1))."""

    @abc.abstractmethod
    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for `keras.saving`."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PruningSchedule":
        """Returns the schedule that `get_config` described."""
        return cls(**config)

    def _should_prune_in_step(
        self, step: Any, begin_step: int, end_step: int, frequency: int
    ) -> bool:
        return schedules.ConstantSparsity(0.0, begin_step, end_step, frequency)(step)[0]


@keras.saving.register_keras_serializable("tfaccel")
class PruneLowMagnitude(LateTransformedLayer):
    """A layer whose kernels are pruned; may be made before the layer has weights.

    `prune_low_magnitude` gives it for a layer; a model comes with `TransformedLayer`s.

    Args:
        layer: any layer of Keras, or one with `get_prunable_weights`.
        pruning_schedule: see `prune_low_magnitude`, as the following.
        block_size: (inputs, outputs).
        block_pooling_type: "AVG" or "MAX".
        sparsity_m_by_n: (zeros, group size).

    Raises:
        ValueError: a layer of the user's that does not name its prunable weights.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        pruning_schedule: Any = _HALF,
        block_size: Sequence[int] = (1, 1),
        block_pooling_type: str = "AVG",
        sparsity_m_by_n: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self._settings = _Settings(
            pruning_schedule, block_size, block_pooling_type, sparsity_m_by_n
        )
        _check_layer(layer)
        self._begin(layer, kwargs)

    def _new_transforms(self) -> Mapping[str, WeightTransform]:
        return self._settings.masks(self.layer)

    def get_config(self) -> dict[str, Any]:
        """Returns the inner layer and the arguments, `sparsity_m_by_n` among them."""
        config = super().get_config()
        config.pop("transforms")
        return {**config, **self._settings.to_config()}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "PruneLowMagnitude":
        """Returns the layer that `get_config` described, built if it was."""
        config = dict(config)
        for name in ("layer", "pruning_schedule"):
            config[name] = keras.saving.deserialize_keras_object(
                config[name], custom_objects=custom_objects
            )
        return cls(**config)


def prune_low_magnitude(
    to_prune: Any,
    pruning_schedule: Any = _HALF,
    block_size: Sequence[int] = (1, 1),
    block_pooling_type: str = "AVG",
    pruning_policy: Any = None,
    sparsity_m_by_n: Sequence[int] | None = None,
    **kwargs: Any,
) -> Any:
    """Makes a layer, a list of layers or a model prune its kernels while it trains, as TFMOT does.

    All kernels of supported layers are pruned, the first convolution and small ones too;
    `tfaccel.pruning.prune` chooses more carefully. Given an object of tf_keras, TFMOT itself is
    called.

    Args:
        to_prune: a layer (built or not), a list of layers, or a Sequential or Functional model.
        pruning_schedule: `ConstantSparsity`, `PolynomialDecay`, TFMOT's own, or any callable
            `step -> (should_prune, sparsity)`.
        block_size: (inputs, outputs) of a block, for kernels of any rank.
        block_pooling_type: "AVG" or "MAX" of the magnitudes in a block.
        pruning_policy: a `PruningPolicy`, says which layers of a model are pruned.
        sparsity_m_by_n: (m, n), m zeros in each n weights along the inputs. As in TFMOT, masks are
            then made at the first step and kept, whatever the schedule; unlike there, they are
            saved with the model and loaded again.
        **kwargs: for the wrapper of a single layer, such as `input_shape`.

    Returns:
        The layer wrapped, the list, or a new model without an optimizer.

    Raises:
        ValueError: none of these, a subclassed model, an unsupported layer, or an argument that
            does not fit.
    """
    options: dict[str, Any] = {
        "block_size": block_size,
        "block_pooling_type": block_pooling_type,
        "sparsity_m_by_n": sparsity_m_by_n,
    }
    if is_tf_keras(to_prune):
        return tfmot_pruning().prune_low_magnitude(
            to_prune, to_tfmot(pruning_schedule), pruning_policy=pruning_policy, **options, **kwargs
        )
    if isinstance(to_prune, (list, tuple)):
        return [_wrap(layer, pruning_schedule, options) for layer in to_prune]
    if isinstance(to_prune, keras.Sequential) and not keras_private.has_graph(to_prune):
        if pruning_policy is not None:
            pruning_policy.ensure_model_supports_pruning(to_prune)
        layers = [_wrap(layer, pruning_schedule, options) for layer in to_prune.layers]
        return keras.Sequential(layers, name=to_prune.name)
    if isinstance(to_prune, keras.Model):
        return _prune_model(to_prune, _Settings(pruning_schedule, **options), pruning_policy)
    if isinstance(to_prune, keras.layers.Layer):
        return _wrap(to_prune, pruning_schedule, {**options, **kwargs})
    raise ValueError(
        "prune_low_magnitude() takes a Sequential or Functional keras.Model, a keras.layers.Layer "
        f"or a list of layers, but got {to_prune!r} ({type(to_prune).__name__})."
    )


def strip_pruning(model: keras.Model) -> keras.Model:
    """Returns a plain model with zeros where weights were pruned.

    Raises:
        ValueError: the model is subclassed or none, or its masks were never made, since
            `UpdatePruningStep` was forgotten (TFMOT gives the dense model then).
    """
    if is_tf_keras(model):
        return tfmot_pruning().strip_pruning(model)
    _check_graph(model, "strip_pruning")
    return strip(model)


def prune_scope() -> AbstractContextManager[Any]:
    """Returns a scope in which pruned models can be loaded.

    tfaccel registers its layers when `tfaccel.compat.tfmot` is imported, so that loading works
    without the scope too.
    """
    return keras.saving.custom_object_scope(
        {"PruneLowMagnitude": PruneLowMagnitude, "TransformedLayer": TransformedLayer}
    )


class _Settings:
    """What TFMOT's arguments mean here."""

    def __init__(
        self,
        pruning_schedule: Any,
        block_size: Sequence[int],
        block_pooling_type: str,
        sparsity_m_by_n: Sequence[int] | None,
    ) -> None:
        check_in("block_pooling_type", block_pooling_type, tuple(_POOLINGS))
        self._given = (pruning_schedule, block_size, block_pooling_type, sparsity_m_by_n)
        self.schedule = schedules.get(pruning_schedule)
        height, width = _two("block_size", block_size)
        self.pattern: Pattern = Element()
        if (height, width) != (1, 1):
            self.pattern = Block(height, width, _POOLINGS[block_pooling_type])
        if sparsity_m_by_n is not None:
            zeros, group = _two("sparsity_m_by_n", sparsity_m_by_n)
            self.pattern = NofM(group - zeros, group)
            self.schedule = schedules.ConstantSparsity(zeros / group, 1, 1, 1)

    def masks(self, layer: keras.layers.Layer) -> dict[str, WeightTransform]:
        """Returns a new mask for each prunable weight of a built layer."""
        if hasattr(layer, "get_prunable_weights"):
            wanted = {id(variable) for variable in layer.get_prunable_weights()}
            keys = [key for key, variable in weight_keys(layer).items() if id(variable) in wanted]
        else:
            keys = list(prunable_keys(layer, by_name=False))
        return {key: PruningMask(self.schedule, self.pattern, "layer", Magnitude()) for key in keys}

    def to_config(self) -> dict[str, Any]:
        schedule, block, pooling, m_by_n = self._given
        return {
            "pruning_schedule": keras.saving.serialize_keras_object(schedules.get(schedule)),
            "block_size": list(block),
            "block_pooling_type": pooling,
            "sparsity_m_by_n": None if m_by_n is None else list(m_by_n),
        }


def _prune_model(model: keras.Model, settings: _Settings, policy: Any) -> keras.Model:
    _check_graph(model, "prune_low_magnitude")
    if policy is not None:
        policy.ensure_model_supports_pruning(model)
    pruned_already = set()
    for layer in flat_layers(model):
        if isinstance(layer, TransformedLayer):
            if any(isinstance(transform, PruningMask) for _, transform in layer.transforms):
                pruned_already.add(id(layer.layer))
        elif not isinstance(layer, keras.layers.InputLayer):
            _check_layer(layer)

    def rules(layer: keras.layers.Layer) -> Mapping[str, WeightTransform] | None:
        if id(layer) in pruned_already or (policy is not None and not policy.allow_pruning(layer)):
            return None
        return settings.masks(layer)

    return transform_model(model, rules)


def _wrap(layer: keras.layers.Layer, schedule: Any, options: Mapping[str, Any]) -> Any:
    if isinstance(layer, TransformedLayer):
        return layer
    if isinstance(layer, keras.layers.InputLayer):
        return clone_operation(layer)
    # A layer with weights belongs to a model, which a rewrite leaves as it is.
    inner = clone_built(layer) if layer.built else layer
    return PruneLowMagnitude(inner, schedule, **options)


def _check_layer(layer: Any) -> None:
    if not isinstance(layer, keras.layers.Layer) or isinstance(layer, keras.Model):
        raise ValueError(  # noqa: TRY004  TFMOT's kind of error
            f"A pruned layer is a keras.layers.Layer and no model, but got {layer!r}."
        )
    builtin = type(layer).__module__.partition(".")[0] in ("keras", "tfaccel")
    if not builtin and not hasattr(layer, "get_prunable_weights"):
        raise ValueError(
            f"prune_low_magnitude() does not know the layer {layer.name!r} of class "
            f"{type(layer).__name__}. Give the class a method get_prunable_weights() that returns "
            "its kernels (see PrunableLayer; an empty list if there are none), or prune by "
            "tfaccel.pruning.prune, which leaves unknown layers alone."
        )


def _check_graph(model: Any, verb: str) -> None:
    try:
        check_model(model, verb)
    except TypeError as error:  # TFMOT's kind of error, which callers may expect
        raise ValueError(str(error)) from error


def _two(name: str, value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(pair) != 2 or not all(isinstance(part, int) for part in pair):
        raise ValueError(f"{name} must be a pair of integers, but got {value!r}.")
    return pair[0], pair[1]
