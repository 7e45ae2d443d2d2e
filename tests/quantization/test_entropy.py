"""Huffman codes against exhaustive search and Kraft; encoded models against what is read back."""

import heapq
import itertools
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import tfaccel
from tfaccel.quantization import compression
from tfaccel.quantization.compression import huffman_size, load_compressed, save_compressed
from tfaccel.quantization.entropy import (
    decode_huffman,
    encode_huffman,
    entropy,
    huffman_bits,
    huffman_lengths,
)

COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=40).map(np.array)


# Codes


def test_entropy_by_hand():
    assert entropy(np.array([1, 1, 1, 1])) == 2
    assert entropy(np.array([7, 0])) == 0
    assert entropy(np.array([3, 1])) == pytest.approx(2 - 0.75 * math.log2(3))


def test_lengths_of_huffmans_own_example():
    # Huffman 1952, table I: probabilities in hundredths and the lengths of an optimal code.
    counts = np.array([20, 18, 10, 10, 10, 6, 6, 4, 4, 4, 4, 3, 1])
    assert huffman_bits(counts) == 342  # 3.42 binary digits per message


def test_no_code_is_shorter():
    # All codes of five symbols that Kraft's inequality allows.
    counts = np.array([13, 5, 5, 2, 1])
    shortest = min(
        int(np.dot(counts, lengths))
        for lengths in itertools.product(range(1, 5), repeat=5)
        if sum(2.0**-length for length in lengths) <= 1
    )
    assert huffman_bits(counts) == shortest


@given(COUNTS)
def test_lengths_are_a_prefix_code_within_a_bit_of_the_entropy(counts):
    lengths = huffman_lengths(counts)
    used = counts > 0
    assert (lengths[~used] == 0).all()
    if used.sum() > 1:
        assert sum(2.0 ** -float(length) for length in lengths[used]) == 1
        mean = huffman_bits(counts) / counts.sum()
        assert entropy(counts) - 1e-9 <= mean < entropy(counts) + 1
    # The cost is the sum of all joined counts; one symbol alone has a bit.
    heap = [int(count) for count in counts[used]]
    heapq.heapify(heap)
    cost = heap[0] if len(heap) == 1 else 0
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        cost += joined
        heapq.heappush(heap, joined)
    assert huffman_bits(counts) == cost


@given(st.lists(st.integers(0, 30), min_size=1, max_size=300).map(np.array))
def test_streams_are_read_back_and_as_long_as_counted(symbols):
    counts = np.bincount(symbols, minlength=31)
    lengths = huffman_lengths(counts)
    stream = encode_huffman(symbols, lengths)
    assert len(stream) == -(-huffman_bits(counts) // 8)
    np.testing.assert_array_equal(decode_huffman(stream, lengths, len(symbols)), symbols)


def test_codes_longer_than_the_table_are_read_too():
    fibonacci = [1, 1]
    while len(fibonacci) < 22:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = huffman_lengths(np.array(fibonacci))
    assert lengths.max() == 21
    symbols = np.random.default_rng(0).integers(0, 22, 3000)
    stream = encode_huffman(symbols, lengths)
    np.testing.assert_array_equal(decode_huffman(stream, lengths, 3000), symbols)


def test_canonical_codes_are_the_textbooks():
    # Lengths 2, 1, 3, 3 for A to D: B = 0, A = 10, C = 110, D = 111.
    lengths = np.array([2, 1, 3, 3], np.uint8)
    stream = encode_huffman(np.array([0, 1, 2, 3]), lengths)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8))[:9]
    assert "".join(map(str, bits)) == "100110111"


def test_many_chunks(monkeypatch):
    monkeypatch.setattr("tfaccel.quantization.entropy._CHUNK", 5)
    symbols = np.random.default_rng(1).integers(0, 9, 500)
    lengths = huffman_lengths(np.bincount(symbols))
    stream = encode_huffman(symbols, lengths)
    np.testing.assert_array_equal(decode_huffman(stream, lengths, 500), symbols)
    with pytest.raises(ValueError, match=r"ends after \d+ of 500 symbols"):
        decode_huffman(stream[:-20], lengths, 500)


