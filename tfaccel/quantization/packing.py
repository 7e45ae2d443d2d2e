"""Low-bit models in a file: one bit for a binary weight, two for a ternary one.

The file is 8 bytes of magic, the header's length (4 bytes, little endian), the header (JSON, zlib)
and the weights in the model's order. A binary weight is ceil(n / 8) bytes, a ternary one
ceil(n / 4), both followed by their scales in the weight's own type; any other weight is stored as
it is. What is read back is, to the last bit, the plain model of `tfaccel.strip`.
"""

import dataclasses
import importlib
import json
import math
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.artifacts import write_aside
from tfaccel.core.checks import check_file, check_model
from tfaccel.core.graph import flat_layers
from tfaccel.core.stripping import strip
from tfaccel.core.transforms import TransformedLayer, transformed_layers
from tfaccel.quantization.low_bit_weights import Levels, LowBitWeights

Array = npt.NDArray[Any]

MAGIC = b"TFACCLB1"
RAW, BINARY, TERNARY = "raw", "binary", "ternary"


@dataclasses.dataclass(frozen=True)
class PackedSize:
    """What a packed file holds, in bytes.

    Attributes:
        path: of the file.
        size_bytes: of the whole file.
        header_bytes: magic, length, and the compressed description of the model.
        code_bytes: the packed weights, 1 or 2 bits each.
        scale_bytes: their scales.
        other_bytes: the weights that are stored as they are: first and last layer, batch norm, ...
        float_bytes: all weights of the plain model as they are in memory.
    """

    path: Path
    size_bytes: int
    header_bytes: int
    code_bytes: int
    scale_bytes: int
    other_bytes: int
    float_bytes: int


def pack_codes(codes: Array, bits: int) -> bytes:
    r"""Packs codes, eight or four to a byte, the first in the lowest bits.

    Args:
        codes: integers: -1 and 1 with 1 bit (stored as 0 and 1); -1, 0 and 1 with 2 bits (stored as
            3, 0 and 1).
        bits: 1 or 2.

    >>> pack_codes(np.array([1, -1, 1]), 1), pack_codes(np.array([1, 0, -1]), 2)
    (b'\x05', b'1')
    """
    flat = np.asarray(codes).ravel()
    if bits == 1:
        return np.packbits(flat > 0, bitorder="little").tobytes()
    planes = np.stack([flat != 0, flat < 0], axis=-1)
    return np.packbits(planes.ravel(), bitorder="little").tobytes()


def unpack_codes(packed: bytes, count: int, bits: int) -> Array:
    """Returns `count` codes as int8, what `pack_codes` made into bytes."""
    flat = np.unpackbits(np.frombuffer(packed, np.uint8), count=count * bits, bitorder="little")
    if bits == 1:
        return flat.astype(np.int8) * 2 - 1
    nonzero, negative = flat.reshape(-1, 2).astype(np.int8).T
    return nonzero - 2 * negative


def save_packed(model: keras.Model, path: str | os.PathLike[str]) -> PackedSize:
    """Saves a low-bit model with one or two bits for each low-bit weight.

    Args:
        model: what `low_bit` made, trained, not stripped; not changed.
        path: of the file, which appears whole or not at all.

    Returns:
        How large the file and its parts are.

    Raises:
        TypeError: the model is subclassed, or is no model.
        ValueError: the model has no low-bit weights, rounds them once more behind the low-bit
            method, or has a layer whose state is no weight (a vocabulary).
    """
    check_model(model, "save_packed")
    packable = _packable(model)
    if not packable:
        raise ValueError(
            f"save_packed() needs a model with low-bit weights, but {model.name!r} has none. "
            "Give what low_bit(model) returned, before tfaccel.strip."
        )
    plain = strip(model)
    check_weights_only(plain, "save_packed")
    entries, blobs, sizes = [], [], {RAW: 0, "codes": 0, "scales": 0}
    for variable in plain.weights:
        values = keras.ops.convert_to_numpy(variable)
        levels = packable.get(_key(values))
        entry = {"kind": RAW, "shape": list(values.shape), "dtype": str(variable.dtype)}
        if levels is None:
            blobs.append(np.ascontiguousarray(values).tobytes())
            sizes[RAW] += len(blobs[-1])
        else:
            codes, scales = _encode(levels, entry)
            blobs += [codes, scales]
            sizes["codes"] += len(codes)
            sizes["scales"] += len(scales)
        entries.append(entry)
    header = {"model": json.loads(plain.to_json()), "weights": entries}
    packed = zlib.compress(json.dumps(header, separators=(",", ":")).encode("utf-8"), 9)
    start = MAGIC + struct.pack("<I", len(packed)) + packed
    with write_aside(path) as aside, aside.open("wb") as file:
        file.write(start)
        file.writelines(blobs)
    return PackedSize(
        path=Path(path),
        size_bytes=len(start) + sum(map(len, blobs)),
        header_bytes=len(start),
        code_bytes=sizes["codes"],
        scale_bytes=sizes["scales"],
        other_bytes=sizes[RAW],
        float_bytes=sum(keras.ops.convert_to_numpy(v).nbytes for v in plain.weights),
    )


def check_weights_only(model: keras.Model, verb: str) -> None:
    """Raises ValueError if a layer keeps something that is no weight.

    Args:
        model: whose weights are to be stored.
        verb: what the user has called.
    """
    for layer in flat_layers(model):
        if hasattr(layer, "save_assets"):
            raise ValueError(
                f"{verb}() stores weights, but layer {layer.name!r} ({type(layer).__name__}) "
                "keeps a vocabulary beside them. Leave it out of the model, and apply it to the "
                "data."
            )


