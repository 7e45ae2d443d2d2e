"""What is in a model, what each technique would do to it, and what changed between two models."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.checks import check_model
from tfaccel.core.graph import flat_layers
from tfaccel.core.stripping import bake_layer
from tfaccel.core.transforms import TransformedLayer
from tfaccel.measurement import LayerCounts, count_layers
from tfaccel.reporting.listings import render_text, show_diff, show_inspection
from tfaccel.reporting.verdicts import TECHNIQUES, Verdict

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class LayerFacts:
    """One layer or functional operation.

    Attributes:
        name: of the layer.
        class_name: of the layer, of the inner one where a technique has wrapped it.
        output_shape: the batch dimension left out.
        parameters: numbers in its weights.
        macs: multiply-accumulates of one sample; None where unknown.
        kernel_size: numbers in its kernels.
        zeros: how many of those are zero, masks applied.
        transforms: what techniques have put on its weights, such as "PruningMask(kernel)".
        activation: name of its activation, or names of several; "" for a layer that has none.
        techniques: for each technique whether it would touch the layer, and why.
    """

    name: str
    class_name: str
    output_shape: tuple[int | None, ...]
    parameters: int
    macs: int | None
    kernel_size: int
    zeros: int
    transforms: tuple[str, ...] = ()
    activation: str = ""
    techniques: Mapping[str, Verdict] = dataclasses.field(default_factory=dict)

    @property
    def sparsity(self) -> float | None:
        """Share of zeros in the kernels, or None without a kernel."""
        return self.zeros / self.kernel_size if self.kernel_size else None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A model, layer by layer; print it, or take `to_dict()`.

    Attributes:
        name: of the model.
        layers: in the order in which they run.
    """

    name: str
    layers: tuple[LayerFacts, ...]

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of one sample; None if a layer's are unknown."""
        counts = [layer.macs for layer in self.layers]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def sparsity(self) -> float | None:
        """Share of zeros in all kernels, or None without a kernel."""
        size = sum(layer.kernel_size for layer in self.layers)
        return sum(layer.zeros for layer in self.layers) / size if size else None

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as what JSON can hold."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "macs": self.macs,
            "sparsity": self.sparsity,
            "layers": [_layer_dict(layer) for layer in self.layers],
        }

    def __rich__(self) -> Any:
        return show_inspection(self)

    def __str__(self) -> str:
        return render_text(self)


@dataclasses.dataclass(frozen=True)
class LayerChange:
    """What became of a layer.

    Attributes:
        name: of the layer.
        change: "same", "changed", "added" or "removed".
        before: the layer in the first model, or None.
        after: the layer in the second model, or None.
        notes: what is different, in words.
        part_of: for a layer that was added right before a changed one in its place, told by its
            name ("dense_in" comes with "dense"), the name of that one; else None.
    """

    name: str
    change: str
    before: LayerFacts | None
    after: LayerFacts | None
    notes: tuple[str, ...] = ()
    part_of: str | None = None


