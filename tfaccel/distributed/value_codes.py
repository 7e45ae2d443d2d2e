"""Values in few bits: a sign and a level between the smallest and largest magnitude of a block."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfaccel.core.checks import check_in

Array = np.ndarray[Any, Any]
VALUE_BITS = (2, 4, 8, 32)
BLOCK = 256
_RAW_BITS = 32


def encode_values(values: Array, counts: Sequence[int], bits: int) -> bytes:
    """Writes values, in blocks that never reach from one tensor into the next.

    A block of up to 256 values holds its smallest and largest magnitude as float32 and for each
    value a sign and one of 2^(bits - 1) levels, evenly spaced from the one to the other. With 32
    bits the values are written as they are.

    Args:
        values: [values] float32.
        counts: how many of them belong to each tensor.
        bits: 2, 4, 8 or 32.
    """
    check_in("bits", bits, VALUE_BITS)
    values = np.ascontiguousarray(values, np.float32)
    if bits == _RAW_BITS or not len(values):
        return values.tobytes()
    starts, lengths = _blocks(counts)
    magnitudes = np.abs(values)
    low = np.minimum.reduceat(magnitudes, starts)
    high = np.maximum.reduceat(magnitudes, starts)
    # A gradient that is not finite stays so: its block's bounds are sent as they are.
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        step = (high - low) / _top(bits)
        levels = np.rint((magnitudes - np.repeat(low, lengths)) / np.repeat(step, lengths))
    levels = np.nan_to_num(levels, nan=0.0, posinf=0.0, neginf=0.0)
    codes = np.clip(levels, 0, _top(bits)).astype(np.uint8)
    codes |= np.signbit(values).astype(np.uint8) << np.uint8(bits - 1)
    return low.tobytes() + high.tobytes() + pack(codes, bits).tobytes()


def decode_values(data: bytes, counts: Sequence[int], bits: int) -> Array:
    """Reads what `encode_values` wrote.

    Returns:
        [values] float32.
    """
    count = sum(counts)
    if bits == _RAW_BITS or not count:
        return np.frombuffer(data, np.float32, count)
    starts, lengths = _blocks(counts)
    low = np.frombuffer(data, np.float32, len(starts))
    high = np.frombuffer(data, np.float32, len(starts), 4 * len(starts))
    codes = unpack(np.frombuffer(data, np.uint8, -1, 8 * len(starts)), count, bits)
    negative = codes >> np.uint8(bits - 1)
    levels = (codes & np.uint8(_top(bits))).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        step = (high - low) / np.float32(_top(bits))
        magnitudes = np.repeat(low, lengths) + levels * np.repeat(step, lengths)
    return np.where(negative, -magnitudes, magnitudes)


def values_size(counts: Sequence[int], bits: int) -> int:
    """Returns the bytes that `encode_values` writes."""
    count = sum(counts)
    if bits == _RAW_BITS or not count:
        return 4 * count
    return 8 * len(_blocks(counts)[0]) + packed_size(count, bits)


def pack(codes: Array, bits: int) -> Array:
    """Packs numbers of 1, 2, 4 or 8 bits, the first in the highest bits of a byte; uint8."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    padded = np.zeros(packed_size(len(codes), bits) * per_byte, np.uint8)
    padded[: len(codes)] = codes
    packed = np.zeros(len(padded) // per_byte, np.uint8)
    for place in range(per_byte):
        packed |= padded[place::per_byte] << np.uint8(8 - bits * (place + 1))
    return packed


def unpack(packed: Array, count: int, bits: int) -> Array:
    """Reads `count` numbers that `pack` wrote; [count] uint8."""
    if bits == 8:
        return packed[:count]
    per_byte = 8 // bits
    codes = np.empty(len(packed) * per_byte, np.uint8)
    for place in range(per_byte):
        part = packed >> np.uint8(8 - bits * (place + 1))
        codes[place::per_byte] = part & np.uint8(2**bits - 1)
    return codes[:count]


def packed_size(count: int, bits: int) -> int:
    """Returns the bytes that `count` numbers take."""
    return -(-count * bits // 8)


def _top(bits: int) -> int:
    """The highest level."""
    return int(2 ** (bits - 1) - 1)


def _blocks(counts: Sequence[int]) -> tuple[Array, Array]:
    """Where blocks start, and how long they are; empty tensors have none."""
    starts: list[int] = []
    begin = 0
    for count in counts:
        starts.extend(range(begin, begin + count, BLOCK))
        begin += count
    return np.array(starts), np.diff([*starts, begin])
