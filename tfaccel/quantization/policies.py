"""Training in 16 bits: an existing model's layers under a mixed-precision policy."""

import keras

from tfaccel.core.checks import check_model
from tfaccel.core.graph import Graph, Tensor
from tfaccel.core.precision import change_policy
from tfaccel.core.selection import Selector, select_layers
from tfaccel.core.stripping import Strippable
from tfaccel.core.transforms import TransformedLayer
from tfaccel.core.walking import map_layers

POLICIES = ("mixed_bfloat16", "mixed_float16", "float32")


def mixed_precision(
    model: keras.Model,
    policy: str = "mixed_bfloat16",
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
) -> keras.Model:
    """Returns a model that computes in 16 bits and keeps its weights in 32, trained or not.

    Keras gives a policy to layers as they are made (`keras.config.set_dtype_policy`). This gives
    one to a model that is there, and keeps in float32 what needs its digits: the layers whose
    outputs the model gives, so that losses and softmax are computed on float32, and those that you
    exclude. `compile` scales the loss of a model under "mixed_float16" by itself, since gradients
    below 2^-24 would be zeros (Micikevicius et al. 2018, section 3.2); bfloat16 has the range of
    float32 and needs no scaling. On which devices either is faster is for you to measure.

    Pruned and quantization-aware layers keep masks, ranges and the rounding of weights in float32.
    `export.to_tflite` takes the model as it is, and computes in float32 again.

    Args:
        model: a built Functional or Sequential model; not changed.
        policy: "mixed_bfloat16", "mixed_float16", or "float32" for the way back. Weights of 16 bits
            ("bfloat16") are left out: an update of less than 1/256 of a weight would be lost.
        include: layers to change (names, patterns, predicate); by default all but those that give
            the model's outputs.
        exclude: layers to leave as they are.

    Returns:
        The rewritten model, weights carried over, without an optimizer.

    Raises:
        TypeError: the model is subclassed.
        ValueError: the model is not built, the policy is none of these, or a selector matches
            nothing.

    References:
        Micikevicius et al. 2018, Mixed Precision Training.

    >>> dense = [keras.layers.Dense(4, name="hidden"), keras.layers.Dense(2, name="logits")]
    >>> half = mixed_precision(keras.Sequential([keras.Input((3,)), *dense]))
    >>> [(layer.name, layer.compute_dtype) for layer in half.layers]
    [('hidden', 'bfloat16'), ('logits', 'float32')]
    """
    check_model(model, "mixed_precision")
    if policy not in POLICIES:
        raise ValueError(
            f"policy must be one of {', '.join(map(repr, POLICIES))}, but got {policy!r}. Weights "
            "stay in float32, since small updates would be lost in 16 bits."
        )
    ends = set() if policy == "float32" or include is not None else _giving_outputs(model)
    chosen = {
        id(choice.layer)
        for choice in select_layers(model, include, exclude)
        if choice.chosen and id(choice.layer) not in ends
    }

    def changed(layer: keras.layers.Layer) -> keras.layers.Layer | None:
        inner = layer.layer if isinstance(layer, TransformedLayer) else layer
        # What rounds activations computes in float32 by itself, and has no other weights.
        if isinstance(inner, Strippable) or id(inner) not in chosen:
            return None
        return change_policy(layer, policy)

    result = map_layers(model, changed)
    # By this, compile() knows whether to scale the loss.
    result.dtype_policy = keras.DTypePolicy(policy)
    return result


def _giving_outputs(model: keras.Model) -> set[int]:
    """Returns the ids of the layers whose outputs a model gives, directly or by operations."""
    graph = Graph.read(model)
    found: set[int] = set()

    def follow(tensor: Tensor) -> None:
        node = graph.producer(tensor)
        layer = node.layer.layer if isinstance(node.layer, TransformedLayer) else node.layer
        if node.is_input:
            return
        if node.is_model:
            found.update(_giving_outputs(node.operation))
        elif layer is None or isinstance(layer, Strippable):
            for before in node.inputs:
                follow(before)
        else:
            found.add(id(layer))

    for tensor in graph.outputs:
        follow(tensor)
    return found
