import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tfaccel.distributed.sparse_messages import (
    SparseFormat,
    decode_places,
    encode_places,
    gather_bytes,
    ring_bytes,
)
from tfaccel.distributed.threshold_selection import places_above, select_largest, select_top
from tfaccel.distributed.value_codes import (
    decode_values,
    encode_values,
    pack,
    unpack,
    values_size,
)


@hypothesis.given(
    sizes=st.lists(st.integers(0, 700), max_size=5),
    dense_sizes=st.lists(st.integers(0, 300), max_size=3),
    value_bits=st.sampled_from([2, 4, 8, 32]),
    dense_bits=st.sampled_from([2, 4, 8, 32]),
    density=st.floats(0, 1),
    messages=st.integers(1, 4),
    seed=st.integers(0, 2**31 - 1),
)
def test_what_is_read_is_what_the_writer_says(
    sizes, dense_sizes, value_bits, dense_bits, density, messages, seed
):
    random = np.random.default_rng(seed)
    written = SparseFormat(tuple(sizes), value_bits, tuple(dense_sizes), dense_bits)
    wanted = np.zeros(sum(sizes) + sum(dense_sizes), np.float32)
    sent = []
    for _ in range(messages):
        flat = random.normal(size=len(wanted)).astype(np.float32)
        places = np.flatnonzero(random.random(sum(sizes)) < density)
        message, seen = written.encode(flat, places)
        sent.append(message)
        wanted[places] += seen[: len(places)]
        wanted[sum(sizes) :] += seen[len(places) :]
        for values, found, bits in (
            (flat[places], seen[: len(places)], value_bits),
            (flat[sum(sizes) :], seen[len(places) :], dense_bits),
        ):
            if bits == 32:
                np.testing.assert_array_equal(found, values)
            elif len(values):
                # Half a step between levels, of which there are 2^(bits-1) - 1 steps at most.
                span = np.ptp(np.abs(values))
                limit = span / (2 ** (bits - 1) - 1) / 2
                assert np.abs(found - values).max() <= limit * (1 + 1e-5) + 1e-6
                assert ((np.sign(found) == np.sign(values)) | (found == 0)).all()
    total, number = written.decode_sum(np.concatenate(sent))
    assert number == messages
    np.testing.assert_array_equal(total, wanted)


@hypothesis.given(places=st.sets(st.integers(0, 10**7), max_size=200))
def test_places_come_back(places):
    places = np.array(sorted(places), np.int64)
    r, quotients, remainders = encode_places(places)
    data = quotients.tobytes() + remainders.tobytes()
    found, used = decode_places(data + b"more", len(places), len(quotients), r)
    np.testing.assert_array_equal(found, places)
    assert used == len(data)


def test_a_code_by_hand():
    """Gaps of 5, 0 and 9 with r = 2: quotients 1, 0, 2 and remainders 01, 00, 01."""
    r, quotients, remainders = encode_places(np.array([5, 6, 16]))
    assert r == round(math.log2(14 / 3 * math.log(2))) == 2
    assert quotients.tolist() == [0b01100100]  # 01, 1, 001
    assert remainders.tolist() == [0b01000100]


@pytest.mark.parametrize("density", [0.25, 0.01, 0.001])
def test_places_take_hardly_more_than_their_entropy(density):
    size = 2_000_000
    places = np.flatnonzero(np.random.default_rng(0).random(size) < density)
    _, quotients, remainders = encode_places(places)
    bits = 8 * (len(quotients) + len(remainders)) / len(places)
    entropy = -math.log2(density) - (1 - density) / density * math.log2(
        1 - density
    )  # bits per place
    assert entropy <= bits * 1.01
    assert bits <= entropy + 0.1
    message, _ = SparseFormat((size,), 4).encode(np.ones(size, np.float32), places)
    wanted = SparseFormat((size,), 4).expected_bytes(density)
    assert abs(len(message) / wanted - 1) < 0.15


