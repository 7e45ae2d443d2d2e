"""One message for all that a rank sends of its gradients: places, values, and dense tails.

Places are written as gaps in a Golomb-Rice code (Golomb 1966; Rice 1979): a gap's quotient by 2^r
in unary, its remainder in r bits. For places drawn at random this is within 0.04 bits of the
entropy: about 11.5 bits a place at 99.9 % sparsity.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfaccel.distributed.value_codes import decode_values, encode_values, values_size

Array = np.ndarray[Any, Any]
# Bytes of the message, number of places, bytes of their quotients, r.
_HEADER = struct.Struct("<IIIB")


@dataclass(frozen=True)
class SparseFormat:
    """How gradients that are one vector are written.

    Attributes:
        sizes: elements of each tensor of which chosen ones are sent, from the vector's beginning.
        value_bits: of each of these.
        dense_sizes: elements of each tensor that follows and is sent whole.
        dense_bits: of each of these.
    """

    sizes: tuple[int, ...]
    value_bits: int = 32
    dense_sizes: tuple[int, ...] = ()
    dense_bits: int = 32

    def encode(self, flat: Array, places: Array) -> tuple[Array, Array]:
        """Writes the values at some places, and the dense tensors.

        Args:
            flat: [elements] float32, all tensors one after another.
            places: [places], ascending, of the sparse tensors.

        Returns:
            The message, [bytes] uint8, and the values that its readers will see: those at
            `places`, then the dense ones.
        """
        counts = self._counts(places)
        values = encode_values(flat[places], counts, self.value_bits)
        dense = encode_values(flat[sum(self.sizes) :], self.dense_sizes, self.dense_bits)
        remainder_bits, quotients, remainders = encode_places(places)
        body = quotients.tobytes() + remainders.tobytes() + values + dense
        head = (_HEADER.size + len(body), len(places), len(quotients), remainder_bits)
        seen = [
            decode_values(values, counts, self.value_bits),
            decode_values(dense, self.dense_sizes, self.dense_bits),
        ]
        message = np.frombuffer(_HEADER.pack(*head) + body, np.uint8)
        return message, np.concatenate(seen)

    def decode_sum(self, messages: Array) -> tuple[Array, int]:
        """Reads messages that stand one after another and adds them up.

        They are added in their order, so that all ranks get the same sums to the last bit.

        Args:
            messages: [bytes] uint8.

        Returns:
            [elements] float32, and the number of messages.
        """
        total = np.zeros(sum(self.sizes) + sum(self.dense_sizes), np.float32)
        data = messages.tobytes()
        start = number = 0
        while start < len(data):
            length, count, quotient_bytes, remainder_bits = _HEADER.unpack_from(data, start)
            body = data[start + _HEADER.size : start + length]
            places, used = decode_places(body, count, quotient_bytes, remainder_bits)
            counts = self._counts(places)
            end = used + values_size(counts, self.value_bits)
            # Places of one message differ, so that none of the sums is lost.
            total[places] += decode_values(body[used:end], counts, self.value_bits)
            if self.dense_sizes:
                dense = decode_values(body[end:], self.dense_sizes, self.dense_bits)
                total[sum(self.sizes) :] += dense
            start += length
            number += 1
        return total, number

    def expected_bytes(self, density: float) -> float:
        """Returns the bytes of a message with this share of places, drawn at random."""
        count = sum(max(1, round(size * density)) for size in self.sizes)
        gap = max(1.0, sum(self.sizes) / max(count, 1))
        r = _remainder_bits(gap - 1)
        place_bits = r + 1 + gap / 2**r
        dense = values_size(self.dense_sizes, self.dense_bits)
        return _HEADER.size + count * (place_bits + self.value_bits + 0.25) / 8 + dense

    def _counts(self, places: Array) -> list[int]:
        ends = np.searchsorted(places, np.cumsum(self.sizes))
        return np.diff(ends, prepend=0).tolist()


def encode_places(places: Array) -> tuple[int, Array, Array]:
    """Writes ascending places as gaps.

    Args:
        places: [places] of integers from 0.

    Returns:
        r; the quotients' bits and the remainders' bits, each packed into uint8.
    """
    gaps = np.diff(places, prepend=-1).astype(np.int64) - 1
    r = _remainder_bits(float(gaps.mean()) if len(gaps) else 0.0)
    # A quotient is so many zeros and a one.
    ones = np.cumsum((gaps >> r) + 1) - 1
    quotients = np.zeros(int(ones[-1]) + 1 if len(ones) else 0, np.uint8)
    quotients[ones] = 1
    shifts = np.arange(r - 1, -1, -1)
    remainders = (gaps[:, np.newaxis] >> shifts).astype(np.uint8) & np.uint8(1)
    return r, np.packbits(quotients), np.packbits(remainders)


def decode_places(
    data: bytes, count: int, quotient_bytes: int, remainder_bits: int
) -> tuple[Array, int]:
    """Reads what `encode_places` wrote.

    Returns:
        [count] int64, and the bytes that were read.
    """
    remainder_bytes = -(-count * remainder_bits // 8)
    bits = np.unpackbits(np.frombuffer(data, np.uint8, quotient_bytes))
    quotients = np.diff(np.flatnonzero(bits), prepend=-1) - 1
    rest = np.unpackbits(np.frombuffer(data, np.uint8, remainder_bytes, quotient_bytes))
    table = rest[: count * remainder_bits].reshape(count, remainder_bits)
    remainders = np.zeros(count, np.int64)
    for column in table.T:
        remainders = 2 * remainders + column
    gaps = (quotients << remainder_bits) + remainders
    return np.cumsum(gaps + 1) - 1, quotient_bytes + remainder_bytes


def ring_bytes(elements: int, ranks: int) -> float:
    """Returns the bytes that a rank sends in a ring-allreduce of float32: 2(N - 1)/N times all."""
    return 8 * elements * (ranks - 1) / ranks


def gather_bytes(message_bytes: float, ranks: int) -> float:
    """Returns the bytes that a rank sends in a gather: its message, passed on N - 1 times."""
    return message_bytes * (ranks - 1)


def _remainder_bits(mean_gap: float) -> int:
    """The r of least bits for gaps of this mean, geometrically distributed."""
    return max(0, round(float(np.log2(max(mean_gap, 1.0) * np.log(2.0)))))


def split_counts(sizes: Sequence[int], ratio: float) -> list[int]:
    """Returns how many elements of each tensor are sent: its share, at least one of each."""
    return [min(size, max(1, round(size * ratio))) for size in sizes]
