"""A float model and its quantized form side by side, one layer after the other.

Each layer is adjusted when all before it are: it sees, for the calibration data, what it gets in
float and what it gets from the quantized layers, and may make up for the difference.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.cloning import clone_built
from tfaccel.core.transforms import TransformedLayer
from tfaccel.core.walking import read_graphs, walk
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
        inputs: the same places, as the quantized layers before give them.
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

    def run(self) -> None:
        """Adjusts all layers."""
        specs = self._model.inputs
        inputs = [
            [keras.ops.convert_to_tensor(batch[place], spec.dtype) for batch in self._batches]
            for place, spec in enumerate(specs)
        ]
        for _ in walk(self._model, [Both(values, values) for values in inputs], self._call):
            pass

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
        if type(layer) not in AS_MATRICES or not bits:
            return
        seed = self._seed + len(self._float_layers)
        share = -(-self._places // len(self._batches))
        floats, rounded = (
            np.concatenate(
                [cut_patches(layer, x, share, seed + n) for n, x in enumerate(values)], axis=1
            )
            for values in (value.floats, value.rounded)
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
