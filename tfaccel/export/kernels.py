"""Kernels in a file as they were trained: the very integers and steps.

The converter knows kernels of 8 bits whose largest weight is 127 steps. A kernel that was trained
with fewer bits, with steps of its own or on a grid that zero is not the middle of, it would round
once more. So what was trained is worked out from the Keras model and put in the place of what the
converter wrote, which is found by its values.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from tfaccel.core.graph import flat_layers
from tfaccel.core.transforms import TransformedLayer
from tfaccel.export.packing import empty_unused_buffers
from tfaccel.quantization import FakeQuantizeWeights
from tfaccel.quantization.operators import KERNEL_AXES

Array = npt.NDArray[Any]

_MOST = 127  # of int8, whose -128 no kernel has
_MOST_OF_4_BITS = 7
_SAME_STEP = 1e-5  # relative
_CHANNELS_LAST = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedKernel:
    """A kernel's integers and steps, laid out as in a file.

    Attributes:
        name: of the layer.
        integers: int32, the output channels on the first axis, for depthwise kernels on the last.
        steps: of each output channel, or [channels, blocks].
        axis: of the output channels.
        bits: that it was trained for.
        block: how many integers in a row have a step together; None for all of a channel.
    """

    name: str
    integers: Array
    steps: Array
    axis: int
    bits: int
    block: int | None = None

    @property
    def largest(self) -> int:
        """The largest of the integers, in absolute value."""
        return int(np.abs(self.integers).max(initial=0))

    def values(self) -> Array:
        """Returns the weights."""
        if self.block is not None:
            return self.integers * np.repeat(self.steps, self.block, axis=1)
        return self.integers * self._along(self.steps)

    def as_converted(self) -> tuple[Array, Array]:
        """Returns the integers and steps that the converter makes of the weights."""
        values = self.values()
        others = tuple(a for a in range(values.ndim) if a != self.axis)
        steps = np.abs(values).max(axis=others) / _MOST
        safe = np.where(steps > 0, steps, 1.0)
        return np.rint(values / self._along(safe)), steps

    def _along(self, steps: Array) -> Array:
        shape = [1] * self.integers.ndim
        shape[self.axis] = -1
        return steps.reshape(shape)


def trained_kernels(model: keras.Model, prepared: keras.Model) -> list[TrainedKernel]:
    """Returns the kernels that a model was trained to round.

    Args:
        model: with fake quantization of weights.
        prepared: the same as it is converted, with weights baked and batch norm folded.
    """
    pairs = zip(_with_kernels(model), _with_kernels(prepared), strict=True)
    return [
        _read(transformed, plain, transform)
        for transformed, plain in pairs
        if isinstance(transformed, TransformedLayer)
        for key, transform in transformed.transforms
        if isinstance(transform, FakeQuantizeWeights) and key == "kernel"
    ]


def _with_kernels(model: keras.Model) -> Iterator[Any]:
    for layer in flat_layers(model):
        if type(layer.layer if isinstance(layer, TransformedLayer) else layer) in KERNEL_AXES:
            yield layer


def _read(layer: TransformedLayer, plain: Any, rounding: FakeQuantizeWeights) -> TrainedKernel:
    weight = keras.ops.convert_to_tensor(layer.variable("kernel"))
    for key, transform in layer.transforms:
        if key == "kernel" and transform is not rounding:
            weight = transform.finalize(weight)
    integers = _laid_out(plain, keras.ops.convert_to_numpy(rounding.integers(weight)))
    values = _laid_out(plain, keras.ops.convert_to_numpy(plain.kernel)).astype(np.float64)
    axis = values.ndim - 1 if isinstance(plain, _CHANNELS_LAST) else 0
    if rounding.block is not None:
        channels = len(integers)
        integers = integers.reshape(channels, -1, rounding.block)
        values = values.reshape(integers.shape)
        steps = _fit(integers, values, (2,))
        integers = integers.reshape(channels, -1)
    else:
        steps = _fit(integers, values, tuple(a for a in range(values.ndim) if a != axis))
        shape = [1] * values.ndim
        shape[axis] = -1
        # Batch norm may have turned the sign of a channel.
        integers = integers * np.where(steps < 0, -1, 1).reshape(shape)
        steps = np.abs(steps)
    return TrainedKernel(
        layer.name, integers.astype(np.int32), steps, axis, rounding.bits, rounding.block
    )


def _fit(integers: Array, values: Array, axes: tuple[int, ...]) -> Array:
    """Returns the factor between integers and values; folding has changed it for each channel."""
    squares = (integers.astype(np.float64) ** 2).sum(axis=axes)
    products = (integers * values).sum(axis=axes)
    return np.where(squares > 0, products / np.where(squares > 0, squares, 1.0), 0.0)


def _laid_out(layer: Any, kernel: Array) -> Array:
    """Returns a kernel as it stands in a file."""
    if isinstance(layer, layers.Dense):
        return kernel.T
    taps = kernel.shape[:-2] if kernel.ndim == 4 else (1, *kernel.shape[:-2])
    if isinstance(layer, _CHANNELS_LAST):
        return kernel.reshape(1, *taps, -1)
    kernel = kernel.reshape(*taps, *kernel.shape[-2:])
    transposed = isinstance(layer, (layers.Conv1DTranspose, layers.Conv2DTranspose))
    return kernel.transpose((2, 0, 1, 3) if transposed else (3, 0, 1, 2))


# In the file


def store_kernels(model: Any, kernels: Sequence[TrainedKernel], *, low_bits: bool) -> None:
    """Puts trained kernels in the place of those that the converter made of them.

    Args:
        model: an object tree of a file, changed in place.
        kernels: as trained.
        low_bits: whether kernels of 4 bits or fewer are stored in 4 bits each.

    Raises:
        ValueError: a kernel does not fit in 8 bits, or one that the converter has rounded once more
            is not found.
    """
    store = _Store(model, low_bits=low_bits)
    for kernel in kernels:
        store.put(kernel)
    empty_unused_buffers(model)


def widen_biases(model: Any) -> None:
    """Stores the biases of operators on int16 values as int64, in place.

    The converter writes int32, which LiteRT's kernels for int16 read as if it were int64.
    """
    from ai_edge_litert import schema_py_generated as schema

    types = schema.TensorType
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex].builtinCode
            for place in _biases_of(code, operator):
                bias = graph.tensors[operator.inputs[place]]
                values = graph.tensors[operator.inputs[2 if place == 3 else 0]]
                if values.type == types.INT16 and bias.type == types.INT32:
                    integers = np.frombuffer(bytes(model.buffers[bias.buffer].data), np.int32)
                    buffer = schema.BufferT()
                    buffer.data = integers.astype(np.int64).view(np.uint8)
                    model.buffers.append(buffer)
                    bias.buffer, bias.type = len(model.buffers) - 1, types.INT64


def _biases_of(code: int, operator: Any) -> list[int]:
    """Returns where an operator has its bias, empty if it has none."""
    place = _places().get(code, (0, 0))[1]
    given = place and len(operator.inputs) > place and operator.inputs[place] >= 0
    return [place] if given else []


def _places() -> dict[int, tuple[int, int]]:
    """Returns where each operator has its kernel and its bias."""
    from ai_edge_litert import schema_py_generated as schema

    names = schema.BuiltinOperator
    return {
        names.CONV_2D: (1, 2),
        names.DEPTHWISE_CONV_2D: (1, 2),
        names.FULLY_CONNECTED: (1, 2),
        names.TRANSPOSE_CONV: (1, 3),
    }


class _Store:
    def __init__(self, model: Any, *, low_bits: bool) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self._model = model
        self._types = schema.TensorType
        self._schema = schema
        self._low_bits = low_bits
        names = schema.BuiltinOperator
        places = _places()
        self._in_4_bits = {names.CONV_2D, names.DEPTHWISE_CONV_2D, names.FULLY_CONNECTED}
        self._in_4_bits_on_floats = {names.CONV_2D, names.FULLY_CONNECTED}
        # For each kernel: its tensor, the operators that read it, and their biases.
        self._uses: dict[tuple[int, int], tuple[set[int], list[Any]]] = {}
        for number, graph in enumerate(model.subgraphs):
            for operator in graph.operators:
                code = model.operatorCodes[operator.opcodeIndex].builtinCode
                if code not in places:
                    continue
                key = (number, int(operator.inputs[places[code][0]]))
                codes, biases = self._uses.setdefault(key, (set(), []))
                codes.add(code)
                for place in _biases_of(code, operator):
                    tensor = graph.tensors[operator.inputs[place]]
                    if not any(tensor is known for known in biases):
                        biases.append(tensor)

    def put(self, kernel: TrainedKernel) -> None:
        if kernel.largest > _MOST:
            raise ValueError(
                f"The kernel of {kernel.name!r} has integers up to {kernel.largest}, but int8 ends "
                f"at {_MOST}: LiteRT's kernels have no zero points, so an asymmetric grid of 8 "
                "bits does not fit. Train with symmetric_weights=True or 7 bits."
            )
        places = [key for key in self._uses if self._is(self._tensor(key), kernel)]
        if not places and self._is_rounded_again(kernel):
            raise ValueError(
                f"The kernel of {kernel.name!r}, trained for {kernel.bits} bits, is not to be "
                "found in the converted model, where it would be rounded once more. Exclude the "
                "layer from quantization (exclude=), or train it for 8 bits."
            )
        for place in places:
            self._put(place, kernel)

    def _tensor(self, key: tuple[int, int]) -> Any:
        return self._model.subgraphs[key[0]].tensors[key[1]]

    def _is_rounded_again(self, kernel: TrainedKernel) -> bool:
        return not np.array_equal(kernel.as_converted()[0], kernel.integers)

    def _is(self, tensor: Any, kernel: TrainedKernel) -> bool:
        """Whether a tensor is what the converter made of a kernel."""
        data = self._model.buffers[tensor.buffer].data
        sizes = [int(n) for n in tensor.shape if n != 1]
        if data is None or sizes != [n for n in kernel.integers.shape if n != 1]:
            return False
        if tensor.type == self._types.FLOAT32:
            floats = np.frombuffer(bytes(data), np.float32).reshape(kernel.integers.shape)
            values = kernel.values()
            return bool(np.abs(floats - values).max() <= 1e-5 * np.abs(values).max())
        if tensor.type != self._types.INT8 or tensor.quantization.scale is None:
            return False
        integers, steps = kernel.as_converted()
        found = np.frombuffer(bytes(data), np.int8).reshape(integers.shape)
        scales = np.asarray(tensor.quantization.scale, np.float64)
        used = steps > 0
        return bool(
            len(scales) == len(steps)
            and np.allclose(scales[used], steps[used], rtol=1e-4, atol=0)
            and np.abs(found - integers).max() <= 1
        )

    def _put(self, place: tuple[int, int], kernel: TrainedKernel) -> None:
        codes, biases = self._uses[place]
        tensor = self._tensor(place)
        in_integers = tensor.type == self._types.INT8
        if in_integers:
            old = np.asarray(tensor.quantization.scale, np.float64)
        else:
            old = np.ones(kernel.integers.shape[kernel.axis])
            tensor.quantization = self._schema.QuantizationParametersT()
            tensor.quantization.zeroPoint = np.zeros(len(old), np.int64)
        narrow = (
            self._low_bits
            and kernel.bits <= 4
            and kernel.largest <= _MOST_OF_4_BITS
            and codes <= (self._in_4_bits if in_integers else self._in_4_bits_on_floats)
        )
        if kernel.block is not None:
            self._put_blocks(place[0], tensor, kernel)
            return
        steps = np.where(kernel.steps > 0, kernel.steps, old)
        factors = steps / old
        same = np.abs(factors - 1).max() < _SAME_STEP
        if in_integers and same and not narrow:
            return  # the converter's own rounding is the trained one
        tensor.buffer = self._add(_packed(kernel.integers) if narrow else kernel.integers)
        tensor.type = self._types.INT4 if narrow else self._types.INT8
        tensor.quantization.scale = steps.astype(np.float32)
        tensor.quantization.quantizedDimension = kernel.axis
        for bias in biases:
            if bias.type == self._types.INT32 and not same:
                self._rescale(bias, factors)

    def _put_blocks(self, subgraph: int, tensor: Any, kernel: TrainedKernel) -> None:
        steps = self._schema.TensorT()
        steps.name = tensor.name + b"_steps"
        steps.shape = np.asarray(kernel.steps.shape, np.int32)
        steps.type = self._types.FLOAT16
        steps.buffer = self._add(kernel.steps.astype(np.float16).ravel().view(np.int8))
        graph = self._model.subgraphs[subgraph]
        graph.tensors.append(steps)
        details = self._schema.BlockwiseQuantizationT()
        details.scales, details.zeroPoints = len(graph.tensors) - 1, -1
        details.blockSize = kernel.block
        tensor.quantization = self._schema.QuantizationParametersT()
        tensor.quantization.detailsType = self._schema.QuantizationDetails.BlockwiseQuantization
        tensor.quantization.details = details
        tensor.quantization.quantizedDimension = 0
        tensor.buffer = self._add(_packed(kernel.integers))
        tensor.type = self._types.INT4

    def _rescale(self, bias: Any, factors: Array) -> None:
        integers = np.frombuffer(bytes(self._model.buffers[bias.buffer].data), np.int32)
        rounded = np.rint(integers / factors)
        bias.buffer = self._add(rounded.astype(np.int32).view(np.int8))
        scale = np.asarray(bias.quantization.scale, np.float64) * factors
        bias.quantization.scale = scale.astype(np.float32)

    def _add(self, content: Array) -> int:
        buffer = self._schema.BufferT()
        buffer.data = content.astype(np.int8).ravel().view(np.uint8)
        self._model.buffers.append(buffer)
        return len(self._model.buffers) - 1


def _packed(integers: Array) -> Array:
    """Returns two integers in each byte, the first in the lower half."""
    flat = integers.ravel()
    nibbles = np.append(flat, np.zeros(len(flat) % 2, np.int32)).astype(np.uint8) & 0xF
    return (nibbles[::2] | (nibbles[1::2] << 4)).view(np.int8)
