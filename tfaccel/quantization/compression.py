"""Deep Compression's last stage: what clustered and pruned weights take when they are encoded.

A weight tensor of few distinct values is stored as a table of them and, for each weight, its place
in the table; one of many zeros as its non-zeros, each with the number of zeros before it in 4, 5 or
8 bits, a filler zero standing where that is not enough. Both sequences are Huffman-coded (Han et
al. 2016, sections 2 to 4). A pruned tensor that is not clustered keeps its non-zeros as floats. The
sizes are those of the bytes that `save_compressed` writes.
"""

import dataclasses
import importlib
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.artifacts import write_aside
from tfaccel.core.checks import check_file, check_model
from tfaccel.core.graph import flat_layers
from tfaccel.core.stripping import strip
from tfaccel.core.transforms import weight_keys
from tfaccel.quantization.entropy import (
    decode_huffman,
    encode_huffman,
    entropy,
    huffman_bits,
    huffman_lengths,
)
from tfaccel.quantization.packing import check_weights_only

Array = npt.NDArray[Any]

FLOAT, DENSE, SPARSE, SPARSE_FLOAT = "float", "dense", "sparse", "sparse float"
_FORMS = (FLOAT, DENSE, SPARSE, SPARSE_FLOAT)
_POSITION_BITS = (4, 5, 8)
# A tensor of more distinct values than this is not clustered.
_LARGEST_TABLE = 4096
_MAGIC = b"tfaccel compressed model 1\n"
# Form, bits of a position, values in the table, symbols, bytes of symbols, bytes of positions.
_HEADER = struct.Struct("<BBHIII")


@dataclasses.dataclass(frozen=True)
class WeightSize:
    """What one weight tensor takes.

    Attributes:
        layer: name of the layer.
        weight: key of the weight in it.
        weights: how many there are.
        zeros: how many of them are 0.
        table: how many values the table holds: distinct ones, or all entries for "sparse float".
        form: "float" (as it is), "dense" (a place in the table for each weight), "sparse" (one for
            each non-zero, and the zeros before it) or "sparse float" (each non-zero itself, and the
            zeros before it).
        float_bits: as it is, 32 for each float32.
        table_bits: of the table, the lengths of the codes and a header; all of it for "float".
        index_bits: of the places in the table, in as few bits as the table's length needs.
        position_bits: of the numbers of zeros, in 4, 5 or 8 bits each.
        huffman_index_bits: of the places, Huffman-coded, filled up to a byte.
        huffman_position_bits: of the numbers of zeros, likewise.
        entropy_bits: Shannon's bound on places and numbers of zeros together.
    """

    layer: str
    weight: str
    weights: int
    zeros: int
    table: int
    form: str
    float_bits: int
    table_bits: int
    index_bits: int
    position_bits: int
    huffman_index_bits: int
    huffman_position_bits: int
    entropy_bits: float

    @property
    def fixed_bits(self) -> int:
        """Bits before Huffman coding: table, places and positions of fixed length."""
        return self.table_bits + self.index_bits + self.position_bits

    @property
    def huffman_bits(self) -> int:
        """Bits in all, Huffman-coded."""
        return self.table_bits + self.huffman_index_bits + self.huffman_position_bits


