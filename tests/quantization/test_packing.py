"""Packed files: bytes counted by hand, and nothing lost."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

import tfaccel
from tests.comparing import assert_same_outputs
from tfaccel.quantization import quantize_aware
from tfaccel.quantization.low_bit import low_bit
from tfaccel.quantization.low_bit_weights import TernaryWeights, XNORNet
from tfaccel.quantization.packing import load_packed, pack_codes, save_packed, unpack_codes


def network():
    """Kernels of 3x3x2x4 and 16x5 between the first and the last layer."""
    keras.utils.set_random_seed(4)
    return keras.Sequential(
        [
            keras.Input((5, 5, 1)),
            layers.Conv2D(2, 2, name="stem"),  # 8 + 2 weights
            layers.Conv2D(4, 3, name="conv"),  # 72 + 4
            layers.Flatten(),
            layers.Dense(5, name="hidden"),  # 80 + 5
            layers.Dense(3, name="head"),  # 15 + 3
        ],
        name="small",
    )


def images():
    return np.random.default_rng(0).normal(size=(7, 5, 5, 1)).astype("float32")


def touched(model):
    """Moves every trained weight, as training would, scales of TTQ too."""
    random = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign_add(random.normal(scale=0.1, size=variable.shape).astype("float32"))
    return model


@given(st.lists(st.sampled_from([-1, 1]), max_size=70))
def test_one_bit_codes_come_back(codes):
    packed = pack_codes(np.array(codes, np.int8), 1)
    assert len(packed) == -(-len(codes) // 8)
    assert unpack_codes(packed, len(codes), 1).tolist() == codes


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=70))
def test_two_bit_codes_come_back(codes):
    packed = pack_codes(np.array(codes, np.int8), 2)
    assert len(packed) == -(-len(codes) // 4)
    assert unpack_codes(packed, len(codes), 2).tolist() == codes


@pytest.mark.parametrize(
    ("how", "codes", "scales", "other"),
    [
        # 72 and 80 weights; other: stem 10, biases 4 + 5, head 18 numbers of 4 bytes
        ("binary_connect", 9 + 10, 2 * 4, 37 * 4),
        (XNORNet(binary_inputs=False), 9 + 10, (4 + 5) * 4, 37 * 4),
        ("twn", 18 + 20, (4 + 5) * 4, 37 * 4),
        (TernaryWeights(granularity="layer"), 18 + 20, 2 * 4, 37 * 4),
        ("ttq", 18 + 20, 2 * 2 * 4, 37 * 4),
        # two batch norms of 4 vectors, over 2 and 16 channels
        ("xnor", 9 + 10, (4 + 5) * 4, (37 + 4 * (2 + 16)) * 4),
    ],
    ids=str,
)
def test_size_is_the_sum_that_a_hand_counts_and_outputs_are_strips(
    how, codes, scales, other, tmp_path
):
    model = touched(low_bit(network(), how, seed=0))
    size = save_packed(model, tmp_path / "small.packed")
    assert (size.code_bytes, size.scale_bytes, size.other_bytes) == (codes, scales, other)
    assert size.size_bytes == size.header_bytes + codes + scales + other
    assert size.path.stat().st_size == size.size_bytes
    assert size.float_bytes == (72 + 80) * 4 + other
    loaded, plain = load_packed(size.path), tfaccel.strip(model)
    assert_same_outputs(loaded, plain, images())
    assert_same_outputs(loaded, model, images())
    for ours, theirs in zip(loaded.weights, plain.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert type(loaded) is type(plain)


def test_input_scale_and_mixed_precision_come_back(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = network()
    finally:
        keras.config.set_dtype_policy("float32")
    model = touched(low_bit(model, XNORNet(input_scale=True)))
    save_packed(model, tmp_path / "scaled.packed")
    assert_same_outputs(load_packed(tmp_path / "scaled.packed"), model, images())


def test_adapted_statistics_come_back(tmp_path):
    norm = layers.Normalization(axis=-1)
    norm.adapt(images() * 3 + 1)
    inner = network()
    model = keras.Sequential([keras.Input((5, 5, 1)), norm, *inner.layers])
    model = low_bit(model, "twn", include="hidden")
    save_packed(model, tmp_path / "adapted.packed")
    assert_same_outputs(load_packed(tmp_path / "adapted.packed"), model, images())


def test_scales_of_trained_ternary_may_change_sign(tmp_path):
    model = low_bit(network(), "ttq", include="hidden")
    (layer,) = tfaccel.core.transformed_layers(model)
    layer.transforms[0][1].state["positive"].assign(-0.25)
    save_packed(model, tmp_path / "odd.packed")
    assert_same_outputs(load_packed(tmp_path / "odd.packed"), model, images())


def test_a_model_without_low_bit_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Give what low_bit"):
        save_packed(network(), tmp_path / "a.packed")
    with pytest.raises(ValueError, match="rounded once more"):
        save_packed(quantize_aware(low_bit(network(), "twn")), tmp_path / "a.packed")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused(tmp_path):
    file = save_packed(low_bit(network(), "twn"), tmp_path / "a.packed").path
    content = file.read_bytes()
    for broken, words in (
        (content[:-1], f"should have {len(content)} bytes"),
        (content + b"x", f"but has {len(content) + 1}"),
        (content[:40], "is damaged"),
        (content[:9], "is damaged"),
        (b"PK" + content, "is no packed model"),
    ):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=words):
            load_packed(file)
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / "none.packed")
