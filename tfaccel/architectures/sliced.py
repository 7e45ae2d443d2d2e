"""Sliced recurrent networks: long sequences in slices that run side by side."""

import copy
from typing import Any

import keras
import numpy as np
from keras import ops

from tfaccel.core.checks import check_positive, check_type


@keras.saving.register_keras_serializable("tfaccel")
class SlicedRNN(keras.layers.Layer):
    """Sliced recurrent network (Yu & Liu 2018, "Sliced Recurrent Neural Networks").

    A sequence of T steps is cut into `slices` parts, each of these again, `levels` times: slices **
    levels minimum subsequences of T / slices ** levels steps. A recurrent layer runs on all of them
    side by side; their last outputs are sequences of `slices` steps, on which the next level's
    layer runs, and so on to a single vector (section 3.2, figure 2). In place of T steps one after
    the other there are T / slices ** levels + levels * slices (eq. 14). Each level has a layer of
    its own. With `levels` 0 or `slices` 1 it is the plain recurrent layer.

    Args:
        layer: a recurrent layer as a template, such as keras.layers.GRU(64): each level gets a copy
            of it with weights of its own. It must give its last output only. Initializers with a
            seed begin levels of the same shape alike.
        slices: n, parts that each sequence is cut into at every level.
        levels: k, how often.
        **kwargs: `name`, `trainable`; `dtype` is the template's.

    Input shape:
        [batch, time, features], the time known and divisible by slices ** levels: pad with zeros
        in front, as the paper does. A mask [batch, time]: masked steps are passed over, and so is a
        subsequence that is masked as a whole.

    Output shape:
        [batch, units].

    Raises:
        TypeError: `layer` is no recurrent layer.
        ValueError: an argument is out of range, the template gives sequences, states or is
            stateful or of another dtype, or the time is unknown or not divisible.
    """

    def __init__(
        self, layer: keras.layers.Layer, slices: int = 8, levels: int = 2, **kwargs: Any
    ) -> None:
        check_type("layer", layer, keras.layers.Layer)
        super().__init__(**{"dtype": layer.dtype_policy, **kwargs})
        if not hasattr(layer, "return_sequences"):
            raise TypeError(
                f"SlicedRNN() needs a recurrent layer such as keras.layers.GRU(64), but got "
                f"{type(layer).__name__}."
            )
        for flag in ("return_sequences", "return_state", "stateful"):
            if getattr(layer, flag, False):
                raise ValueError(
                    f"SlicedRNN() needs a layer that gives its last output only, but {layer.name!r}"
                    f" has {flag}=True. Leave it out."
                )
        if self.dtype_policy != layer.dtype_policy:
            raise ValueError(
                f"SlicedRNN() computes in its template's dtype, {layer.dtype_policy.name!r}, but "
                f"got dtype={self.dtype_policy.name!r}. Give it to {layer.name!r}."
            )
        check_type("slices", slices, (int, np.integer))
        check_type("levels", levels, (int, np.integer))
        check_positive("slices", slices)
        if levels < 0:
            raise ValueError(f"levels must be 0 or above, but got {levels!r}.")
        self.slices, self.levels = int(slices), int(levels)
        config = _without_shapes(layer.get_config())
        self.level_layers = [
            type(layer).from_config(copy.deepcopy({**config, "name": f"level_{level}"}))
            for level in range(self.levels + 1 if self.slices > 1 else 1)
        ]
        self.supports_masking = True

    @property
    def parts(self) -> int:
        """Minimum subsequences of one sequence."""
        return int(self.slices ** (len(self.level_layers) - 1))

    def build(self, input_shape: Any) -> None:
        """Builds the layer of each level."""
        shape = self._check_input(input_shape)
        for layer in self.level_layers:
            layer.build(shape)
            shape = (None, self.slices, layer.compute_output_shape(shape)[-1])

    def _check_input(self, shape: Any) -> tuple[int | None, ...]:
        shape = tuple(shape)
        if len(shape) != 3 or None in shape[1:]:
            raise ValueError(
                f"SlicedRNN {self.name!r} takes [batch, time, features], time and features known, "
                f"but got the shape {shape}. Give keras.Input the whole shape."
            )
        if shape[1] % self.parts:
            longer = -(-shape[1] // self.parts) * self.parts
            raise ValueError(
                f"SlicedRNN {self.name!r} cuts sequences into {self.parts} parts ({self.slices} "
                f"slices, {self.levels} levels), but got {shape[1]} steps. Pad them in front to "
                f"{longer} (keras.layers.ZeroPadding1D(({longer - shape[1]}, 0))), or take fewer "
                "slices or levels."
            )
        return (None, shape[1] // self.parts, shape[2])

    def call(self, inputs: Any, mask: Any = None, training: bool | None = None) -> Any:
        """Runs the layer."""
        (_, steps, _), x = self._check_input(inputs.shape), inputs
        batch, parts = inputs.shape[0], self.parts
        for layer in self.level_layers:
            # A batch of known size stays so: converters fold what a state of zeros leads to.
            count = -1 if batch is None else batch * parts
            x = ops.reshape(x, (count, steps, x.shape[-1]))
            arguments: dict[str, Any] = {}
            if mask is not None:
                mask = ops.reshape(mask, (count, steps))
                arguments["mask"] = mask
            x = layer(x, training=training, **arguments)
            if mask is not None:
                mask = ops.any(mask, axis=-1)
            steps, parts = self.slices, parts // self.slices
        return x

    def compute_mask(self, inputs: Any, mask: Any = None) -> None:  # noqa: ARG002
        """The output is no sequence."""
        return

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """[batch, units]."""
        shape = self._check_input(input_shape)
        for layer in self.level_layers:
            shape = (None, self.slices, layer.compute_output_shape(shape)[-1])
        return (input_shape[0], shape[-1])

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "layer": _without_shapes(keras.saving.serialize_keras_object(self.level_layers[0])),
            "slices": self.slices,
            "levels": self.levels,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SlicedRNN":
        """Makes the layer again."""
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**{**config, "layer": layer})


def _without_shapes(config: Any) -> Any:
    """Leaves out for which shapes cells and inner layers were built: each level has its own."""
    if isinstance(config, dict):
        return {k: _without_shapes(v) for k, v in config.items() if k != "build_config"}
    if isinstance(config, list):
        return [_without_shapes(value) for value in config]
    return config