def test_a_thousandth_at_four_bits_is_two_thousand_times_less():
    """5 M values: 32 bits each, against 11.5 for a place, 4 for a value, 0.25 for its block."""
    size, count = 5_000_000, 5_000
    random = np.random.default_rng(1)
    places = np.sort(random.choice(size, count, replace=False))
    flat = random.normal(size=size).astype(np.float32)
    message, _ = SparseFormat((size,), 4).encode(flat, places)
    assert 4 * size / len(message) > 2000
    # At N ranks a gather sends N - 1 messages, the ring 2(N - 1)/N times everything.
    for ranks in (2, 4):
        ratio = ring_bytes(size, ranks) / gather_bytes(len(message), ranks)
        assert ratio == pytest.approx(4 * size * 2 / ranks / len(message))
        assert ratio > 1000


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing_by_hand(bits):
    codes = (np.arange(11) % 2**bits).astype(np.uint8)
    packed = pack(codes, bits)
    text = "".join(f"{code:0{bits}b}" for code in codes)
    text += "0" * (-len(text) % 8)
    assert packed.tolist() == [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]
    np.testing.assert_array_equal(unpack(packed, 11, bits), codes)


def test_values_of_a_block_by_hand():
    """Magnitudes 1 to 8 on 8 levels (4 bits) are exact; blocks end where tensors do."""
    values = np.array([1, -2, 3, -8, 100, -100.0], np.float32)
    data = encode_values(values, [4, 2], 4)
    assert len(data) == values_size([4, 2], 4) == 2 * 8 + 3
    np.testing.assert_array_equal(decode_values(data, [4, 2], 4), values)
    assert data[-3:] == bytes([0b0000_1001, 0b0010_1111, 0b0000_1000])
    long = np.linspace(1, 2, 600).astype(np.float32)
    assert values_size([600], 4) == len(encode_values(long, [600], 4)) == 3 * 8 + 300


def test_values_that_are_not_finite_stay_so():
    values = np.array([1, np.nan, 2, *[3.0] * 256, 4], np.float32)
    found = decode_values(encode_values(values, [260], 4), [260], 4)
    assert np.isnan(found[:256]).all()  # the whole block
    assert np.isfinite(found[256:]).all()
    infinite = encode_values(np.array([1, np.inf], np.float32), [2], 8)
    assert not np.isfinite(decode_values(infinite, [2], 8)).all()


@pytest.mark.parametrize("density", [0.25, 0.01, 0.001])
@pytest.mark.parametrize("tail", ["normal", "heavy", "sparse"])
def test_a_sample_finds_about_as_many_as_wanted(density, tail):
    random = np.random.default_rng(2)
    values = random.normal(size=300_000).astype(np.float32)
    if tail == "heavy":
        values *= random.gamma(0.3, size=values.size).astype(np.float32)
    elif tail == "sparse":
        values *= random.random(values.size) < 0.002
    count = int(density * len(values))
    for seed in range(5):
        found = select_largest(values, count, seed)
        wanted = min(count, np.count_nonzero(values))
        assert 0.7 * wanted <= len(found) <= 1.3 * count
        assert (np.diff(found) > 0).all()
        rest = np.delete(np.abs(values), found)
        assert np.abs(values[found]).min() >= rest.max()  # none larger is left


@hypothesis.given(
    size=st.integers(1, 400), count=st.integers(1, 400), seed=st.integers(0, 2**31 - 1)
)
def test_few_values_are_selected_exactly(size, count, seed):
    random = np.random.default_rng(seed)
    values = random.normal(size=size).astype(np.float32) * (random.random(size) < 0.8)
    wanted = np.sort(np.argsort(-np.abs(values), kind="stable")[:count])
    wanted = wanted[values[wanted] != 0]
    np.testing.assert_array_equal(select_top(values, count), wanted)
    if count <= 100:  # the sample is everything
        np.testing.assert_array_equal(select_largest(values, count, seed), wanted)


def test_places_above_are_all_and_zeros_never():
    values = np.zeros(200_000, np.float32)
    values[[0, 70_000, 199_999]] = [-2, 1, np.nan]
    assert places_above(values, 1.0).tolist() == [0, 70_000, 199_999]
    assert places_above(values, 1.5).tolist() == [0, 199_999]
    assert places_above(values, 0.0).tolist() == [0, 70_000, 199_999]
    assert select_largest(values[:-1], 100).tolist() == [0, 70_000]
    assert places_above(values[:0], 1.0).tolist() == []
