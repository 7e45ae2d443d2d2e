"""Quantization-aware training: a model that rounds in training as its runtime will."""

import keras

from tfaccel.core.checks import check_model
from tfaccel.core.graph import Graph, flat_layers, map_models
from tfaccel.core.selection import Selector, select_layers
from tfaccel.quantization.fake_quantization import FakeQuantize
from tfaccel.quantization.placement import QUANTIZED, Decision, Placer
from tfaccel.quantization.schemes import INT8, SCHEMES, Scheme


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
        scheme: "int8": weights symmetric per output channel, activations per tensor, all 8 bits.
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
            f"quantize_aware() trains for {INT8.name!r}, but got {chosen.name!r}, which needs no "
            f"training: export.to_tflite(model, path, scheme={chosen.name!r})."
        )
    if is_quantization_aware(model):
        raise ValueError(
            f"{model.name!r} is quantization-aware already. Train it on, or begin with the model "
            "that it was made from."
        )
    rewritten, decisions = _place(model, chosen, include, exclude)
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
    return _place(model, SCHEMES.get(scheme), include, exclude)[1]


def is_quantization_aware(model: keras.Model) -> bool:
    """Whether a model holds fake quantization of activations."""
    return any(isinstance(layer, FakeQuantize) for layer in flat_layers(model))


def scheme_of(model: keras.Model) -> Scheme | None:
    """Returns the scheme that a model was trained for, None for a plain one."""
    return INT8 if is_quantization_aware(model) else None


def _place(
    model: keras.Model, scheme: Scheme, include: Selector | None, exclude: Selector | None
) -> tuple[keras.Model, list[Decision]]:
    skipped = {
        id(choice.layer): choice.reason
        for choice in select_layers(model, include, exclude)
        if not choice.chosen
    }
    decisions: list[Decision] = []

    def edit(graph: Graph) -> None:
        decisions.extend(Placer(graph, scheme, skipped, outermost=graph.model is model).place())

    return map_models(model, edit), decisions
