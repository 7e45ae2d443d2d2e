"""The private Keras names that we cannot do without, each watched by a canary test.

Nothing else in tfaccel may touch `keras.src` or an underscore of a Keras object. When a Keras
release moves one of these, `tests/core/test_keras_private.py` fails and names it before a user
meets it.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import keras

_CALL_ATTRIBUTES = (
    "_call_signature",
    "call_signature_parameters",
    "_call_has_mask_arg",
    "_call_context_args",
    "_allow_non_tensor_positional_args",
)


def functional_of(model: keras.Model) -> keras.Model:
    """Returns the graph-holding model: a Sequential model's Functional twin, else the model."""
    if isinstance(model, keras.Sequential):
        return model._functional  # noqa: SLF001
    return model


def has_graph(model: Any) -> bool:
    """Whether `model` is a Functional model, or a Sequential model whose input shape is known."""
    functional = functional_of(model) if isinstance(model, keras.Model) else None
    return functional is not None and hasattr(functional, "_nodes_by_depth")


def call_nodes(model: keras.Model) -> list[Any]:
    """Returns the call nodes of a model's graph, producers before consumers.

    A node has `operation`, `arguments.args`, `arguments.kwargs`, `outputs` (flat KerasTensors) and
    `is_input`.
    """
    by_depth = functional_of(model)._nodes_by_depth  # noqa: SLF001
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]


def sublayers(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """Yields the layer itself, then every layer inside it, parents first."""
    yield from layer._flatten_layers(include_self=True, recursive=True)  # noqa: SLF001


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns the variables of a layer that are not those of its inner layers."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]  # noqa: SLF001


def children(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the inner layers of a layer, one level down; those of a Sequential model itself."""
    return list(layer.layers if isinstance(layer, keras.Model) else layer._layers)  # noqa: SLF001


def seed_states(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns the states of all random-seed generators of a layer and of its inner layers."""
    return [
        generator.state
        for inner in sublayers(layer)
        for generator in inner._seed_generators  # noqa: SLF001
    ]


def set_own_trainable(layer: keras.layers.Layer, trainable: bool) -> None:
    """Sets the flag of one layer or model and leaves those of its inner layers as they are."""
    layer._trainable = trainable  # noqa: SLF001


def says_how_it_is_built(layer: keras.layers.Layer) -> bool:
    """Whether the class of a layer has a `build_from_config` or `get_build_config` of its own."""
    base = keras.layers.Layer
    return (
        type(layer).build_from_config is not base.build_from_config
        or type(layer).get_build_config is not base.get_build_config
    )


def trusted_deserialization() -> AbstractContextManager[Any]:
    """Returns a scope in which Keras deserializes lambdas, for what is in memory already."""
    from keras.src.saving.serialization_lib import SafeModeScope

    return SafeModeScope(safe_mode=False)


def adopt_call_signature(wrapper: keras.layers.Layer, layer: keras.layers.Layer) -> None:
    """Makes Keras bind, mask and check a wrapper's call arguments as it does the inner layer's.

    Keras reads the signature of `call` to tell tensors from options and to hand masks over. A
    wrapper with `call(*args, **kwargs)` would hide that, and `value=tensor, use_causal_mask=True`
    would fail. The wrapper always receives `training`.
    """
    for name in _CALL_ATTRIBUTES:
        setattr(wrapper, name, getattr(layer, name))
    wrapper._call_has_training_arg = True  # noqa: SLF001
    wrapper._call_has_context_arg = {  # noqa: SLF001
        **layer._call_has_context_arg,  # noqa: SLF001
        "training": True,
    }


def input_shape_argument(layer: keras.layers.Layer) -> tuple[int | None, ...] | None:
    """Returns what `input_shape=` a layer was made with, by which Sequential builds itself."""
    return getattr(layer, "_input_shape_arg", None)


def set_input_shape_argument(layer: keras.layers.Layer, shape: tuple[int | None, ...]) -> None:
    """Makes Sequential build itself for samples of a shape when it is given this layer first."""
    layer._input_shape_arg = shape  # noqa: SLF001


def takes_training(layer: keras.layers.Layer) -> bool:
    """Whether the layer's `call` has an argument named training."""
    return bool(layer._call_has_training_arg)  # noqa: SLF001


def has_functional_constructor(model_class: type) -> bool:
    """Whether a subclass of Functional is made as `model_class(inputs, outputs, name=...)`."""
    from keras.src.models.functional import functional_like_constructor

    # Keras lets (*args, more=1, **kwargs) pass, and forgets `more` when it makes the model anew.
    more = inspect.getfullargspec(model_class.__init__).kwonlyargs  # type: ignore[misc]
    return bool(functional_like_constructor(model_class)) and not more


def replace_clip_gradients(optimizer: keras.optimizers.Optimizer, hook: Any) -> Any:
    """Makes one optimizer call `hook(grads)` where it would clip; returns what it called before.

    Keras clips exactly once per update: after gradient accumulation and loss-scale unscaling,
    before weight decay. The attribute is set on the instance, its class stays as it is.
    """
    original = optimizer._clip_gradients  # noqa: SLF001
    optimizer._clip_gradients = hook  # noqa: SLF001
    return original


def watch_applied_variables(
    optimizer: keras.optimizers.Optimizer, variables: list[keras.Variable]
) -> None:
    """Makes one optimizer write down, in `variables`, which of them an update is for.

    Keras leaves out those without a gradient and tells `_clip_gradients` nothing of it.
    """
    original = optimizer._backend_apply_gradients  # noqa: SLF001

    def apply(grads: Any, trainable_variables: Any) -> Any:
        variables[:] = trainable_variables
        return original(grads, trainable_variables)

    optimizer._backend_apply_gradients = apply  # noqa: SLF001


def replace_moments(layer: keras.layers.BatchNormalization, hook: Any) -> Any:
    """Makes one layer call `hook(inputs, mask)` for the mean and variance of a batch.

    Returns what it called before. The attribute is set on the instance, its class stays as it is.
    """
    original = layer._moments  # noqa: SLF001
    layer._moments = hook  # noqa: SLF001
    return original


def trained_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Returns the variables that an optimizer was built for."""
    return list(optimizer._trainable_variables)  # noqa: SLF001


def loss_scale_optimizer_that_builds(
    optimizer: keras.optimizers.Optimizer,
) -> keras.optimizers.LossScaleOptimizer | None:
    """Returns the LossScaleOptimizer that is building its inner `optimizer` right now, or None.

    Called from within `optimizer.build`. The inner optimizer holds no reference to the one around
    it, which `compile` may have put there, so it is found on the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if (
            isinstance(caller, keras.optimizers.LossScaleOptimizer)
            and getattr(caller, "inner_optimizer", None) is optimizer
        ):
            return caller
        frame = frame.f_back
    return None


def is_compiled_by_xla() -> bool:
    """Whether the TensorFlow function that is being traced will be compiled by XLA as a whole."""
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    return bool(control_flow_util.GraphOrParentsInXlaContext(graph))
