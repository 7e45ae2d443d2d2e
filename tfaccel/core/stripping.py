"""Back to plain Keras: whatever tfaccel put into a model comes out, its effect baked in."""

from typing import Protocol, runtime_checkable

import keras

from tfaccel.core.checks import check_model
from tfaccel.core.cloning import clone_built
from tfaccel.core.graph import Graph, map_models
from tfaccel.core.transforms import TransformedLayer, weight_keys


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
    baked: dict[int, keras.layers.Layer] = {}

    def edit(graph: Graph) -> None:
        _bake(graph, baked)
        for layer in graph.layers():
            if isinstance(layer, Strippable):
                plain = layer.strip_layer()
                if plain is not None:
                    graph.replace_layer(layer, plain)
                    continue
                for node in graph.calls(layer):
                    graph.remove(node)

    return map_models(model, edit)


def bake_weights(model: keras.Model) -> keras.Model:
    """Returns the model with every transformed layer replaced by its plain layer, baked.

    Other layers of ours stay: export keeps the activations' ranges this way.
    """
    baked: dict[int, keras.layers.Layer] = {}
    return map_models(model, lambda graph: _bake(graph, baked))


def _bake(graph: Graph, baked: dict[int, keras.layers.Layer]) -> None:
    """Bakes the layers of one graph; `baked` keeps one that several graphs share in one piece."""
    for layer in graph.layers():
        if isinstance(layer, TransformedLayer):
            if id(layer) not in baked:
                baked[id(layer)] = bake_layer(layer)
            graph.replace_layer(layer, baked[id(layer)])


def bake_layer(layer: TransformedLayer) -> keras.layers.Layer:
    """Returns a copy of the inner layer, its weights finalized by the transforms in their order."""
    plain = clone_built(layer.layer)
    weights = weight_keys(plain)
    for key, transform in layer.transforms:
        variable = weights[key]
        variable.assign(transform.finalize(keras.ops.convert_to_tensor(variable)))
    return plain
