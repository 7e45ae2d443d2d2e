"""The converter's flatbuffer, taken apart and put together again with names that users know."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# The schema demands it (force_align), for kernels that load whole vectors.
_ALIGNMENT = 16


def unpack(content: bytes) -> Any:
    """Returns a .tflite file's bytes as an object tree (ModelT of TFLite's schema)."""
    from ai_edge_litert.tools import flatbuffer_utils

    return flatbuffer_utils.read_model_from_bytearray(bytearray(content))


def pack(model: Any) -> bytes:
    """Returns the bytes of an object tree.

    Weights stand at multiples of 16 bytes, as the schema demands. TensorFlow's own converter
    leaves them at multiples of 4, because Python's flatbuffer code knows nothing of it.
    """
    from ai_edge_litert.tools.flatbuffer_utils import flatbuffers

    class AlignedBuilder(flatbuffers.Builder):
        def CreateNumpyVector(self, x: Any) -> Any:  # noqa: N802
            self.Prep(_ALIGNMENT, x.nbytes)
            return super().CreateNumpyVector(x)

    for buffer in model.buffers:
        if buffer.data is not None:
            buffer.data = np.frombuffer(bytes(buffer.data), np.uint8)
    builder = AlignedBuilder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def name_ends(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Gives inputs and outputs the names that the Keras model has for them.

    TensorFlow allows Python identifiers only, so the converter is given numbered names, whose
    sorted order is the model's order.

    Args:
        model: an object tree with one signature, changed in place.
        inputs: names in the order of the model's inputs.
        outputs: likewise.
    """
    signature, graph = model.signatureDefs[0], model.subgraphs[0]
    taken = {tensor.name for tensor in graph.tensors}
    for maps, names in ((signature.inputs, inputs), (signature.outputs, outputs)):
        maps.sort(key=lambda entry: entry.name)
        for entry, name in zip(maps, names, strict=True):
            entry.name = name.encode("utf-8")
            if entry.name not in taken:
                graph.tensors[entry.tensorIndex].name = entry.name
                taken.add(entry.name)
    graph.inputs = [entry.tensorIndex for entry in signature.inputs]
    graph.outputs = [entry.tensorIndex for entry in signature.outputs]


def store_low_bits(model: Any) -> int:
    """Stores kernels whose integers lie on a grid of 4 bits or fewer in 4 bits each.

    The converter knows 8 bits only: a kernel that was trained or rounded to levels q * s with q in
    -7 to 7 has the integers round(127 q / 7) there. These tell the levels without loss, so the
    tensor becomes INT4 with step s, and its bias, whose step depends on it, is put on its new grid.

    Args:
        model: an object tree, changed in place.

    Returns:
        How many kernels were stored so.
    """
    from ai_edge_litert import schema_py_generated as schema

    operators = schema.BuiltinOperator
    kinds = (operators.CONV_2D, operators.DEPTHWISE_CONV_2D, operators.FULLY_CONNECTED)
    stored: dict[tuple[int, int], float] = {}
    for number, graph in enumerate(model.subgraphs):
        for operation in graph.operators:
            code = model.operatorCodes[operation.opcodeIndex]
            if code.builtinCode not in kinds:
                continue
            place = (number, int(operation.inputs[1]))
            kernel = graph.tensors[place[1]]
            factor = stored.get(place)
            if factor is None and kernel.type == schema.TensorType.INT8:
                factor = _to_int4(model, kernel, schema.TensorType.INT4)
            if factor is None:
                continue
            stored[place] = factor
            if len(operation.inputs) > 2 and operation.inputs[2] >= 0:
                bias = graph.tensors[operation.inputs[2]]
                if (number, int(operation.inputs[2])) not in stored:
                    _rescale_bias(model, bias, factor)
                    stored[number, int(operation.inputs[2])] = factor
    _empty_unused_buffers(model)
    tensors = [model.subgraphs[number].tensors[index] for number, index in stored]
    return sum(1 for tensor in tensors if tensor.type == schema.TensorType.INT4)


def _empty_unused_buffers(model: Any) -> None:
    used = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    used |= {entry.buffer for entry in model.metadata or []}
    for number, buffer in enumerate(model.buffers):
        if number not in used:
            buffer.data = None


def _to_int4(model: Any, kernel: Any, int4: int) -> float | None:
    """Makes an int8 kernel one of 4 bits if it loses nothing; returns by what its step grew."""
    content = model.buffers[kernel.buffer].data
    if content is None or not len(content) or kernel.quantization.scale is None:
        return None  # no constant
    integers = np.frombuffer(bytes(content), np.int8).astype(np.int32)
    for end in (1, 3, 7):  # of grids of 2, 3 and 4 bits
        levels = np.rint(integers * (end / 127)).astype(np.int32)
        if np.array_equal(np.rint(levels * (127 / end)).astype(np.int32), integers):
            break
    else:
        return None
    nibbles = np.append(levels, np.zeros(len(levels) % 2, np.int32)).astype(np.uint8) & 0xF
    kernel.buffer = _add_buffer(model, nibbles[::2] | (nibbles[1::2] << 4))
    kernel.type = int4
    factor = 127 / end
    _multiply_step(kernel, factor)
    return factor


def _rescale_bias(model: Any, bias: Any, factor: float) -> None:
    integers = np.frombuffer(bytes(model.buffers[bias.buffer].data), np.int32)
    coarser = np.rint(integers / factor).astype(np.int32)
    bias.buffer = _add_buffer(model, coarser.view(np.uint8))
    _multiply_step(bias, factor)


def _multiply_step(tensor: Any, factor: float) -> None:
    scale = np.asarray(tensor.quantization.scale, np.float32)
    tensor.quantization.scale = scale * np.float32(factor)


def _add_buffer(model: Any, content: Any) -> int:
    from ai_edge_litert import schema_py_generated as schema

    buffer = schema.BufferT()
    buffer.data = content
    model.buffers.append(buffer)
    return len(model.buffers) - 1