def load_packed(path: str | os.PathLike[str]) -> keras.Model:
    """Reads what `save_packed` wrote.

    Returns:
        A plain Keras model, equal to the last bit to `tfaccel.strip` of the model that was saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, is cut off, or needs a class that is not known.
    """
    source = check_file(path, "load_packed")
    content = source.read_bytes()
    advice = "Write it again with save_packed(model, path)."
    if not content.startswith(MAGIC):
        raise ValueError(
            f"{str(source)!r} is no packed model: it begins with {content[:8]!r} instead of "
            f"{MAGIC!r}. {advice}"
        )
    try:
        (length,) = struct.unpack_from("<I", content, len(MAGIC))
        place = len(MAGIC) + 4
        header = json.loads(zlib.decompress(content[place : place + length]))
    except (struct.error, zlib.error, ValueError) as error:
        raise ValueError(f"{str(source)!r} is damaged ({error}). {advice}") from error
    place += length
    wanted = place + sum(sum(_lengths(entry)) for entry in header["weights"])
    if wanted != len(content):
        raise ValueError(
            f"{str(source)!r} should have {wanted} bytes, but has {len(content)}. {advice}"
        )
    values = []
    for entry in header["weights"]:
        values.append(_decode(content, place, entry))
        place += sum(_lengths(entry))
    text = json.dumps(header["model"])
    # Our classes register themselves when their module is imported, and Keras imports none.
    for module in sorted(set(re.findall(r'"module":\s*"(tfaccel\.[\w.]+)"', text))):
        importlib.import_module(module)
    model = keras.models.model_from_json(text)
    model.set_weights(values)
    for layer in flat_layers(model):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
    return model


def levels_of(layer: TransformedLayer, key: str = "kernel") -> Levels | None:
    """Returns the codes and scales that a layer's weight is baked to, None if it is not low-bit.

    Raises:
        ValueError: another transform follows the low-bit one.
    """
    transforms = [transform for name, transform in layer.transforms if name == key]
    if not any(isinstance(transform, LowBitWeights) for transform in transforms):
        return None
    last = transforms[-1]
    if not isinstance(last, LowBitWeights):
        raise ValueError(  # noqa: TRY004 (the model is of the right type)
            f"The weight {key!r} of layer {layer.name!r} is rounded once more "
            f"({type(last).__name__}) behind its low-bit method, so that it has no bits to pack. "
            "Apply low_bit to the model alone."
        )
    weight = keras.ops.convert_to_tensor(layer.variable(key))
    for transform in transforms[:-1]:
        weight = transform.finalize(weight)
    levels = last.levels(weight)
    return Levels(
        *(keras.ops.convert_to_numpy(x) for x in (levels.codes, levels.positive, levels.negative))
    )


def _packable(model: keras.Model) -> dict[tuple[Any, ...], Levels]:
    """Returns the levels of all low-bit weights by the baked value, by which strip's are known."""
    found = {}
    for layer in transformed_layers(model):
        for key, transform in layer.transforms:
            if isinstance(transform, LowBitWeights):
                levels = levels_of(layer, key)
                found[_key(_values(levels))] = levels
    return {key: levels for key, levels in found.items() if levels is not None}


def _key(values: Array) -> tuple[Any, ...]:
    # Adding zero makes one zero of the two.
    return values.shape, str(values.dtype), (values + values.dtype.type(0)).tobytes()


def _values(levels: Any) -> Array:
    below = np.where(levels.codes < 0, -levels.negative, np.zeros_like(levels.positive))
    return np.asarray(np.where(levels.codes > 0, levels.positive, below))


def _encode(levels: Levels, entry: dict[str, Any]) -> tuple[bytes, bytes]:
    """Returns codes and scales as bytes, and completes the entry."""
    bits = 1 if np.all(levels.codes != 0) else 2
    one = np.array_equal(levels.positive, levels.negative)
    scales = [levels.positive] if one else [levels.positive, levels.negative]
    entry.update(
        kind=BINARY if bits == 1 else TERNARY,
        scales=len(scales),
        scale_shape=list(np.shape(levels.positive)),
    )
    packed = b"".join(np.ascontiguousarray(scale).tobytes() for scale in scales)
    return pack_codes(levels.codes, bits), packed


def _lengths(entry: dict[str, Any]) -> tuple[int, int]:
    """Returns the bytes of an entry's codes and of its scales; raw values have no scales."""
    count, item = math.prod(entry["shape"]), np.dtype(entry["dtype"]).itemsize
    if entry["kind"] == RAW:
        return count * item, 0
    per_byte = 8 if entry["kind"] == BINARY else 4
    return -(-count // per_byte), entry["scales"] * math.prod(entry["scale_shape"]) * item


def _decode(content: bytes, place: int, entry: dict[str, Any]) -> Array:
    shape, dtype = entry["shape"], np.dtype(entry["dtype"])
    first, second = _lengths(entry)
    if entry["kind"] == RAW:
        return np.frombuffer(content[place : place + first], dtype).reshape(shape)
    bits = 1 if entry["kind"] == BINARY else 2
    codes = unpack_codes(content[place : place + first], math.prod(shape), bits).reshape(shape)
    scales = np.frombuffer(content[place + first : place + first + second], dtype)
    parts = scales.reshape(entry["scales"], *entry["scale_shape"])
    return _values(Levels(codes, parts[0], parts[-1]))
