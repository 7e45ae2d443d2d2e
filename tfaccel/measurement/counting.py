"""Parameters and multiply-accumulates of a model."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import keras

from tfaccel.core.artifacts import load_model
from tfaccel.core.checks import check_file, check_model
from tfaccel.core.graph import Graph
from tfaccel.core.transforms import TransformedLayer
from tfaccel.measurement.flatbuffer import TFLiteFile
from tfaccel.measurement.layer_macs import walk_macs
from tfaccel.measurement.records import Counts, LayerCounts

SampleShape = Sequence[int] | Sequence[Sequence[int]]


def count(
    model: keras.Model | str | os.PathLike[str], *, input_shape: SampleShape | None = None
) -> Counts:
    """Counts parameters and multiply-accumulates (MACs) of one sample.

    MACs are those of convolutions, dense layers, attention, matrix products and recurrent layers,
    products with the zeros of padding included; everything else counts as zero. A layer that a
    technique has wrapped counts as the layer that it was. A layer class of your own may say its
    MACs itself with a method `count_macs(input_shape) -> int`, batch dimension included; else its
    `call` is looked into.

    Args:
        model: a built Functional or Sequential model, or a .keras or .tflite file.
        input_shape: shape of one sample, without the batch dimension, where the Keras model leaves
            sizes open; for several inputs a list of shapes. A .tflite file has its own.

    Returns:
        The counts. A .tflite file has fewer parameters than its model: batch norm is folded.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the model is subclassed, or is no model.
        ValueError: the model is not built, or the file is damaged or of another kind.

    >>> inputs = keras.Input((5,))
    >>> count(keras.Model(inputs, keras.layers.Dense(3)(inputs)))
    Counts(parameters=18, trainable_parameters=18, macs=15)
    """
    if isinstance(model, (str, os.PathLike)):
        file = check_file(model, "count", suffixes=(".keras", ".tflite"))
        if file.suffix == ".tflite":
            content = TFLiteFile.read(file)
            return Counts(content.parameters(), 0, content.macs())
        model = load_model(file)
    check_model(model, "count")
    rows = _tally(model, input_shape)
    return Counts(
        parameters=_size(weight for row in rows for weight in row.weights),
        trainable_parameters=_size(weight for row in rows for weight in row.trainable_weights),
        macs=_total([row.macs for row in rows]),
    )


def count_layers(
    model: keras.Model, *, input_shape: SampleShape | None = None
) -> list[LayerCounts]:
    """Counts parameters and MACs of each layer and functional operation of a Keras model.

    Args:
        model: a built Functional or Sequential model. Nested models are flattened; a layer that is
            called several times has one entry.
        input_shape: as in `count`.

    Raises:
        TypeError: the model is subclassed, or is no model.
        ValueError: the model is not built.
    """
    check_model(model, "count_layers")
    return [
        LayerCounts(
            name=row.operation.name,
            class_name=type(row.wrapped).__name__,
            output_shape=row.output_shape,
            parameters=_size(row.weights),
            trainable_parameters=_size(row.trainable_weights),
            macs=row.macs,
        )
        for row in _tally(model, input_shape)
    ]


@dataclasses.dataclass
class _Row:
    operation: Any
    output_shape: tuple[int | None, ...]
    macs: int | None

    @property
    def wrapped(self) -> Any:
        inside = isinstance(self.operation, TransformedLayer)
        return self.operation.layer if inside else self.operation

    @functools.cached_property
    def plain(self) -> Any:
        """What is left of the operation when the model is stripped; None if nothing is."""
        strip = getattr(self.wrapped, "strip_layer", None)
        return self.wrapped if strip is None else strip()

    @property
    def weights(self) -> list[keras.Variable]:
        return getattr(self.plain, "weights", [])

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        return getattr(self.plain, "trainable_weights", [])


def _tally(model: keras.Model, input_shape: SampleShape | None) -> list[_Row]:
    inputs, batch = _inputs(model, input_shape)
    rows: dict[int, _Row] = {}
    for call, macs in walk_macs(model, inputs):
        of_sample = None if macs is None else macs // batch
        row = rows.setdefault(id(call.operation), _Row(call.operation, (), 0))
        row.output_shape = tuple(call.outputs[0][1:]) if call.outputs else ()
        row.macs = _total([row.macs, of_sample])
    return list(rows.values())


def _inputs(
    model: keras.Model, input_shape: SampleShape | None
) -> tuple[list[keras.KerasTensor], int]:
    tensors = Graph.read(model).inputs
    shapes: list[Sequence[int | None]] = [tensor.shape[1:] for tensor in tensors]
    if input_shape is not None:
        several = len(input_shape) > 0 and not isinstance(input_shape[0], int)
        shapes = list(input_shape) if several else [input_shape]  # type: ignore[arg-type, list-item]
        if len(shapes) != len(tensors):
            raise ValueError(
                f"input_shape must have one shape for each of the {len(tensors)} inputs of "
                f"{model.name!r}, but got {input_shape!r}."
            )
    batch = tensors[0].shape[0] or 1
    return [
        keras.KerasTensor((batch, *shape), dtype=tensor.dtype)
        for tensor, shape in zip(tensors, shapes, strict=True)
    ], batch


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _size(weights: Iterable[keras.Variable]) -> int:
    unique = {id(weight): weight for weight in weights}
    return sum(prod(weight.shape) for weight in unique.values())