@dataclasses.dataclass(frozen=True)
class CompressedSize:
    """What the weights of a model take, tensor by tensor.

    Attributes:
        weights: one record for each.
    """

    weights: tuple[WeightSize, ...]

    @property
    def float_bytes(self) -> int:
        """Bytes of all weights as they are."""
        return sum(size.float_bits for size in self.weights) // 8

    @property
    def fixed_bytes(self) -> int:
        """Bytes with tables and places of fixed length (pruned and clustered, not yet coded)."""
        return -(-sum(size.fixed_bits for size in self.weights) // 8)

    @property
    def huffman_bytes(self) -> int:
        """Bytes with Huffman-coded places and positions, tables of codes and headers included."""
        return sum(size.huffman_bits for size in self.weights) // 8

    @property
    def ratio(self) -> float:
        """How many times smaller than float32 the Huffman-coded weights are."""
        return self.float_bytes / max(self.huffman_bytes, 1)


def huffman_size(model: keras.Model) -> CompressedSize:
    """Returns what a model's weights take in Deep Compression's encoding, each in its best form.

    Masks, clusters and other transforms count as applied. Biases, batch norm and kernels with many
    distinct values stay float and count in full. A table holds the distinct values of a whole
    tensor, also where each channel has its own.

    Args:
        model: a built Functional or Sequential model.

    Raises:
        TypeError: the model is subclassed, or is no model.
        ValueError: the model is not built.

    References:
        Han et al. 2016, Deep Compression.
    """
    check_model(model, "huffman_size")
    plain = strip(model)
    names = {
        id(variable): (layer.name, key)
        for layer in flat_layers(plain)
        for key, variable in weight_keys(layer).items()
    }
    sizes = []
    for variable in plain.weights:
        layer, key = names.get(id(variable), ("", variable.path))
        encoding = _best(keras.ops.convert_to_numpy(variable))
        sizes.append(_size(encoding, layer, key))
    return CompressedSize(tuple(sizes))


def save_compressed(model: keras.Model, path: str | os.PathLike[str]) -> Path:
    """Writes a model with its weights encoded as `huffman_size` says; exact to the last bit.

    Masks, clusters and other transforms are baked in, as by `tfaccel.strip`. The architecture
    stands before the weights, as deflated JSON.

    Args:
        model: a built Functional or Sequential model.
        path: any name; the file appears whole or not at all.

    Raises:
        TypeError: the model is subclassed, or is no model.
        ValueError: the model is not built, or has a layer whose state is no weight (a vocabulary).
    """
    check_model(model, "save_compressed")
    plain = strip(model)
    check_weights_only(plain, "save_compressed")
    architecture = zlib.compress(plain.to_json().encode("utf-8"), 9)
    with write_aside(path) as aside, aside.open("wb") as file:
        file.write(_MAGIC + struct.pack("<I", len(architecture)) + architecture)
        for variable in plain.weights:
            file.write(_to_bytes(_best(keras.ops.convert_to_numpy(variable))))
    return Path(path)


def load_compressed(path: str | os.PathLike[str]) -> keras.Model:
    """Reads a model that `save_compressed` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, cut off or damaged.
    """
    source = check_file(path, "load_compressed")
    content = source.read_bytes()
    damaged = f"{str(source)!r} is no whole file of save_compressed(). Write it again."
    if not content.startswith(_MAGIC):
        raise ValueError(damaged)
    try:
        (length,) = struct.unpack_from("<I", content, len(_MAGIC))
        begin = len(_MAGIC) + 4
        json = zlib.decompress(content[begin : begin + length]).decode("utf-8")
        # Our classes register themselves when their module is imported.
        for module in sorted(set(re.findall(r'"module":\s*"(tfaccel\.[\w.]+)"', json))):
            importlib.import_module(module)
        model = keras.models.model_from_json(json)
        place = begin + length
        for variable in model.weights:
            shape, dtype = tuple(variable.shape), np.dtype(variable.dtype)
            value, place = _from_bytes(content, place, shape, dtype)
            variable.assign(value)
        for layer in flat_layers(model):
            if isinstance(layer, keras.layers.Normalization):
                layer.finalize_state()
    except (struct.error, zlib.error, LookupError, OverflowError, ValueError) as error:
        raise ValueError(f"{damaged} ({error})") from error
    if place != len(content):
        raise ValueError(f"{damaged} ({len(content) - place} bytes too many)")
    return model


@dataclasses.dataclass(frozen=True)
class _Encoding:
    """A tensor taken apart; symbols are places in the table, gaps the zeros before each."""

    values: Array
    form: str
    table: Array
    symbols: Array
    gaps: Array
    gap_bits: int = 0

    def streams(self) -> Iterator[tuple[int, Array, int]]:
        """Yields 0 for places and 1 for gaps, the sequence, and how many symbols it may have."""
        if self.form in (DENSE, SPARSE):
            yield 0, self.symbols, len(self.table)
        if self.form in (SPARSE, SPARSE_FLOAT):
            yield 1, self.gaps, 2**self.gap_bits


def _best(values: Array) -> _Encoding:
    """Returns the form that takes the fewest bits."""
    nothing = np.zeros(0, np.int64)
    plain = _Encoding(values, FLOAT, values.ravel()[:0], nothing, nothing)
    if values.dtype != np.float32 or not values.size:
        return plain
    # Bits, not numbers: they tell 0.0 and -0.0 apart.
    table, symbols = np.unique(values.ravel().view(np.uint32), return_inverse=True)
    few = len(table) <= min(_LARGEST_TABLE, values.size)
    found = [plain]
    if few:
        found.append(_Encoding(values, DENSE, table.view(np.float32), symbols.ravel(), nothing))
    if (values == 0).any():
        for bits in _POSITION_BITS:
            found += [_sparse(values, bits, form) for form in _FORMS[2 if few else 3 :]]
    return min(found, key=lambda encoding: _size(encoding, "", "").huffman_bits)


def _sparse(values: Array, bits: int, form: str = SPARSE) -> _Encoding:
    flat = values.ravel().view(np.uint32)
    places = np.flatnonzero(flat)
    gaps = np.diff(places, prepend=-1) - 1
    # A filler stands for as many zeros as a gap can have, and for one more: itself.
    fillers, rest = gaps // 2**bits, gaps % 2**bits
    ends = np.cumsum(fillers + 1)
    kept = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint32)
    spread = np.full(len(kept), 2**bits - 1, np.int64)
    kept[ends - 1] = flat[places]
    spread[ends - 1] = rest
    if form == SPARSE_FLOAT:
        return _Encoding(values, form, kept.view(np.float32), spread[:0], spread, bits)
    table, symbols = np.unique(kept, return_inverse=True)
    return _Encoding(values, form, table.view(np.float32), symbols.ravel(), spread, bits)


