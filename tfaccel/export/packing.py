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


def empty_unused_buffers(model: Any) -> None:
    """Takes the content of buffers away that nothing in an object tree refers to."""
    used = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    used |= {entry.buffer for entry in model.metadata or []}
    for number, buffer in enumerate(model.buffers):
        if number not in used:
            buffer.data = None
