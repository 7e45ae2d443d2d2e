"""What stands in a .tflite file: its operators and constants, read without running it."""

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from tfaccel.core.checks import check_file
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.measurement.operator_macs import macs_of_subgraph

# Where each operator has its weights and, for biases, which are int32 in a quantized file.
_KERNELS = {
    "CONV_2D": (1,),
    "DEPTHWISE_CONV_2D": (1,),
    "CONV_3D": (1,),
    "FULLY_CONNECTED": (1,),
    "TRANSPOSE_CONV": (1,),
    "CONV_3D_TRANSPOSE": (1,),
    "BATCH_MATMUL": (0, 1),
    "EMBEDDING_LOOKUP": (1,),
    "GATHER": (0,),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": tuple(range(1, 9)),
    "UNIDIRECTIONAL_SEQUENCE_RNN": (1, 2),
}
_BIASES = {
    "CONV_2D": (2,),
    "DEPTHWISE_CONV_2D": (2,),
    "CONV_3D": (2,),
    "FULLY_CONNECTED": (2,),
    "TRANSPOSE_CONV": (3,),
    "CONV_3D_TRANSPOSE": (3,),
}
_UNPACKING = ("DEQUANTIZE", "DENSIFY")
_CONTROL_FLOW = ("WHILE", "IF", "CALL_ONCE")
_WEIGHT_TYPES = (
    "FLOAT32",
    "FLOAT16",
    "BFLOAT16",
    "INT8",
    "UINT8",
    "INT16",
    "INT4",
    "INT2",
)
_BITS = {"INT4": 4, "INT2": 2}


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator of a .tflite file.

    Attributes:
        name: such as "CONV_2D".
        inputs: numbers of the tensors that it reads, -1 for one that is left out.
        outputs: numbers of the tensors that it writes.
        options: the file's own record of its options, or None.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Any


