"""Back to plain Keras: whatever tfaccel put into a model comes out, its effect baked in."""

from typing import Any, Protocol, runtime_checkable

import keras

from tfaccel.core.checks import check_model
from tfaccel.core.cloning import clone_built
from tfaccel.core.transforms import TransformedLayer, weight_keys
from tfaccel.core.walking import REMOVED, map_layers


@runtime_checkable
class Strippable(Protocol):
    """A layer of ours that says what stands in its place in a plain model."""

    def strip_layer(self) -> keras.layers.Layer | None:
        """Returns the plain layer, or None if the layer is simply taken out."""


def strip(model: keras.Model) -> keras.Model:
    """Returns a plain Keras model: no class of tfaccel in it, all that was trained baked in.

    Masks, clusters and quantized weights become the weights themselves, so the outputs stay the
    same. Fake quantization of *activations* has no plain equivalent and is taken out: the outputs
    then differ by its rounding. To deploy a quantization-aware model, hand it unstripped to
    `export.to_tflite`, which needs its ranges.

    Args:
        model: a built Functional or Sequential model; not changed.

    Returns:
        The plain model, with the layer names of the original.

    Raises:
        TypeError: the model is subclassed, or is no model.
        ValueError: the model is not built, or a transform cannot be baked yet (a pruning schedule
            that never ran).
    """
    check_model(model, "strip")
    return map_layers(model, _plain)


def _plain(layer: keras.layers.Layer) -> Any:
    plain = _baked(layer)
    if isinstance(plain or layer, Strippable):
        return (plain or layer).strip_layer() or REMOVED
    return plain


def bake_weights(model: keras.Model) -> keras.Model:
    """Returns the model with every transformed layer replaced by its plain layer, baked.

    Other layers of ours stay: export keeps the activations' ranges this way.
    """
    return map_layers(model, _baked)


def _baked(layer: keras.layers.Layer) -> keras.layers.Layer | None:
    return bake_layer(layer) if isinstance(layer, TransformedLayer) else None


def bake_layer(layer: TransformedLayer) -> keras.layers.Layer:
    """Returns a copy of the inner layer, its weights finalized by the transforms in their order."""
    plain = clone_built(layer.layer)
    weights = weight_keys(plain)
    for key, transform in layer.transforms:
        variable = weights[key]
        variable.assign(transform.finalize(keras.ops.convert_to_tensor(variable)))
    return plain
