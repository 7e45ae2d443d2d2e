"""Layers that are wrapped before they have weights, as TFMOT's code does in a definition."""

from collections.abc import Mapping
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.transforms import TransformedLayer, WeightTransform


class LateTransformedLayer(TransformedLayer):
    """A transformed layer that gets its transforms when its inner layer gets its weights.

    Subclasses define `_new_transforms`, call `_begin` when they are made, and get and restore their
    own arguments as config.
    """

    def _new_transforms(self) -> Mapping[str, WeightTransform]:
        """Returns a new transform for each weight key of the inner layer, which is built."""
        raise NotImplementedError(f"{type(self).__name__} must define _new_transforms.")

    def _begin(self, layer: keras.layers.Layer, kwargs: dict[str, Any]) -> None:
        """Holds a layer, built or not; takes its input shape, or that of the arguments."""
        shape = kwargs.pop("input_shape", None) or keras_private.input_shape_argument(layer)
        self._hold(layer, kwargs)
        if shape is not None:
            keras_private.set_input_shape_argument(self, tuple(shape))
        if layer.built:
            self._finish()

    def _finish(self) -> None:
        """Puts the transforms on."""
        self._attach([*self._new_transforms().items()])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Builds the inner layer, whatever it is called with, and puts transforms on it."""
        if not self.layer.built:
            # A symbolic call builds any layer; `build` has another signature in each.
            self.layer(*_symbolic(args), **_symbolic(kwargs))
        if not self.built:
            self._finish()
        return super().__call__(*args, **kwargs)

    def build(self, input_shape: Any = None) -> None:
        """Builds the inner layer if `input_shape` alone does."""
        if not self.layer.built:
            self.layer.build(input_shape)
        if not self.built:
            self._finish()


def _symbolic(arguments: Any) -> Any:
    def to_symbol(leaf: Any) -> Any:
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            dtype = keras.backend.standardize_dtype(leaf.dtype)
            return keras.KerasTensor(tuple(leaf.shape), dtype)
        return leaf

    return keras.tree.map_structure(to_symbol, arguments)
