"""One mechanism for every change to weights: use f(w) in place of w.

A pruning mask, fake quantization, binarization and clustering are all a `WeightTransform`. The
`TransformedLayer` around any Keras layer runs it with the transformed weights in place of its own,
and the gradient flows through the transform to the raw ones. Transforms of one weight stand in one
list, always in the order prune, cluster, quantize, so that techniques compose.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import keras

from tfaccel.core import keras_private
from tfaccel.core.cloning import clone_built, recurrent_states
from tfaccel.core.configurable import Configurable
from tfaccel.core.graph import flat_layers
from tfaccel.core.walking import map_layers

PRUNE, CLUSTER, QUANTIZE = range(3)


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """A variable that a transform keeps with the model, such as a mask or a range.

    Attributes:
        shape: of the variable.
        dtype: name of its type.
        initializer: a Keras initializer or its name.
        trainable: whether the optimizer updates it.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    initializer: Any = "zeros"
    trainable: bool = False


class WeightTransform(Configurable):
    """What stands in for a weight: f(w), its state, and how it is baked in.

    Subclasses are `@dataclasses.dataclass(eq=False)`, registered with Keras under the package
    "tfaccel", and written in `keras.ops`. The fields are the config.

    Attributes:
        stage: PRUNE, CLUSTER or QUANTIZE; transforms of a weight run in this order.
        state: the variables that `state_spec` declared, by name; there once a layer holds it.
    """

    stage: ClassVar[int]
    state: Mapping[str, keras.Variable] = {}

    def state_spec(self, shape: tuple[int, ...], dtype: str) -> dict[str, StateSpec]:  # noqa: ARG002
        """Returns what variables a weight of this shape and type needs; none by default."""
        return {}

    def initialize(self, weight: Any) -> None:
        """Sets the state from the weight's value, once, when the model is rewritten."""

    def __call__(self, weight: Any, training: bool | None = None) -> Any:
        """Returns what the layer uses in place of `weight`, of the same shape.

        Args:
            weight: tensor in the variable's own type (float32 under mixed precision too).
            training: whether the layer runs in training.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__.")

    def finalize(self, weight: Any) -> Any:
        """Returns the weight to keep when the transform is stripped; by default f(w)."""
        return self(weight, training=False)

    def constrain(self, weight: Any) -> Any:
        """Returns what stays of the raw weight after an update; by default all of it."""
        return weight


Transforms = Sequence[tuple[str, WeightTransform]]


@keras.saving.register_keras_serializable("tfaccel")
class TransformedLayer(keras.layers.Wrapper):
    """Any built Keras layer, with some of its weights transformed whenever they are used.

    Args:
        layer: a built layer; the wrapper holds it as `.layer` and goes by its name.
        transforms: pairs of a weight's key (see `weight_keys`) and its transform. Those of one
            weight are applied by stage.

    Raises:
        ValueError: the layer is not built, has no weight of that key, or a transform is in use
            already.

    Example:
        >>> dense = keras.layers.Dense(2)
        >>> dense.build((None, 3))
        >>> sorted(weight_keys(dense))
        ['bias', 'kernel']
    """

    def __init__(self, layer: keras.layers.Layer, transforms: Transforms, **kwargs: Any) -> None:
        if not layer.built:
            raise ValueError(
                f"TransformedLayer needs a built layer, but {layer.name!r} has no weights yet. "
                "Call it on an input first."
            )
        self._hold(layer, kwargs)
        self._attach(transforms)

    def _hold(self, layer: keras.layers.Layer, kwargs: dict[str, Any]) -> None:
        """Makes this the wrapper of `layer`, built or not, without transforms yet."""
        kwargs = {
            "name": layer.name,
            "trainable": layer.trainable,
            **kwargs,
            # The inner layer casts its own inputs and variables. Under a mixed policy the wrapper
            # itself computes in the variables' type, so that transforms see full precision.
            "dtype": layer.variable_dtype,
            "autocast": False,
        }
        super().__init__(layer, **kwargs)
        keras_private.adopt_call_signature(self, layer)
        self.supports_masking = layer.supports_masking
        self.supports_jit = layer.supports_jit
        self._transforms: tuple[tuple[str, WeightTransform], ...] = ()

    def _attach(self, transforms: Transforms) -> None:
        """Puts transforms on the weights of the inner layer, which is built by now."""
        variables = weight_keys(self.layer)
        self._transforms = tuple(
            sorted(_checked(self.layer, transforms, variables), key=lambda pair: pair[1].stage)
        )
        for key, transform in self._transforms:
            self._add_state(key, transform, variables[key])
            _add_constraint(variables[key], transform)
        self.built = True

    def _add_state(self, key: str, transform: WeightTransform, variable: keras.Variable) -> None:
        specs = transform.state_spec(tuple(variable.shape), variable.dtype)
        prefix = f"{key}_{type(transform).__name__}".replace("/", "_").replace("#", "_")
        transform.state = {
            name: self.add_weight(
                shape=spec.shape,
                dtype=spec.dtype,
                initializer=spec.initializer,
                trainable=spec.trainable,
                autocast=False,
                name=f"{prefix}_{name}",
            )
            for name, spec in specs.items()
        }

    @property
    def transforms(self) -> list[tuple[str, WeightTransform]]:
        """Pairs of weight key and transform, in the order in which they are applied."""
        return list(self._transforms)

    def variable(self, key: str) -> keras.Variable:
        """Returns the raw variable of the inner layer that `key` names."""
        return weight_keys(self.layer)[key]

    def transformed(self, training: bool | None = None) -> list[tuple[keras.Variable, Any]]:
        """Returns each raw variable that has transforms, with the value that stands in for it."""
        values: dict[str, Any] = {}
        variables = weight_keys(self.layer)
        for key, transform in self._transforms:
            value = values.get(key)
            weight = keras.ops.convert_to_tensor(variables[key]) if value is None else value
            values[key] = transform(weight, training=training)
        return [(variables[key], value) for key, value in values.items()]

    def call(self, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Runs the inner layer on the transformed weights."""
        # Every variable is mapped, not only the transformed ones: on JAX the trainer itself runs
        # in a stateless scope, and a variable that this scope lacks would be read as a constant.
        variables = [*self.layer.variables, *recurrent_states(self.layer)]
        mapping = {id(v): (v, keras.ops.convert_to_tensor(v)) for v in variables}
        mapping.update({id(v): (v, value) for v, value in self.transformed(training)})
        if keras_private.takes_training(self.layer):
            kwargs["training"] = training
        with keras.StatelessScope(list(mapping.values()), collect_losses=True) as scope:
            before = {id(v): scope.get_current_value(v) for v in variables}
            outputs = self.layer(*args, **kwargs)
        # Batch-norm statistics, seeds and recurrent states were written in the scope only.
        for variable in variables:
            after = scope.get_current_value(variable)
            if after is not None and after is not before.get(id(variable)):
                variable.assign(after)
        for loss in scope.losses:
            # A tensor of our own: Keras on JAX knows losses by identity, and the inner layer has
            # claimed this one already, so that it would count twice.
            self.add_loss(loss + 0)
        return outputs

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the inner layer says of its output."""
        if not keras_private.takes_training(self.layer):
            kwargs.pop("training", None)
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the inner layer says of its output's shape."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_mask(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the inner layer says of its output's mask."""
        return self.layer.compute_mask(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Returns the inner layer and the transforms, serialized."""
        config = super().get_config()
        config.pop("dtype")
        config["transforms"] = [
            [key, keras.saving.serialize_keras_object(transform)]
            for key, transform in self._transforms
        ]
        return config

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "TransformedLayer":
        """Returns the layer that `get_config` described, the inner one built."""

        def restore(value: Any) -> Any:
            return keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)

        config = dict(config)
        layer = restore(config.pop("layer"))
        transforms = [(key, restore(value)) for key, value in config.pop("transforms")]
        return cls(layer, transforms, **config)


Rules = Callable[[keras.layers.Layer], Mapping[str, WeightTransform] | None]


def transform_model(model: keras.Model, rules: Rules) -> keras.Model:
    """Returns a model in which some weights are transformed.

    Args:
        model: a built Functional or Sequential model; not changed. Nested models are handled too.
        rules: gets each layer of `model` (the inner one, where it is transformed already) and
            returns a new transform for each weight key that should have one, or None. New
            transforms join those that are there.

    Returns:
        The rewritten model, weights and the state of earlier transforms carried over.

    Raises:
        ValueError: a weight has a transform of this class already, or a key names no weight.
    """

    def wrapped(layer: keras.layers.Layer) -> TransformedLayer | None:
        new = rules(layer.layer if isinstance(layer, TransformedLayer) else layer)
        return wrap_layer(layer, new) if new else None

    return map_layers(model, wrapped)


def transformed_layers(model: keras.Model) -> list[TransformedLayer]:
    """Returns the transformed layers of a model, those of nested models included, each once."""
    return [layer for layer in _all_layers(model) if isinstance(layer, TransformedLayer)]


def weight_keys(layer: keras.layers.Layer) -> dict[str, keras.Variable]:
    """Returns the weights of a built layer by key, such as "kernel" or "query/kernel".

    A key is made of the names of the inner layers on the way to the variable
    ("forward_lstm/lstm_cell/kernel"), not of the path that Keras gives it, which depends on how the
    layer was built. Numbers at the end of inner layers' names are dropped, since those of unnamed
    ones differ from process to process; what then has the same key gets "#1", "#2" in order.
    """
    keys: dict[str, keras.Variable] = {}
    weights = {id(variable) for variable in layer.weights}
    for base, variable in _named_variables(layer, "", set()):
        if id(variable) in weights:
            key, number = base, 0
            while key in keys:
                number += 1
                key = f"{base}#{number}"
            keys[key] = variable
    return keys


def _named_variables(
    layer: keras.layers.Layer, prefix: str, seen: set[int]
) -> Iterator[tuple[str, keras.Variable]]:
    if id(layer) in seen:
        return
    seen.add(id(layer))
    for variable in keras_private.own_variables(layer):
        if id(variable) not in seen:
            seen.add(id(variable))
            yield f"{prefix}{variable.name}", variable
    for inner in keras_private.children(layer):
        name = re.sub(r"_\d+$", "", inner.name)
        yield from _named_variables(inner, f"{prefix}{name}/", seen)


def _checked(
    layer: keras.layers.Layer, transforms: Transforms, variables: Mapping[str, keras.Variable]
) -> Iterator[tuple[str, WeightTransform]]:
    seen = set()
    for key, transform in transforms:
        if key not in variables:
            raise ValueError(
                f"Layer {layer.name!r} has no weight {key!r}; "
                f"it has {', '.join(sorted(variables)) or 'none'}."
            )
        if (key, type(transform)) in seen:
            raise ValueError(
                f"The weight {key!r} of layer {layer.name!r} has a {type(transform).__name__} "
                "already. Strip the model first (tfaccel.strip), or exclude this layer."
            )
        if transform.state:
            raise ValueError(
                f"This {type(transform).__name__} belongs to another weight already. "
                f"Make a new one for {layer.name!r}."
            )
        seen.add((key, type(transform)))
        yield key, transform


def _add_constraint(variable: keras.Variable, transform: WeightTransform) -> None:
    """Makes optimizers call the transform's `constrain`, after the constraint that is there.

    It stands on the variable, not in the layer's config, so that a plain copy is free of it.
    """
    if type(transform).constrain is WeightTransform.constrain:
        return
    own = variable.constraint
    variable.constraint = lambda weight: transform.constrain(own(weight) if own else weight)


def wrap_layer(
    layer: keras.layers.Layer,
    new: Mapping[str, WeightTransform],
    inner: keras.layers.Layer | None = None,
) -> TransformedLayer:
    """Returns a copy of `layer` in which the weights named by `new` are transformed too.

    Args:
        layer: a built layer, transformed already or not; not changed.
        new: for each key a new transform, whose state is initialized from the weight.
        inner: a built layer with the same weight keys that takes the place of the layer (or of the
            inner one); it is taken over. By default a copy.
    """
    old = layer.transforms if isinstance(layer, TransformedLayer) else []
    if inner is None:
        inner = clone_built(layer.layer if isinstance(layer, TransformedLayer) else layer)
    kept = [(key, type(t).from_config(t.get_config())) for key, t in old]
    result = TransformedLayer(inner, [*kept, *new.items()], name=layer.name)
    for (_, before), (_, copy) in zip(old, kept, strict=True):
        for name, variable in before.state.items():
            copy.state[name].assign(keras.ops.copy(variable.value))
    for key, transform in new.items():
        transform.initialize(keras.ops.convert_to_tensor(result.variable(key)))
    return result


def _all_layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    if keras_private.has_graph(model):
        yield from flat_layers(model)
    else:  # a Distiller or another model of models
        seen: set[int] = set()
        for layer in keras_private.sublayers(model):
            if id(layer) not in seen:
                seen.add(id(layer))
                yield layer