def _size(encoding: _Encoding, layer: str, key: str) -> WeightSize:
    values, form = encoding.values, encoding.form
    fixed, coded, bound = [0, 0], [0, 0], 0.0
    table_bits = 8 + 8 * values.nbytes
    if form != FLOAT:
        table_bits = 8 * (_HEADER.size + encoding.table.nbytes)
        for place, symbols, number in encoding.streams():
            counts = np.bincount(symbols, minlength=number)
            table_bits += 8 * number
            fixed[place] = len(symbols) * (number - 1).bit_length()
            coded[place] = -(-huffman_bits(counts) // 8) * 8
            bound += len(symbols) * entropy(counts)
    return WeightSize(
        layer=layer,
        weight=key,
        weights=values.size,
        zeros=int((values == 0).sum()),
        table=len(encoding.table),
        form=form,
        float_bits=8 * values.nbytes,
        table_bits=table_bits,
        index_bits=fixed[0],
        position_bits=fixed[1],
        huffman_index_bits=coded[0],
        huffman_position_bits=coded[1],
        entropy_bits=bound,
    )


def _to_bytes(encoding: _Encoding) -> bytes:
    if encoding.form == FLOAT:
        return bytes([0]) + np.ascontiguousarray(encoding.values).tobytes()
    tables, streams, sizes = [], [], [0, 0]
    for place, symbols, number in encoding.streams():
        lengths = huffman_lengths(np.bincount(symbols, minlength=number))
        streams.append(encode_huffman(symbols, lengths))
        tables.append(lengths.tobytes())
        sizes[place] = len(streams[-1])
    form = _FORMS.index(encoding.form)
    number = max(len(encoding.symbols), len(encoding.gaps))
    header = _HEADER.pack(form, encoding.gap_bits, len(encoding.table), number, *sizes)
    return b"".join([header, encoding.table.tobytes(), *tables, *streams])


def _from_bytes(
    content: bytes, place: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[Array, int]:
    def read(kind: Any, number: int) -> Array:
        nonlocal place
        array = np.frombuffer(content, kind, number, place)
        place += array.nbytes
        return array

    form = _FORMS[content[place]]
    if form == FLOAT:
        place += 1
        return read(dtype, int(np.prod(shape))).reshape(shape), place
    _, bits, entries, number, *sizes = _HEADER.unpack_from(content, place)
    place += _HEADER.size
    table = read(np.float32, entries)
    placed, spread = form in (DENSE, SPARSE), form in (SPARSE, SPARSE_FLOAT)
    codes = [read(np.uint8, entries) if placed else None]
    codes.append(read(np.uint8, 2**bits) if spread else None)
    entered, gaps = (
        None if code is None else decode_huffman(read(np.uint8, size).tobytes(), code, number)
        for code, size in zip(codes, sizes, strict=True)
    )
    values = np.zeros(int(np.prod(shape)), np.float32)
    kept = table if entered is None else table[entered]
    if gaps is not None:
        values[np.cumsum(gaps + 1) - 1] = kept
    else:
        values[:] = kept
    return values.reshape(shape), place