@dataclasses.dataclass(frozen=True)
class ModelDiff:
    """What is different between two models; print it, or take `to_dict()`.

    A layer that several have replaced is a changed one, if the last of them has its name, and the
    others are added ones that are a part of it.

    Attributes:
        before: the first model.
        after: the second one.
        layers: every layer of either, the first model's order with added ones where they run.
    """

    before: Inspection
    after: Inspection
    layers: tuple[LayerChange, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as what JSON can hold."""
        return {
            **{
                role: {
                    "name": model.name,
                    "parameters": model.parameters,
                    "macs": model.macs,
                    "sparsity": model.sparsity,
                }
                for role, model in (("before", self.before), ("after", self.after))
            },
            "layers": [
                {
                    "name": layer.name,
                    "change": layer.change,
                    "notes": list(layer.notes),
                    "part_of": layer.part_of,
                    "before": _layer_dict(layer.before),
                    "after": _layer_dict(layer.after),
                }
                for layer in self.layers
            ],
        }

    def __rich__(self) -> Any:
        return show_diff(self)

    def __str__(self) -> str:
        return render_text(self)


def inspect(model: keras.Model) -> Inspection:
    """Looks at every layer of a model: shape, parameters, MACs, zeros, and what would touch it.

    Args:
        model: a built Functional or Sequential model; not changed. Nested models are flattened.

    Returns:
        The layers, each with the verdicts of `prune`, `prune_channels`, `quantize_aware` and
        `fold_batch_norm`.

    Raises:
        TypeError: the model is subclassed, or is no model.
        ValueError: the model is not built.
    """
    check_model(model, "inspect")
    return _inspect(model, {name: judge(model) for name, judge in TECHNIQUES.items()})


def diff(before: keras.Model, after: keras.Model) -> ModelDiff:
    """Compares two models layer by layer, by the names of the layers.

    Args:
        before: a built Functional or Sequential model.
        after: another one, such as `before` rewritten.

    Returns:
        What was added, removed and changed: class, activation, shape, parameters, MACs, zeros,
        transforms, and whether the weights have other values. Printed, it is a table of the layers
        that differ, with parameters and MACs before and after, of each and in all.

    Raises:
        TypeError: a model is subclassed, or is no model.
        ValueError: a model is not built.
    """
    check_model(before, "diff")
    check_model(after, "diff")
    first, second = _inspect(before, {}), _inspect(after, {})
    old = {layer.name: layer for layer in first.layers}
    new = {layer.name: layer for layer in second.layers}
    weights = _weights_by_name(before), _weights_by_name(after)
    changes = []
    for name in _merged(list(old), list(new)):
        was, now = old.get(name), new.get(name)
        if was is None or now is None:
            change = "added" if was is None else "removed"
            changes.append(LayerChange(name, change, was, now))
            continue
        notes = _notes(was, now, weights[0].get(name, []), weights[1].get(name, []))
        changes.append(LayerChange(name, "changed" if notes else "same", was, now, tuple(notes)))
    return ModelDiff(first, second, _with_parts(changes))


def _with_parts(changes: list[LayerChange]) -> tuple[LayerChange, ...]:
    """Says of each added layer which changed one it came with: the next, if the names say so."""
    parted = list(changes)
    owner: LayerChange | None = None
    for place in reversed(range(len(parted))):
        change = parted[place]
        if change.change in ("changed", "same"):
            owner = change if change.change == "changed" else None
        elif change.change == "added" and owner and change.name.startswith(f"{owner.name}_"):
            parted[place] = dataclasses.replace(change, part_of=owner.name)
    return tuple(parted)


def _inspect(model: keras.Model, verdicts: Mapping[str, Mapping[str, Verdict]]) -> Inspection:
    plain = {layer.name: layer for layer in flat_layers(model)}
    return Inspection(
        model.name,
        tuple(
            _facts(
                counts,
                plain.get(counts.name),
                {
                    technique: of_layer[counts.name]
                    for technique, of_layer in verdicts.items()
                    if counts.name in of_layer
                },
            )
            for counts in count_layers(model)
            if counts.class_name != "InputLayer"
        ),
    )


def _facts(
    counts: LayerCounts, layer: keras.layers.Layer | None, techniques: dict[str, Verdict]
) -> LayerFacts:
    kernels = [array for key, array in _baked(layer) if array.ndim > 1 and "bias" not in key]
    size = sum(kernel.size for kernel in kernels)
    return LayerFacts(
        name=counts.name,
        class_name=counts.class_name,
        output_shape=counts.output_shape,
        parameters=counts.parameters,
        macs=counts.macs,
        kernel_size=size,
        zeros=size - sum(int(np.count_nonzero(kernel)) for kernel in kernels),
        transforms=tuple(f"{type(t).__name__}({key})" for key, t in layer.transforms)
        if isinstance(layer, TransformedLayer)
        else (),
        activation=_activation_of(layer),
        techniques=techniques,
    )


def _activation_of(layer: Any) -> str:
    """Returns the names of the activations that a layer, or one that it wraps, computes."""
    while layer is not None and not hasattr(layer, "activation") and hasattr(layer, "layer"):
        layer = layer.layer
    functions = (getattr(layer, key, None) for key in ("activation", "recurrent_activation"))
    names = [
        str(getattr(function, "__name__", None) or getattr(function, "name", type(function)))
        for function in functions
        if function is not None
    ]
    return ", ".join(names)


def _baked(layer: keras.layers.Layer | None) -> list[tuple[str, Array]]:
    """Returns the weights of a layer by name, its transforms applied where they can be."""
    if layer is None or hasattr(layer, "strip_layer"):
        return []
    if isinstance(layer, TransformedLayer):
        try:
            layer = bake_layer(layer)
        except ValueError:
            # A schedule that never ran leaves nothing to bake: the weights are the inner layer's.
            layer = layer.layer
    return [(weight.name, keras.ops.convert_to_numpy(weight)) for weight in layer.weights]


def _weights_by_name(model: keras.Model) -> dict[str, list[Array]]:
    return {layer.name: [array for _, array in _baked(layer)] for layer in flat_layers(model)}


def _merged(old: list[str], new: list[str]) -> Iterable[str]:
    """Returns the names of both, those of `new` that `old` lacks behind their predecessors."""
    merged = list(old)
    known = set(old)
    place = 0
    for name in new:
        if name in known:
            place = merged.index(name) + 1
        else:
            merged.insert(place, name)
            place += 1
    return merged


def _notes(was: LayerFacts, now: LayerFacts, old: list[Array], new: list[Array]) -> list[str]:
    fields: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("class", "class_name", str),
        ("activation", "activation", lambda v: v or "none"),
        ("output", "output_shape", str),
        ("parameters", "parameters", "{:,}".format),
        ("MACs", "macs", lambda v: "unknown" if v is None else f"{v:,}"),
        ("zeros", "sparsity", lambda v: "none" if v is None else f"{v:.1%}"),
        ("transforms", "transforms", lambda v: ", ".join(v) or "none"),
    )
    notes = [
        f"{word} {spell(getattr(was, field))} -> {spell(getattr(now, field))}"
        for word, field, spell in fields
        # Compared as told: a kernel of another shape may have other zeros than 0.0 % of it.
        if spell(getattr(was, field)) != spell(getattr(now, field))
    ]
    if [a.shape for a in old] == [a.shape for a in new]:
        moved = max(
            (float(np.max(np.abs(a - b), initial=0.0)) for a, b in _numeric(old, new)), default=0.0
        )
        if moved:
            notes.append(f"weights differ by up to {moved:.3g}")
    return notes


def _numeric(old: list[Array], new: list[Array]) -> list[tuple[Array, Array]]:
    return [
        (a.astype(np.float64), b.astype(np.float64))
        for a, b in zip(old, new, strict=True)
        if a.dtype.kind in "fiu" and b.dtype.kind in "fiu"
    ]


def _layer_dict(layer: LayerFacts | None) -> dict[str, Any] | None:
    if layer is None:
        return None
    return {
        "name": layer.name,
        "class": layer.class_name,
        "output_shape": list(layer.output_shape),
        "parameters": layer.parameters,
        "macs": layer.macs,
        "sparsity": layer.sparsity,
        "transforms": list(layer.transforms),
        "activation": layer.activation,
        "techniques": {
            name: {"touched": verdict.touched, "reason": verdict.reason}
            for name, verdict in layer.techniques.items()
        },
    }