# Tensors


def dense_model(kernel):
    model = keras.Sequential(
        [keras.Input((kernel.shape[0],)), layers.Dense(kernel.shape[1], name="dense")]
    )
    model.layers[0].kernel.assign(kernel)
    return model


def kernel_of(values, shares, shape=(64, 50), seed=0):
    random = np.random.default_rng(seed)
    return random.choice(np.array(values, "float32"), shape, p=shares)


def test_sizes_of_a_dense_form_by_hand():
    # Counts 2:1:1 exactly, so that Huffman's 1, 2, 2 bits are the entropy as well.
    kernel = np.tile(np.array([[0.5, -1.0], [0.5, 2.0]], "float32"), (16, 16))
    record = huffman_size(dense_model(kernel)).weights[0]
    assert (record.layer, record.weight, record.form) == ("dense", "kernel", "dense")
    assert (record.weights, record.zeros, record.table) == (1024, 0, 3)
    assert record.float_bits == 32 * 1024
    assert record.index_bits == 2 * 1024
    assert record.huffman_index_bits == record.entropy_bits == 1.5 * 1024
    assert record.table_bits == 3 * (32 + 8) + 8 * 16  # values, lengths of codes, header
    assert record.position_bits == record.huffman_position_bits == 0


def test_a_sparse_form_by_hand():
    # Non-zeros at 3 and 40: gaps of 3 and 36 zeros; in 4 bits, two fillers of 15 and themselves
    # leave 4 zeros.
    flat = np.zeros(64, "float32")
    flat[[3, 40]] = 1.5, -2.5
    form = compression._sparse(flat, 4)
    assert form.gaps.tolist() == [3, 15, 15, 4]
    assert form.table[form.symbols].tolist() == [1.5, 0, 0, -2.5]
    eight = compression._sparse(flat, 8)
    assert eight.gaps.tolist() == [3, 36]
    assert sorted(eight.table.tolist()) == [-2.5, 1.5]


