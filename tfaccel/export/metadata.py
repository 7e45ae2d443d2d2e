"""Facts inside a .tflite file: labels, recipe, where its weights come from."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

import tfaccel
from tfaccel.core.checks import check_file
from tfaccel.export.packing import unpack

_NAME = b"tfaccel"


def encode_facts(facts: Mapping[str, Any]) -> bytes:
    """Returns facts as JSON; what is None is left out, tfaccel's version is added.

    Raises:
        ValueError: the facts do not fit JSON.
    """
    known = {key: value for key, value in facts.items() if value is not None}
    try:
        text = json.dumps({"tfaccel": tfaccel.__version__, **known}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata must be made of what JSON can hold (dict, list, str, number, None): {error}."
        ) from error
    return text.encode("utf-8")


def put_facts(model: Any, facts: bytes) -> None:
    """Puts encoded facts into a flatbuffer's object tree, under the metadata name "tfaccel"."""
    from ai_edge_litert import schema_py_generated as schema

    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = np.frombuffer(facts, np.uint8)
    entry.name, entry.buffer = _NAME, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the facts that `to_tflite` put inside a file; empty if it holds none.

    They are "tfaccel" (its version), "scheme", "source_sha256" (of the Keras model's weights), and,
    where they were given, "labels" and "metadata".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no .tflite file.
    """
    from tfaccel.measurement.interpreter import TFLiteModel

    file = check_file(path, "read_metadata", suffixes=(".tflite",))
    TFLiteModel(file, delegates=False)  # verifies every offset, which the reader does not
    model = unpack(file.read_bytes())
    for entry in model.metadata or []:
        if entry.name == _NAME:
            return dict(json.loads(bytes(model.buffers[entry.buffer].data).decode("utf-8")))
    return {}
