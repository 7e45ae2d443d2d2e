"""Quantization-aware training: a model that rounds in training as its runtime will."""

import keras

from tfaccel.core.checks import check_model
from tfaccel.core.graph import Graph, flat_layers, map_models
from tfaccel.core.selection import Selector, select_layers
from tfaccel.core.transforms import TransformedLayer
from tfaccel.quantization.fake_quantization import FakeQuantize, FakeQuantizeWeights
from tfaccel.quantization.operators import KERNEL_AXES
from tfaccel.quantization.placement import QUANTIZED, Decision, Placer
from tfaccel.quantization.schemes import INT4, INT8, SCHEMES, Scheme


def quantize_aware(
    model: keras.Model,
    scheme: str | Scheme = "int8",
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
) -> keras.Model:
    """Returns a model that rounds weights and activations in training as the integer runtime does.

    Compile and fit the result for a few epochs with a small learning rate, then hand it to
    `tfaccel.export.to_tflite`, which needs the ranges that it has learnt. Batch norm goes on with
    the statistics of the batch in training and is folded at export; since kernels are rounded per
    channel, the folded kernel lies on the grid that was trained.

    Args:
        model: a built Functional or Sequential model, plain or pruned; not changed.
        scheme: "int8": weights symmetric per output channel, activations per tensor, all 8 bits;
            "int4": likewise, but 4 bits for the weights between the first and the last layer.
        include: layers to quantize (names, patterns, predicate); by default all that are covered.
        exclude: layers to leave in float.

    Returns:
        The rewritten model, weights carried over; its ranges are learnt in training. What is not
        covered stays in float: `plan` names it.

    Raises:
        TypeError: the model is subclassed.
        ValueError: the model is not built or is quantization-aware already, the scheme is not
            known or cannot be trained for, a selector matches nothing, or there is nothing to
            quantize.

    References:
        Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference; Krishnamoorthi 2018, Quantizing deep convolutional
        networks for efficient inference.
    """
    check_model(model, "quantize_aware")
    chosen = SCHEMES.get(scheme)
    if not chosen.trainable:
        raise ValueError(
            f"quantize_aware() trains for {INT8.name!r} and {INT4.name!r}, but got "
            f"{chosen.name!r}, which needs no training: "
            f"export.to_tflite(model, path, scheme={chosen.name!r})."
        )
    if is_quantization_aware(model):
        raise ValueError(
            f"{model.name!r} is quantization-aware already. Train it on, or begin with the model "
            "that it was made from."
        )
    rewritten, decisions = place(model, chosen, include, exclude)
    if all(decision.action != QUANTIZED for decision in decisions):
        reasons = "; ".join(f"{d.name}: {d.reason}" for d in decisions)
        raise ValueError(
            f"quantize_aware() found nothing to quantize in {model.name!r} "
            f"({reasons or 'no layers'})."
        )
    return rewritten


def plan(
    model: keras.Model,
    scheme: str | Scheme = "int8",
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
) -> list[Decision]:
    """Returns what `quantize_aware` would do with each call of a layer, and why.

    Args:
        model: a built Functional or Sequential model; not changed.
        scheme: as in `quantize_aware`.
        include: as in `quantize_aware`.
        exclude: as in `quantize_aware`.
    """
    check_model(model, "plan")
    return place(model, SCHEMES.get(scheme), include, exclude)[1]


def is_quantization_aware(model: keras.Model) -> bool:
    """Whether a model holds fake quantization of activations."""
    return any(isinstance(layer, FakeQuantize) for layer in flat_layers(model))


def scheme_of(model: keras.Model) -> Scheme | None:
    """Returns the scheme that a model was trained or calibrated for, None for a plain one."""
    if not is_quantization_aware(model):
        return None
    bits = [
        transform.bits
        for layer in flat_layers(model)
        if isinstance(layer, TransformedLayer)
        for _, transform in layer.transforms
        if isinstance(transform, FakeQuantizeWeights)
    ]
    return INT4 if min(bits, default=8) <= INT4.weight_bits else INT8


def _ends(model: keras.Model) -> set[str]:
    """Returns the names of the first and of the last layer that has a kernel."""
    names = [layer.name for layer in flat_layers(model) if _has_kernel(layer)]
    return {*names[:1], *names[-1:]}


def _has_kernel(layer: keras.layers.Layer) -> bool:
    return type(layer.layer if isinstance(layer, TransformedLayer) else layer) in KERNEL_AXES


def place(
    model: keras.Model, scheme: Scheme, include: Selector | None, exclude: Selector | None
) -> tuple[keras.Model, list[Decision]]:
    """Returns the model with fake quantization, its ranges not known yet, and what was decided.

    Args:
        model: a built Functional or Sequential model; not changed.
        scheme: bits of weights and activations.
        include: layers to quantize.
        exclude: layers to leave in float.
    """
    skipped = {
        id(choice.layer): choice.reason
        for choice in select_layers(model, include, exclude)
        if not choice.chosen
    }
    decisions: list[Decision] = []
    ends = _ends(model)

    def edit(graph: Graph) -> None:
        outermost = graph.model is model
        placer = Placer(graph, scheme, skipped, outermost=outermost, ends=ends)
        decisions.extend(placer.place())

    return map_models(model, edit), decisions
