"""Plain Keras layers that together stand for one layer, and which layers that works for."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from tfaccel.core.cloning import clone_operation
from tfaccel.core.graph import flat_layers
from tfaccel.core.transforms import TransformedLayer
from tfaccel.rewriting.calls import LayerCall

Array = npt.NDArray[Any]

LINEAR = (layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D)


def why_not(layer: Any, calls: Iterable[LayerCall], wrapped: set[int]) -> str | None:
    """Returns why a layer cannot be replaced by a chain of plain layers, None if it can.

    Args:
        layer: any layer.
        calls: how it is called.
        wrapped: ids of the layers that a technique has wrapped.
    """
    if id(layer) in wrapped:
        return "wrapped by a technique: tfaccel.strip() first"
    # Subclasses may do more in their call than the layer that they derive from.
    if type(layer) not in LINEAR:
        return _why_other(layer)
    if getattr(layer, "groups", 1) > 1:
        return "grouped convolution: each group has few channels already"
    # LoRA and Keras's own quantization add weights; so does an activation such as PReLU.
    if len(layer.weights) != 1 + layer.use_bias:
        return "has weights beside kernel and bias"
    if layer.kernel_constraint is not None:
        return "its kernel is constrained, which factors are not"
    if not all(call.plain for call in calls):
        return "called with several tensors"
    return None


def _why_other(layer: Any) -> str:
    if isinstance(layer, (layers.DepthwiseConv1D, layers.DepthwiseConv2D)):
        return "depthwise convolution: one small kernel per channel"
    if isinstance(layer, LINEAR):
        return f"{type(layer).__name__} may do more than its base class"
    return "no dense layer or convolution" if layer.weights else "no weights"


def wrapped_layers(model: keras.Model) -> set[int]:
    """Returns the ids of the layers inside `TransformedLayer`s."""
    return {id(x.layer) for x in flat_layers(model) if isinstance(x, TransformedLayer)}


class ChainBuilder:
    """Makes the layers of a chain one after the other, each built, with its weights.

    Args:
        layer: the layer that the chain stands for.
        input_shape: of its input, batch dimension included.
        taken: names that the chain must not use; the names that it uses are added.
    """

    def __init__(self, layer: Any, input_shape: tuple[int | None, ...], taken: set[str]) -> None:
        self.layer = layer
        self._shape: Any = (None, *input_shape[1:])
        self._taken = taken
        self.chain: list[keras.layers.Layer] = []

    @property
    def dense(self) -> bool:
        """Whether the layer is dense, not a convolution."""
        return isinstance(self.layer, layers.Dense)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Sides of the kernel; () for a dense layer."""
        return tuple(self.layer.kernel.shape[:-2])

    def add(self, suffix: str, kernel: Array, **config: Any) -> None:
        """Adds a layer of the same class, without bias and activation.

        Args:
            suffix: what the layer does; its name is `<name of the layer>_<suffix>`.
            kernel: its weights.
            config: what differs from the config of the layer, beside the number of outputs.
        """
        self._finish(self._part(self._name(suffix), kernel, config), [kernel])

    def end(self, kernel: Array, bias: Array | None, **config: Any) -> None:
        """Adds the last layer, with the name, the bias and the activation of the original."""
        layer = self.layer
        part = self._part(layer.name, kernel, {"use_bias": layer.use_bias, **config})
        # Assigned, not deserialized: a function or class of the user may not be registered.
        inner = isinstance(layer.activation, keras.layers.Layer)
        part.activation = clone_operation(layer.activation) if inner else layer.activation
        part.bias_regularizer = layer.bias_regularizer
        part.bias_constraint = layer.bias_constraint
        part.activity_regularizer = layer.activity_regularizer
        self._finish(part, [kernel] if bias is None else [kernel, bias])

    def add_depthwise(self, kernel: Array) -> None:
        """Adds the depthwise convolution that moves as the layer does.

        Args:
            kernel: [height, width, input channels, multiplier].
        """
        layer = self.layer
        part = layers.DepthwiseConv2D(
            kernel.shape[:2],
            strides=layer.strides,
            padding=layer.padding,
            depth_multiplier=kernel.shape[-1],
            data_format=layer.data_format,
            dilation_rate=layer.dilation_rate,
            use_bias=False,
            name=self._name("depthwise"),
            dtype=layer.dtype_policy,
            trainable=layer.trainable,
        )
        part.depthwise_regularizer = layer.kernel_regularizer
        self._finish(part, [kernel])

    def _part(self, name: str, kernel: Array, changes: dict[str, Any]) -> Any:
        layer = self.layer
        size = "units" if self.dense else "filters"
        config = {key: value for key, value in layer.get_config().items() if key not in _RESET}
        config = {**config, "name": name, "use_bias": False, size: kernel.shape[-1], **changes}
        part = type(layer).from_config(config)
        part.kernel_regularizer = layer.kernel_regularizer
        return part

    def _finish(self, part: Any, weights: list[Array]) -> None:
        part.build(self._shape)
        part.set_weights([np.asarray(w, np.float32) for w in weights])
        self._shape = part.compute_output_shape(self._shape)
        self.chain.append(part)

    def _name(self, suffix: str) -> str:
        name, number = f"{self.layer.name}_{suffix}", 1
        while name in self._taken:
            number += 1
            name = f"{self.layer.name}_{suffix}_{number}"
        self._taken.add(name)
        return name


# Assigned where they belong, or without meaning once the weights are there.
_RESET = (
    "activation",
    "kernel_initializer",
    "bias_initializer",
    "kernel_regularizer",
    "bias_regularizer",
    "activity_regularizer",
    "bias_constraint",
    "lora_rank",
    "lora_alpha",
    "quantization_config",
)
