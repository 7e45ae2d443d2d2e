"""Facts inside a .tflite file: labels, recipe, where its weights come from."""

import json
import os
from collections.abc import Mapping
from typing import Any

import tfaccel
from tfaccel.core.checks import check_file

_NAME = b"tfaccel"


def with_metadata(content: bytes, facts: Mapping[str, Any]) -> bytes:
    """Returns a .tflite file's bytes with facts put inside, under the metadata name "tfaccel".

    Args:
        content: the file.
        facts: anything that JSON can hold; what is None is left out, the version is added.

    Raises:
        ValueError: the facts do not fit JSON.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    known = {key: value for key, value in facts.items() if value is not None}
    try:
        text = json.dumps({"tfaccel": tfaccel.__version__, **known})
    except TypeError as error:
        raise ValueError(f"metadata must be made of what JSON can hold: {error}.") from error
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = list(text.encode("utf-8"))
    entry.name, entry.buffer = _NAME, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the facts that `to_tflite` put inside a file; empty if it holds none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no .tflite file.
    """
    from ai_edge_litert import schema_py_generated as schema

    from tfaccel.measurement.interpreter import TFLiteModel

    file = check_file(path, "read_metadata", suffixes=(".tflite",))
    TFLiteModel(file, delegates=False)  # verifies every offset, which the reader does not
    model = schema.ModelT.InitFromPackedBuf(file.read_bytes(), 0)
    for entry in model.metadata or []:
        if entry.name == _NAME:
            facts = json.loads(bytes(model.buffers[entry.buffer].data).decode("utf-8"))
            return dict(facts)
    return {}
