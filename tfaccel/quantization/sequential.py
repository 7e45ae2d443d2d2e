"""A float model and its quantized form side by side, one layer after the other.

Each layer is adjusted when all before it are: it sees, for the calibration data, what it gets in
float and what it gets from the quantized layers, and may make up for the difference.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.cloning import clone_built
from tfaccel.core.graph import flat_layers
from tfaccel.core.transforms import TransformedLayer
from tfaccel.core.walking import read_graphs, walk, walk_shapes
from tfaccel.quantization.fake_quantization import FakeQuantize, FakeQuantizeWeights
from tfaccel.quantization.operators import RELUS, activation_name, activation_of, is_relu
from tfaccel.quantization.patches import (
    AS_MATRICES,
    bias_of,
    cut_patches,
    to_kernel,
    to_matrices,
)
from tfaccel.rewriting.sampling import Batch

Array = npt.NDArray[Any]

CLIPPED = 0.1  # how much an error counts where the activation clips, of 1


@dataclasses.dataclass(frozen=True, eq=False)
class Both:
    """One value of the graph, for all calibration data, in batches.

    Attributes:
        floats: as the float model computes it.
        rounded: as the quantized one does.
    """

    floats: list[Any]
    rounded: list[Any]


@dataclasses.dataclass(eq=False)
class LayerProblem:
    """One layer to be rounded: what it is to give, and what it gets.

    Attributes:
        name: of the layer.
        weight: [groups, k, n] the float kernel.
        bias: [groups, 1, n] the float bias.
        bits: of a rounded weight.
        float_inputs: [groups, samples, k] what the float layer gets at some places.
        inputs: the same places, as the quantized layers before give them. Of a layer that is called
            more than once, which would be rounded before some of its inputs are, as in float.
        activation: "linear", "relu" or "relu6": what the runtime computes in one with it.
        seed: for what is random.
    """

    name: str
    weight: Array
    bias: Array
    bits: int
    float_inputs: Array
    inputs: Array
    activation: str
    seed: int

    def float_outputs(self) -> Array:
        """Returns what the layer gives in float, before its activation."""
        return np.matmul(self.float_inputs, self.weight) + self.bias

    def importance(self) -> Array:
        """Returns how much an error of each output counts, [groups, samples, n].

        What the activation clips away hardly matters. It counts for a little all the same, as the
        error may be what brings it back.
        """
        outputs = self.float_outputs()
        if self.activation == "linear":
            return np.ones_like(outputs)
        clipped = outputs <= 0
        if self.activation == "relu6":
            clipped |= outputs >= 6
        return np.where(clipped, np.float32(CLIPPED), np.float32(1))


Adjust = Callable[[LayerProblem], tuple[Array, Array]]
"""Gives the kernel, on its grid, and the bias of a layer."""


class SequentialAdjustment:
    """Adjusts the kernels of a model with fake quantization, in place, from input to output.

    Args:
        model: its ranges are known.
        batches: calibration data.
        adjust: given each layer in turn.
        places: positions of the input that a layer is looked at, over all batches.
        seed: for places and layers.
    """

    def __init__(
        self,
        model: keras.Model,
        batches: Sequence[Batch],
        adjust: Adjust,
        *,
        places: int = 8192,
        seed: int = 0,
    ) -> None:
        self._model = model
        self._batches = batches
        self._adjust = adjust
        self._places = places
        self._seed = seed
        self._float_layers: dict[int, Any] = {}
        self._activations = dict(_activations(model))
        self._of_shared: dict[int, list[Array]] = {}  # patches that a layer gets in all its calls

    def run(self) -> None:
        """Adjusts all layers."""
        specs = self._model.inputs
        given = [
            [keras.ops.convert_to_tensor(batch[place], spec.dtype) for batch in self._batches]
            for place, spec in enumerate(specs)
        ]
        inputs = [Both(values, values) for values in given]
        visits = walk_shapes(self._model, specs)
        calls = collections.Counter(id(visit.node.operation) for visit in visits)
        if any(calls[id(x)] > 1 and self._rounds(x) for x in flat_layers(self._model)):
            self._look_at_shared(inputs, calls)
        for _ in walk(self._model, inputs, self._call):
            pass

    def _look_at_shared(self, inputs: list[Both], calls: Mapping[int, int]) -> None:
        """Cuts patches of what layers get that are called more than once, all in float."""

        def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(operation, FakeQuantize):
                return args[0]
            if calls[id(operation)] > 1 and self._rounds(operation):
                value = next(x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, Both))
                seed = self._seed + len(self._of_shared)
                count = -(-self._places // (len(self._batches) * calls[id(operation)]))
                self._of_shared.setdefault(id(operation), []).append(
                    self._cut(operation.layer, value.floats, count, seed)
                )
            plain = operation.layer if isinstance(operation, TransformedLayer) else operation
            floats = self._map(plain, args, kwargs, "floats")
            return _transposed(floats, floats)

        for _ in walk(self._model, inputs, call):
            pass

    @staticmethod
    def _cut(layer: Any, batches: list[Any], count: int, seed: int) -> Array:
        patches = [cut_patches(layer, x, count, seed + n) for n, x in enumerate(batches)]
        return np.concatenate(patches, axis=1)

    @staticmethod
    def _rounds(operation: Any) -> bool:
        return (
            isinstance(operation, TransformedLayer)
            and type(operation.layer) in AS_MATRICES
            and any(isinstance(t, FakeQuantizeWeights) for _, t in operation.transforms)
        )

    def _call(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(operation, FakeQuantize):
            (value,) = args
            return Both(value.floats, [operation(x) for x in value.rounded])
        float_layer = operation
        if isinstance(operation, TransformedLayer):
            if id(operation) not in self._float_layers:
                self._float_layers[id(operation)] = clone_built(operation.layer)
                given = keras.tree.flatten((args, kwargs))
                self._visit(operation, next(x for x in given if isinstance(x, Both)))
            float_layer = self._float_layers[id(operation)]
        floats = self._map(float_layer, args, kwargs, "floats")
        return _transposed(floats, self._map(operation, args, kwargs, "rounded"))

    def _map(self, operation: Any, args: Any, kwargs: Any, which: str) -> list[Any]:
        def of_batch(number: int) -> Any:
            def pick(leaf: Any) -> Any:
                return getattr(leaf, which)[number] if isinstance(leaf, Both) else leaf

            given, named = keras.tree.map_structure(pick, (args, kwargs))
            return keras.tree.flatten(operation(*given, **named))

        return [of_batch(number) for number in range(len(self._batches))]

    def _visit(self, wrapped: TransformedLayer, value: Both) -> None:
        layer: Any = wrapped.layer
        bits = [t.bits for _, t in wrapped.transforms if isinstance(t, FakeQuantizeWeights)]
        if not self._rounds(wrapped):
            return
        seed = self._seed + len(self._float_layers)
        share = -(-self._places // len(self._batches))
        if id(wrapped) in self._of_shared:
            floats = rounded = np.concatenate(self._of_shared.pop(id(wrapped)), axis=1)
        else:
            floats, rounded = (
                self._cut(layer, values, share, seed) for values in (value.floats, value.rounded)
            )
        kernel = keras.ops.convert_to_numpy(layer.kernel)
        problem = LayerProblem(
            name=layer.name,
            weight=to_matrices(layer, kernel),
            bias=bias_of(layer),
            bits=bits[0],
            float_inputs=floats,
            inputs=rounded,
            activation=self._activations.get(id(wrapped), "linear"),
            seed=seed,
        )
        weight, bias = self._adjust(problem)
        layer.kernel.assign(to_kernel(layer, weight))
        _check_on_grid(wrapped)
        if layer.use_bias:
            layer.bias.assign(bias.ravel())


def _check_on_grid(wrapped: TransformedLayer) -> None:
    """Raises ValueError if the step that is read off a rounded kernel is not the one it has."""
    for variable, value in wrapped.transformed(training=False):
        kernel = keras.ops.convert_to_numpy(variable)
        moved = np.abs(keras.ops.convert_to_numpy(value) - kernel).max()
        if moved > 1e-3 * np.abs(kernel).max():
            raise ValueError(
                f"The rounded kernel of {wrapped.name!r} is off its grid by up to {moved:.3g}: a "
                "rounding must leave the largest weight of each output at the end of the grid."
            )


def _transposed(floats: list[list[Any]], rounded: list[list[Any]]) -> list[Both]:
    """Makes outputs by batch into one value, over all batches, for each output."""
    columns = zip(zip(*floats, strict=True), zip(*rounded, strict=True), strict=True)
    return [Both(list(before), list(after)) for before, after in columns]


def _activations(model: keras.Model) -> Any:
    """Yields the id of each transformed layer and the activation computed in one with it."""
    for graph in read_graphs(model):
        for node in graph.nodes:
            if not isinstance(node.layer, TransformedLayer):
                continue
            name = activation_name(node.layer.layer)
            readers = graph.consumers(node.outputs[0])
            if name == "linear" and len(readers) == 1 and is_relu(readers[0]):
                name = activation_of(readers[0])
            yield id(node.layer), name if name in RELUS else "linear"
