"""Which axis of a kernel is summed over, in every kind of layer."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

from tfaccel.core.transforms import weight_keys
from tfaccel.pruning.layouts import Layout, layout_of

CASES = [
    (layers.Dense(5), (None, 8), "kernel", (1, 8, 5)),
    (layers.Conv1D(5, 3), (None, 9, 8), "kernel", (3, 8, 5)),
    (layers.Conv2D(6, (3, 2), groups=2), (None, 9, 9, 8), "kernel", (6, 4, 6)),
    (layers.Conv2DTranspose(5, 3), (None, 9, 9, 8), "kernel", (9, 8, 5)),
    (layers.DepthwiseConv2D(3, depth_multiplier=2), (None, 9, 9, 4), "kernel", (1, 9, 8)),
    (layers.SeparableConv2D(5, 3), (None, 9, 9, 4), "depthwise_kernel", (1, 9, 4)),
    (layers.SeparableConv2D(5, 3), (None, 9, 9, 4), "pointwise_kernel", (1, 4, 5)),
    (layers.Embedding(7, 3), (None, 4), "embeddings", (1, 7, 3)),
    (layers.LSTM(5), (None, 4, 3), "lstm_cell/recurrent_kernel", (1, 5, 20)),
    (layers.EinsumDense("abc,cd->abd", 6), (None, 4, 3), "kernel", (1, 3, 6)),
]


@pytest.mark.parametrize(("layer", "shape", "key", "stacked"), CASES, ids=lambda c: str(c)[:24])
def test_inputs_and_outputs(layer, shape, key, stacked):
    if isinstance(layer, layers.EinsumDense):
        layer = layers.EinsumDense("abc,cd->abd", (None, 6))
    layer.build(shape)
    layout = layout_of(layer, key)
    kernel = keras.ops.convert_to_numpy(weight_keys(layer)[key])
    assert layout.stacked(kernel).shape == stacked
    np.testing.assert_array_equal(layout.unstacked(layout.stacked(kernel)), kernel)


def test_attention_sums_over_features_in_and_over_heads_out():
    attention = layers.MultiHeadAttention(2, 3, value_dim=4)
    attention.build((None, 5, 8), (None, 5, 8))
    shapes = {
        key: layout_of(attention, key).stacked(keras.ops.convert_to_numpy(v)).shape
        for key, v in weight_keys(attention).items()
        if key.endswith("kernel")
    }
    assert shapes["query/kernel"] == (1, 8, 6)
    assert shapes["value/kernel"] == (1, 8, 8)
    assert shapes["attention_output/kernel"] == (1, 8, 8)


@pytest.mark.parametrize("key", ["query/kernel", "attention_output/kernel"])
def test_a_zeroed_output_of_the_layout_silences_an_output_of_the_product(key):
    # The product itself says which axis is which: without an output's weights it gives zero.
    attention = layers.MultiHeadAttention(2, 3, use_bias=False)
    attention.build((None, 5, 8), (None, 5, 8))
    layout, variable = layout_of(attention, key), weight_keys(attention)[key]
    part = attention.query_dense if key.startswith("query") else attention.output_dense
    stacked = layout.stacked(keras.ops.convert_to_numpy(variable)).copy()
    stacked[:, :, 1] = 0
    variable.assign(layout.unstacked(stacked))
    x = np.random.default_rng(0).normal(
        size=(2, 5, *part.kernel.shape[: -1 if key[0] == "a" else 1])
    )
    out = keras.ops.convert_to_numpy(part(x.astype("float32"))).reshape(10, -1)
    assert (out[:, 1] == 0).all()
    assert (np.delete(out, 1, axis=1) != 0).any(axis=0).all()


@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    roles=st.lists(st.sampled_from("pio"), min_size=5, max_size=5),
)
def test_stacking_is_undone_for_any_roles(shape, roles):
    axes = {role: tuple(i for i in range(len(shape)) if roles[i] == role) for role in "pio"}
    layout = Layout(tuple(shape), axes["i"], axes["o"])
    values = np.arange(np.prod(shape)).reshape(shape)
    stacked = layout.stacked(values)
    assert stacked.shape[1] == np.prod([shape[i] for i in axes["i"]], dtype=int)
    np.testing.assert_array_equal(layout.unstacked(stacked), values)