class TFLiteFile:
    """A .tflite file as it is written; make one with `TFLiteFile.read`."""

    def __init__(self, model: Any, schema: Any) -> None:
        self._model = model
        self._operator_names = _names(schema.BuiltinOperator)
        self._type_names = _names(schema.TensorType)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "TFLiteFile":
        """Reads a file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is empty, cut off, or no .tflite file.
        """
        from ai_edge_litert import schema_py_generated as schema

        file = check_file(path, "TFLiteFile.read", suffixes=(".tflite",))
        TFLiteModel(file, delegates=False)  # verifies every offset, which the reader does not
        return cls(schema.ModelT.InitFromPackedBuf(file.read_bytes(), 0), schema)

    def operators(self, subgraph: int = 0) -> list[Operator]:
        """Returns the operators of a subgraph in the order in which they run."""
        return [
            Operator(
                name=self._name(operator),
                inputs=tuple(int(i) for i in operator.inputs),
                outputs=tuple(int(i) for i in operator.outputs),
                options=operator.builtinOptions,
            )
            for operator in self._model.subgraphs[subgraph].operators
        ]

    def shape(self, tensor: int, subgraph: int = 0) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        shape = self._tensor(tensor, subgraph).shape
        return () if shape is None else tuple(int(n) for n in shape)

    def constant_tensors(self, subgraph: int = 0) -> set[int]:
        """Returns the numbers of the tensors whose values stand in the file."""
        tensors = range(len(self._model.subgraphs[subgraph].tensors))
        return {tensor for tensor in tensors if self._data(tensor, subgraph) is not None}

    def inputs(self, subgraph: int = 0) -> tuple[int, ...]:
        """Returns the numbers of the tensors that enter a subgraph."""
        return tuple(int(i) for i in self._model.subgraphs[subgraph].inputs)

    def outputs(self, subgraph: int = 0) -> tuple[int, ...]:
        """Returns the numbers of the tensors that leave a subgraph."""
        return tuple(int(i) for i in self._model.subgraphs[subgraph].outputs)

    def integer(self, tensor: int, subgraph: int) -> int | None:
        """Returns the value of a constant int32 scalar, or None for any other tensor."""
        data = self._data(tensor, subgraph) if tensor >= 0 else None
        if data is None or self._type(tensor, subgraph) != "INT32" or self.shape(tensor, subgraph):
            return None
        return int(data.view(np.int32)[0])

    def parameters(self) -> int:
        """Returns how many numbers the weights and biases hold.

        Shapes, paddings and the like are none, nor are the scalars of arithmetic. A bias of zeros
        may be missing: the converter leaves it out.
        """
        sizes = {}
        for subgraph, operator, place, tensor in self._constants():
            bias = place in _BIASES.get(operator.name, ())
            numbers = self._type(tensor, subgraph) in _WEIGHT_TYPES and self.shape(tensor, subgraph)
            if bias or numbers:
                sizes[self._buffer(tensor, subgraph)] = math.prod(self.shape(tensor, subgraph))
        return sum(sizes.values())

    def sparsity(self) -> float | None:
        """Returns the share of zeros among the kernels' weights, or None if there is none."""
        total = zeros = 0
        seen = set()
        for subgraph, operator, place, tensor in self._constants():
            buffer = self._buffer(tensor, subgraph)
            if place not in _KERNELS.get(operator.name, ()) or buffer in seen:
                continue
            if self._type(tensor, subgraph) in _WEIGHT_TYPES:
                seen.add(buffer)
                size = math.prod(self.shape(tensor, subgraph))
                total += size
                # A tensor in sparse encoding holds its non-zeros and a few zeros of their blocks.
                zeros += size - self._nonzeros(tensor, subgraph, size)
        return zeros / total if total else None

    def macs(self) -> int | None:
        """Returns the multiply-accumulates of one sample, None if a loop's length is unknown."""
        total = macs_of_subgraph(self, 0)
        ends = [self.shape(tensor) for tensor in (*self.inputs(), *self.outputs())]
        batches = {shape[0] if shape else None for shape in ends}
        batch = batches.pop() if len(batches) == 1 else None
        return total if total is None or not batch else total // batch

    def _constants(self) -> Iterator[tuple[int, Operator, int, int]]:
        """Yields subgraph, operator, place among its inputs, and tensor of each constant."""
        for subgraph in range(len(self._model.subgraphs)):
            unpacked: dict[int, int] = {}
            for operator in self.operators(subgraph):
                if operator.name in _CONTROL_FLOW:
                    continue
                for place, tensor in enumerate(operator.inputs):
                    origin = unpacked.get(tensor, tensor)
                    if origin < 0 or self._data(origin, subgraph) is None:
                        continue
                    if operator.name in _UNPACKING:
                        unpacked[operator.outputs[0]] = origin
                    else:
                        yield subgraph, operator, place, origin

    def _nonzeros(self, tensor: int, subgraph: int, size: int) -> int:
        values = self._values(tensor, subgraph)[:size]
        quantization = self._tensor(tensor, subgraph).quantization
        zero_points = getattr(quantization, "zeroPoint", None)
        zero_point = 0 if zero_points is None or not len(zero_points) else int(zero_points[0])
        return int(np.count_nonzero(values != zero_point))

    def _values(self, tensor: int, subgraph: int) -> npt.NDArray[Any]:
        data = self._data(tensor, subgraph)
        kind = self._type(tensor, subgraph)
        if data is None:
            raise ValueError(f"Tensor {tensor} has no values in the file.")
        if kind in _BITS:
            bits = _BITS[kind]
            fields = [(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
            return np.stack(fields, axis=-1).reshape(-1)
        if kind == "BFLOAT16":
            return data.view(np.uint16)
        return data.view(np.dtype(kind.lower()))

    def _name(self, operator: Any) -> str:
        code = self._model.operatorCodes[operator.opcodeIndex]
        # Files from before builtinCode outgrew a byte have it in the deprecated field.
        name = self._operator_names[max(code.builtinCode, code.deprecatedBuiltinCode)]
        return name if code.customCode is None else code.customCode.decode()

    def _tensor(self, tensor: int, subgraph: int) -> Any:
        return self._model.subgraphs[subgraph].tensors[tensor]

    def _type(self, tensor: int, subgraph: int) -> str:
        return self._type_names[self._tensor(tensor, subgraph).type]

    def _buffer(self, tensor: int, subgraph: int) -> int:
        return int(self._tensor(tensor, subgraph).buffer)

    def _data(self, tensor: int, subgraph: int) -> npt.NDArray[np.uint8] | None:
        data = self._model.buffers[self._buffer(tensor, subgraph)].data
        return None if data is None or len(data) == 0 else np.asarray(data, np.uint8)


def _names(enumeration: type) -> dict[int, str]:
    return {value: name for name, value in vars(enumeration).items() if isinstance(value, int)}
