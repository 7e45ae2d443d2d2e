"""Quantization-aware training: a model that rounds in training as its runtime will."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

from tfaccel.core.checks import check_model, check_type
from tfaccel.core.graph import Graph, flat_layers, map_models
from tfaccel.core.selection import Selector, select_layers
from tfaccel.core.transforms import TransformedLayer
from tfaccel.quantization.ends import layers_at_ends
from tfaccel.quantization.equivalents import has_kernels, rewritten
from tfaccel.quantization.fake_quantization import FakeQuantize, FakeQuantizeWeights
from tfaccel.quantization.placement import FLOAT, QUANTIZED, Decision, Placer, Wishes
from tfaccel.quantization.ranges import RANGES, Ranges
from tfaccel.quantization.schemes import (
    INT4,
    INT4_BLOCK32,
    INT4_WEIGHT_ONLY,
    INT8,
    INT16X8,
    SCHEMES,
    Scheme,
)

_LOG = logging.getLogger(__name__)

PerLayer = Mapping[str, str | Scheme]


def quantize_aware(
    model: keras.Model,
    scheme: str | Scheme = "int8",
    *,
    ranges: str | dict[str, Any] | Ranges = "ema",
    per_layer: PerLayer | None = None,
    include: Selector | None = None,
    exclude: Selector | None = None,
) -> keras.Model:
    """Returns a model that rounds weights and activations in training as the integer runtime does.

    Compile and fit the result for a few epochs with a small learning rate, then hand it to
    `tfaccel.export.to_tflite`, which needs the ranges that it has learnt. Batch norm is folded at
    export. In training it stays apart, with the statistics of the batch: since kernels are rounded
    per channel and by their own extent, conv(x, Q(w)) normalized is what conv(x, Q(w gamma /
    sigma)) + beta - mean gamma / sigma is, the folded form of Jacob et al. 2018 (eq. 14), at the
    cost of one convolution. The callback `FreezeRanges` ends the learning of ranges and batch norm.

    Args:
        model: a built Functional or Sequential model, plain or pruned; not changed.
        scheme: "int8": weights symmetric per output channel, activations per tensor, all 8 bits;
            "int4": likewise, but 4 bits for the weights between the first and the last layer;
            "w4a8" and the like: 2 to 8 bits for weights and for what ReLUs give; "int16x8":
            activations of 16 bits; "int4_weight_only": weights of 4 bits, activations in float;
            "int4_block32": likewise for dense layers, a step for every 32 weights; or a `Scheme`.
        ranges: how ranges are found: "ema" (follows the extremes of the batches), "lsq" (trains
            the steps of weights and activations), "pact" (trains where ReLUs clip), or an instance
            of `MovingExtremes`, `LSQ` or `PACT`.
        per_layer: schemes of layers that differ, by layer name or pattern; of several that fit the
            first is taken. They must agree with `scheme` in whether activations are float, or of 16
            bits.
        include: layers to quantize (names, patterns, predicate); by default all that are covered.
        exclude: layers to leave in float.

    Returns:
        The rewritten model, weights carried over; its ranges are learnt in training. What is not
        covered stays in float: a logged line names it, and `plan` says so before.

    Raises:
        TypeError: the model is subclassed.
        ValueError: the model is not built or is quantization-aware already, a scheme is not
            known, cannot be trained for or does not go with the others, a selector matches
            nothing, or there is nothing to quantize.

    References:
        Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference; Krishnamoorthi 2018, Quantizing deep convolutional
        networks for efficient inference; Esser et al. 2020, Learned Step Size Quantization; Choi
        et al. 2018, PACT.
    """
    check_model(model, "quantize_aware")
    chosen = SCHEMES.get(scheme)
    if not chosen.trainable:
        raise ValueError(
            f"quantize_aware() trains for {', '.join(map(repr, trainable_schemes()))} and 'w4a8' "
            f"and the like, but got {chosen.name!r}, which needs no training: "
            f"export.to_tflite(model, path, scheme={chosen.name!r})."
        )
    if is_quantization_aware(model):
        raise ValueError(
            f"{model.name!r} is quantization-aware already. Train it on, or begin with the model "
            "that it was made from."
        )
    aware, decisions = place(model, chosen, include, exclude, ranges, per_layer)
    if all(decision.action != QUANTIZED for decision in decisions):
        reasons = "; ".join(f"{d.name}: {d.reason}" for d in decisions)
        raise ValueError(
            f"quantize_aware() found nothing to quantize in {model.name!r} "
            f"({reasons or 'no layers'})."
        )
    name_floats(model, decisions)
    return aware


def name_floats(model: keras.Model, decisions: Sequence[Decision]) -> None:
    """Logs a line that names what stays in float, though nobody has asked for it."""
    asked = ("excluded", "not included")  # tfaccel.core.selection
    found = [d for d in decisions if d.action == FLOAT and d.reason not in asked]
    if found:
        names = ", ".join(f"{d.name!r} ({d.reason})" for d in found)
        _LOG.warning("%r is quantized but for %s", model.name, names)


def trainable_schemes() -> list[str]:
    """Returns the names of the schemes that `quantize_aware` can train for."""
    return [name for name in SCHEMES.names() if SCHEMES.get(name).trainable]


def plan(
    model: keras.Model,
    scheme: str | Scheme = "int8",
    *,
    per_layer: PerLayer | None = None,
    include: Selector | None = None,
    exclude: Selector | None = None,
) -> list[Decision]:
    """Returns what `quantize_aware` would do with each call of a layer, and why.

    Args:
        model: a built Functional or Sequential model; not changed.
        scheme: as in `quantize_aware`.
        per_layer: as in `quantize_aware`.
        include: as in `quantize_aware`.
        exclude: as in `quantize_aware`.
    """
    check_model(model, "plan")
    return place(model, SCHEMES.get(scheme), include, exclude, per_layer=per_layer)[1]


def is_quantization_aware(model: keras.Model) -> bool:
    """Whether a model holds fake quantization, of activations or of weights."""
    if any(isinstance(layer, FakeQuantize) for layer in flat_layers(model)):
        return True
    return next(weight_transforms(model), None) is not None


def weight_transforms(model: keras.Model) -> Iterator[FakeQuantizeWeights]:
    """Yields what rounds the kernels of a model."""
    for layer in flat_layers(model):
        if isinstance(layer, TransformedLayer):
            yield from (t for _, t in layer.transforms if isinstance(t, FakeQuantizeWeights))


def scheme_of(model: keras.Model) -> Scheme | None:
    """Returns the scheme that a model was trained or calibrated for, None for a plain one.

    It is the one that says how its file is stored: a model of 3 bits per weight is "int4", whose
    kernels of up to 4 bits stand in 4 bits each.
    """
    transforms = list(weight_transforms(model))
    ranges = [layer for layer in flat_layers(model) if isinstance(layer, FakeQuantize)]
    if not ranges and not transforms:
        return None
    if not ranges:
        return INT4_WEIGHT_ONLY if all(t.block is None for t in transforms) else INT4_BLOCK32
    if any(layer.bits > INT8.activation_bits for layer in ranges):
        return INT16X8
    low = [t for t in transforms if t.symmetric and t.bits <= INT4.weight_bits]
    return INT4 if low else INT8


def place(
    model: keras.Model,
    scheme: Scheme,
    include: Selector | None,
    exclude: Selector | None,
    ranges: str | dict[str, Any] | Ranges = "ema",
    per_layer: PerLayer | None = None,
) -> tuple[keras.Model, list[Decision]]:
    """Returns the model with fake quantization, its ranges not known yet, and what was decided.

    Args:
        model: a built Functional or Sequential model; not changed.
        scheme: bits of weights and activations.
        include: layers to quantize.
        exclude: layers to leave in float.
        ranges: how they are found in training.
        per_layer: schemes of layers that differ, by name or pattern.
    """
    at_ends = set[int]().union(*layers_at_ends(model, has_kernels))
    wishes = Wishes(
        scheme=scheme,
        ranges=RANGES.get(ranges),
        skipped=_skipped(model, include, exclude),
        schemes=_schemes_of_layers(model, scheme, per_layer),
        ends={layer.name for layer in _inner_layers(model) if id(layer) in at_ends},
        masked=_has_masks(model),
    )
    decisions: list[Decision] = []

    def edit(graph: Graph) -> None:
        decisions.extend(Placer(graph, wishes, outermost=graph.model is model).place())

    return map_models(model, edit), decisions


def _schemes_of_layers(
    model: keras.Model, scheme: Scheme, per_layer: PerLayer | None
) -> dict[str, Scheme]:
    """Returns the scheme of each layer that `per_layer` names."""
    if per_layer is None:
        return {}
    check_type("per_layer", per_layer, Mapping)
    schemes: dict[str, Scheme] = {}
    for pattern, identifier in per_layer.items():
        chosen = SCHEMES.get(identifier)
        ours, theirs = (_kind_of_activations(s) for s in (scheme, chosen))
        if ours != theirs:
            raise ValueError(
                f"per_layer gives {pattern!r} the scheme {chosen.name!r}, with {theirs}, but "
                f"the model's scheme {scheme.name!r} has {ours}. Leave layers in float with "
                "exclude=, or choose schemes of one kind."
            )
        for choice in select_layers(model, include=pattern):
            if choice.chosen:
                schemes.setdefault(choice.layer.name, chosen)
    return schemes


def _kind_of_activations(scheme: Scheme) -> str:
    if not scheme.integer_activations:
        return "activations in float"
    bits = "16" if scheme.activation_bits == 16 else "8 or fewer"
    return f"{'symmetric ' if scheme.symmetric_activations else ''}activations of {bits} bits"


def written_out(
    model: keras.Model, scheme: Scheme, include: Selector | None, exclude: Selector | None
) -> keras.Model:
    """Returns the model with its layers written as `place` writes them, and nothing rounded.

    Args:
        model: as in `place`.
        scheme: as in `place`.
        include: as in `place`.
        exclude: as in `place`.
    """
    if not scheme.integer_activations:
        return model
    skipped = _skipped(model, include, exclude)
    wide = scheme.activation_bits == 16
    return rewritten(model, skipped, masked=_has_masks(model), wide=wide)


def _skipped(
    model: keras.Model, include: Selector | None, exclude: Selector | None
) -> dict[int, str]:
    """Returns the reason for each layer that stays in float as its user wants, by its id."""
    choices = select_layers(model, include, exclude)
    return {id(choice.layer): choice.reason for choice in choices if not choice.chosen}


def _has_masks(model: keras.Model) -> bool:
    return any(map(_makes_a_mask, flat_layers(model)))


def _inner_layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    for layer in flat_layers(model):
        yield layer.layer if isinstance(layer, TransformedLayer) else layer


def _makes_a_mask(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.Masking) or bool(getattr(layer, "mask_zero", False))