@settings(max_examples=30)
@given(
    size=st.integers(1, 400),
    zeros=st.floats(0, 1),
    values=st.integers(1, 9),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_form_is_written_in_its_counted_bytes_and_read_back(size, zeros, values, seed):
    random = np.random.default_rng(seed)
    flat = random.choice(random.normal(size=values).astype("float32"), size)
    flat[random.random(size) < zeros] = 0
    table, symbols = np.unique(flat, return_inverse=True)
    forms = [
        compression._best(flat),
        compression._Encoding(flat, "dense", table, symbols, symbols[:0]),
        *(compression._sparse(flat, bits) for bits in (4, 5, 8)),
        *(compression._sparse(flat, bits, "sparse float") for bits in (4, 5, 8)),
    ]
    smallest = min(compression._size(form, "", "").huffman_bits for form in forms)
    assert compression._size(forms[0], "", "").huffman_bits == smallest
    for form in forms:
        content = compression._to_bytes(form)
        assert 8 * len(content) == compression._size(form, "", "").huffman_bits
        again, end = compression._from_bytes(content, 0, flat.shape, flat.dtype)
        np.testing.assert_array_equal(again, flat)
        assert end == len(content)


def test_very_sparse_kernels_are_stored_by_their_non_zeros():
    sparse = kernel_of([0, 1, -1, 2], [0.95, 0.02, 0.02, 0.01])
    record = huffman_size(dense_model(sparse)).weights[0]
    assert record.form == "sparse"
    assert record.huffman_bits < 3200  # a dense form has a bit for each weight at least
    assert record.entropy_bits <= record.huffman_index_bits + record.huffman_position_bits


def test_pruned_kernels_that_are_not_clustered_keep_their_non_zeros_as_floats():
    kernel = np.random.default_rng(0).normal(size=(80, 80)).astype("float32")
    kernel[np.random.default_rng(1).random((80, 80)) < 0.9] = 0
    record = huffman_size(dense_model(kernel)).weights[0]
    assert (record.form, record.index_bits) == ("sparse float", 0)
    assert record.table >= 6400 - record.zeros
    assert 32 * record.table < record.huffman_bits < 38 * record.table


def test_what_has_many_values_stays_float():
    kernel = np.random.default_rng(0).normal(size=(20, 8)).astype("float32")
    record = huffman_size(dense_model(kernel)).weights[0]
    assert record.form == "float"
    assert record.huffman_bits == record.float_bits + 8


# Models


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(8, 3, use_bias=False)(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.Conv2D(16, 3, activation="relu", name="wide")(x)
    outputs = layers.Dense(4, name="head")(layers.Flatten()(x))
    model = keras.Model(inputs, outputs)
    for name in ("wide", "head"):
        kernel = model.get_layer(name).kernel
        kernel.assign(kernel_of([0, -0.5, 0.25, 1], [0.8, 0.1, 0.06, 0.04], kernel.shape))
    return model


def test_a_model_is_read_back_to_the_last_bit_from_as_many_bytes(tmp_path):
    model = network()
    size = huffman_size(model)
    path = save_compressed(model, tmp_path / "network.bin")
    loaded = load_compressed(path)
    for old, new in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    x = np.ones((2, 8, 8, 1), "float32")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    content = path.read_bytes()
    start = len(compression._MAGIC)
    architecture = int.from_bytes(content[start : start + 4], "little")
    assert size.huffman_bytes == len(content) - start - 4 - architecture
    assert size.float_bytes == 4 * model.count_params()
    assert size.ratio == size.float_bytes / size.huffman_bytes
    assert size.huffman_bytes < size.fixed_bytes < size.float_bytes


def test_layers_of_tfaccel_are_found_again(tmp_path):
    model = keras.Sequential([keras.Input((5, 3)), tfaccel.architectures.SRU(4)])
    loaded = load_compressed(save_compressed(model, tmp_path / "model.bin"))
    x = np.ones((2, 5, 3), "float32")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_damaged_files_are_refused(tmp_path):
    path = save_compressed(network(), tmp_path / "network.bin")
    content = path.read_bytes()
    for wrong in (content[:-10], content[:40], content + b"0", b"PK" + content):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="no whole file of save_compressed"):
            load_compressed(path)
    with pytest.raises(FileNotFoundError):
        load_compressed(tmp_path / "other.bin")
    with pytest.raises(TypeError, match="huffman_size"):
        huffman_size("model.keras")


def test_statistics_of_the_data_are_stored_and_a_vocabulary_is_refused(tmp_path):
    """`Normalization` has a weight of no dimensions, and constants that come of its weights."""
    norm = layers.Normalization(name="norm")
    x = np.random.default_rng(0).normal(3.0, 5.0, (64, 4)).astype("float32")
    norm.adapt(x)
    model = keras.Sequential([keras.Input((4,)), norm, layers.Dense(2)])
    assert huffman_size(model).float_bytes == sum(np.asarray(w).nbytes for w in model.weights)
    loaded = load_compressed(save_compressed(model, tmp_path / "m.bin"))
    np.testing.assert_array_equal(loaded(x), model(x))

    inputs = keras.Input((1,), dtype="int64")
    known = layers.IntegerLookup(vocabulary=[3, 5, 7], name="words")(inputs)
    words = keras.Model(inputs, layers.Dense(2)(layers.Embedding(5, 3)(known)))
    with pytest.raises(ValueError, match=r"save_compressed\(\) stores weights.*'words'"):
        save_compressed(words, tmp_path / "words.bin")
