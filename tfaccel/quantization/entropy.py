"""How few bits a sequence of symbols needs: its entropy, and a Huffman code that comes near it.

Codes are canonical (Huffman 1952; Schwartz & Kallick 1964): the lengths alone say what they are.
"""

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# A code of more bits needs more symbols than fit into a computer: its counts grow as Fibonacci's.
_LONGEST = 57
_CHUNK = 1 << 20
_TABLE_BITS = 16


def entropy(counts: Array) -> float:
    """Returns Shannon's bound on the bits per symbol, -sum p log2 p.

    Args:
        counts: [symbols], how often each occurs.

    >>> entropy(np.array([2, 1, 1]))
    1.5
    """
    total = np.sum(counts)
    shares = np.asarray(counts)[np.asarray(counts) > 0] / max(total, 1)
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def huffman_lengths(counts: Array) -> npt.NDArray[np.uint8]:
    """Returns how many bits each symbol has in an optimal prefix code (Huffman 1952).

    Args:
        counts: [symbols], how often each occurs.

    Returns:
        [symbols] uint8. Symbols that never occur have 0 bits; one that is alone has 1.

    >>> huffman_lengths(np.array([5, 2, 1, 1])).tolist()
    [1, 2, 3, 3]
    """
    lengths = np.zeros(len(counts), np.uint8)
    # The symbols below a node, a list in a list so that joining two copies nothing.
    heap: list[tuple[int, int, Any]] = [
        (int(count), symbol, symbol) for symbol, count in enumerate(counts) if count > 0
    ]
    heapq.heapify(heap)
    number = len(counts)
    while len(heap) > 1:
        one, other = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (one[0] + other[0], number, (one[2], other[2])))
        number += 1
    waiting = [(heap[0][2], int(isinstance(heap[0][2], int)))] if heap else []
    while waiting:
        node, depth = waiting.pop()
        if isinstance(node, tuple):
            waiting += [(node[0], depth + 1), (node[1], depth + 1)]
        else:
            lengths[node] = depth
    return lengths


def huffman_bits(counts: Array) -> int:
    """Returns the bits of a whole sequence in the Huffman code of its counts."""
    return int(np.dot(np.asarray(counts, np.int64), huffman_lengths(counts).astype(np.int64)))


def encode_huffman(symbols: Array, lengths: npt.NDArray[np.uint8]) -> bytes:
    """Returns the symbols in their canonical code, the last byte filled up with zeros.

    Args:
        symbols: [n] integers.
        lengths: bits of each symbol, from `huffman_lengths`.
    """
    order = _canonical_order(lengths)
    codes = np.zeros(len(lengths), np.uint64)
    codes[order] = _left_justified(lengths[order]) >> (
        np.uint64(64) - lengths[order].astype(np.uint64)
    )
    sizes = lengths[symbols].astype(np.int64)
    ends = np.cumsum(sizes)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for place in range(int(sizes.max(initial=0))):
        longer = sizes > place
        shift = (sizes[longer] - 1 - place).astype(np.uint64)
        bits[(ends - sizes)[longer] + place] = (codes[symbols[longer]] >> shift) & np.uint64(1)
    return np.packbits(bits).tobytes()


def decode_huffman(
    stream: bytes, lengths: npt.NDArray[np.uint8], number: int
) -> npt.NDArray[np.int64]:
    """Returns the symbols that `encode_huffman` wrote.

    Args:
        stream: what it returned.
        lengths: as given to it.
        number: how many symbols there are.

    Raises:
        ValueError: the stream ends too early.
    """
    order = _canonical_order(lengths)
    if not len(order):
        return np.zeros(0, np.int64)
    begins = _left_justified(lengths[order])
    sizes = lengths[order].astype(np.int64)

    def code_at(bits: Array) -> Array:
        return np.searchsorted(begins, bits, side="right") - 1

    table, shift = None, np.uint64(64 - _TABLE_BITS)
    if sizes[-1] <= _TABLE_BITS:
        table = code_at(np.arange(1 << _TABLE_BITS, dtype=np.uint64) << shift)
    padded = np.frombuffer(stream + bytes(8), np.uint8)
    ranks: list[int] = []
    position, end = 0, 8 * len(stream)
    while len(ranks) < number and position < end:
        # What would be read at every bit of a chunk; then from code to code.
        first = position // 8
        width = min(_CHUNK, len(stream) - first)
        windows = np.lib.stride_tricks.sliding_window_view(padded[first : first + width + 7], 8)
        words = np.ascontiguousarray(windows).view(">u8").astype(np.uint64)
        looked = (words << np.arange(8, dtype=np.uint64)).ravel()
        # The last bits of a shifted window are missing; no code is that long.
        found = code_at(looked) if table is None else table[looked >> shift]
        steps, names = sizes[found].tolist(), found.tolist()
        place, stop = position - 8 * first, 8 * width
        missing = number - len(ranks)
        here: list[int] = []
        while place < stop and len(here) < missing:
            here.append(names[place])
            place += steps[place]
        ranks += here
        position = 8 * first + place
    if len(ranks) < number or position > end:
        raise ValueError(
            f"A Huffman stream of {len(stream)} bytes ends after {len(ranks)} of {number} symbols. "
            "The file is cut off or damaged."
        )
    return order[np.array(ranks, np.int64)]


def _canonical_order(lengths: npt.NDArray[np.uint8]) -> Array:
    """Returns the symbols that have a code, shorter codes first, then smaller symbols."""
    if lengths.max(initial=0) > _LONGEST:
        raise ValueError(f"Huffman codes have at most {_LONGEST} bits. The file is damaged.")
    order = np.lexsort((np.arange(len(lengths)), lengths))
    return order[lengths[order] > 0]


def _left_justified(lengths: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Returns the canonical codes of ascending lengths, each beginning at the top of 64 bits."""
    units = [1 << (64 - int(length)) for length in lengths]
    return np.cumsum([0, *units], dtype=np.uint64)[: len(units)]
