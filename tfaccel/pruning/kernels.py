"""Which kernels of a model `prune` touches, and why."""

import keras
import numpy as np

from tfaccel.core.selection import Choice, Selector, select_layers
from tfaccel.core.transforms import TransformedLayer, weight_keys
from tfaccel.core.walking import Visit, walk_shapes
from tfaccel.pruning.patterns import PATTERNS, Channel, Pattern

SMALLEST = 64

_PRUNABLE = ("kernel", "recurrent_kernel", "pointwise_kernel", "embeddings")
_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


def selection_for(
    model: keras.Model,
    include: Selector | None = None,
    exclude: Selector | None = None,
    pattern: str | Pattern = "element",
) -> list[Choice]:
    """Returns for each layer whether `prune` would touch it, and why.

    Args:
        model: a built Functional or Sequential model.
        include: as in `prune`.
        exclude: as in `prune`.
        pattern: as in `prune`.
    """
    last: set[int] = set()
    if isinstance(PATTERNS.get(pattern), Channel):
        last = {id(layer) for layer in _last_kernels(model)}
    first = True
    choices = []
    for choice in select_layers(model, include, exclude):
        leading = first and isinstance(choice.layer, _CONVOLUTIONS)
        first = first and not leading
        if choice.reason == "default" and id(choice.layer) in last:
            choices.append(Choice(choice.layer, False, "its channels are the model's outputs"))
        else:
            choices.append(_default_choice(choice, leading) if choice.chosen else choice)
    return choices


def _default_choice(choice: Choice, first_convolution: bool) -> Choice:
    layer, by_name = choice.layer, choice.reason == "included"
    keys = prunable_keys(layer, by_name)
    sizes = {key: _size(variable) for key, variable in keys.items()}
    if not keys:
        return Choice(layer, False, _why_no_kernel(layer))
    if not by_name:
        if first_convolution:
            return Choice(layer, False, "first convolution: few weights, all else rests on them")
        if isinstance(layer, _DEPTHWISE):
            return Choice(layer, False, "depthwise kernel: a handful of weights per channel")
        if not any(variable.trainable for variable in keys.values()):
            return Choice(layer, False, "frozen: its weights do not train")
        if max(sizes.values()) < SMALLEST:
            return Choice(
                layer, False, f"too small: {max(sizes.values())} weights, fewer than {SMALLEST}"
            )
    return Choice(layer, True, ", ".join(f"{key}: {size} weights" for key, size in sizes.items()))


def _why_no_kernel(layer: keras.layers.Layer) -> str:
    if isinstance(layer, keras.layers.BatchNormalization):
        return "batch normalization: each weight scales a whole channel"
    return "no kernel" if layer.weights else "no weights"


def prunable_keys(layer: keras.layers.Layer, by_name: bool) -> dict[str, keras.Variable]:
    """Returns the kernels of a layer by key, depthwise ones only if the layer is named."""
    names = (*_PRUNABLE, "depthwise_kernel") if by_name else _PRUNABLE
    return {
        key: variable
        for key, variable in weight_keys(layer).items()
        if key.rsplit("/", 1)[-1].split("#")[0] in names
    }


def _size(variable: keras.Variable) -> int:
    return int(np.prod(variable.shape))


def _last_kernels(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the layers with kernels whose outputs no other kernel reads on the way out."""
    steps = walk_shapes(model, model.inputs)
    makers: dict[int, Visit] = {}
    # The loop variable of a generator is not what it returns, which is wanted here too.
    while True:
        try:
            visit = next(steps)
        except StopIteration as end:
            waiting = list(end.value)
            break
        makers.update({id(tensor): visit for tensor in visit.outputs})
    found, seen = [], set()
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen or id(tensor) not in makers:
            continue
        seen.add(id(tensor))
        layer = makers[id(tensor)].node.layer
        inner = layer.layer if isinstance(layer, TransformedLayer) else layer
        if inner is not None and prunable_keys(inner, by_name=True):
            found.append(inner)
        else:
            waiting += makers[id(tensor)].inputs
    return found
