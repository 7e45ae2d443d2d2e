"""The table of covered layers in the guide says what the code does, for every row."""

import re
from pathlib import Path

import keras
import pytest
from keras import layers

from tests.quantization.networks import conv, network
from tests.quantization.test_placement import COMPOSED
from tfaccel.quantization import plan

GUIDE = Path(__file__).parents[2] / "docs" / "quantization.md"


def sequence(x):
    return layers.Reshape((8, 24))(x)


def on_sequences(layer):
    return lambda x: layer(sequence(x))


def table():
    text = GUIDE.read_text(encoding="utf-8").partition("<!-- coverage -->")[2]
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \|", text.partition("<!-- end -->")[0], re.MULTILINE)
    assert len(rows) > 50
    assert len({name for name, _ in rows}) == len(rows)
    return dict(rows)


def activation(name):
    return lambda x: layers.Activation(name)(conv(x))


def merged(layer):
    return lambda x: layer([conv(x, padding="same"), conv(x, size=1)])


# A network in which the layer stands among others that are covered.
SAMPLES = {
    "Conv1D": on_sequences(layers.Conv1D(4, 3)),
    "Conv2D": layers.Conv2D(6, 3, groups=3),
    "DepthwiseConv1D": on_sequences(layers.DepthwiseConv1D(3)),
    "DepthwiseConv2D": layers.DepthwiseConv2D(3),
    "Conv1DTranspose": on_sequences(layers.Conv1DTranspose(4, 3)),
    "Conv2DTranspose": layers.Conv2DTranspose(4, 3),
    "Conv3D": lambda x: layers.Conv3D(2, 3)(layers.Reshape((8, 8, 3, 1))(x)),
    "SeparableConv1D": on_sequences(layers.SeparableConv1D(4, 3)),
    "SeparableConv2D": layers.SeparableConv2D(4, 3),
    "Dense": lambda x: layers.Dense(4)(layers.Flatten()(x)),
    "EinsumDense": on_sequences(layers.EinsumDense("abc,cd->abd", output_shape=(None, 5))),
    "Embedding": lambda x: layers.Embedding(9, 4)(keras.ops.cast(sequence(x), "int32")),
    "BatchNormalization": lambda x: layers.BatchNormalization()(layers.MaxPooling2D()(x)),
    "LayerNormalization": on_sequences(layers.LayerNormalization()),
    "GroupNormalization": lambda x: layers.GroupNormalization(2)(conv(x)),
    "UnitNormalization": layers.UnitNormalization(),
    "ReLU": layers.ReLU(6.0),
    "LeakyReLU": layers.LeakyReLU(),
    "PReLU": layers.PReLU(),
    "ELU": layers.ELU(),
    "Softmax": layers.Softmax(),
    "Add": merged(layers.Add()),
    "Subtract": merged(layers.Subtract()),
    "Multiply": merged(layers.Multiply()),
    "Maximum": merged(layers.Maximum()),
    "Concatenate": merged(layers.Concatenate()),
    "AveragePooling1D": on_sequences(layers.AveragePooling1D(2)),
    "AveragePooling2D": layers.AveragePooling2D(2),
    "MaxPooling1D": on_sequences(layers.MaxPooling1D()),
    "MaxPooling2D": layers.MaxPooling2D(),
    "GlobalAveragePooling1D": on_sequences(layers.GlobalAveragePooling1D()),
    "GlobalAveragePooling2D": layers.GlobalAveragePooling2D(),
    "GlobalMaxPooling1D": on_sequences(layers.GlobalMaxPooling1D()),
    "GlobalMaxPooling2D": layers.GlobalMaxPooling2D(),
    "Flatten": layers.Flatten(),
    "Reshape": layers.Reshape((4, 4, 12)),
    "Permute": layers.Permute((2, 1, 3)),
    "ZeroPadding1D": on_sequences(layers.ZeroPadding1D()),
    "ZeroPadding2D": layers.ZeroPadding2D(),
    "Cropping1D": on_sequences(layers.Cropping1D()),
    "Cropping2D": layers.Cropping2D(),
    "UpSampling2D": layers.UpSampling2D(),
    "Rescaling": layers.Rescaling(0.5, 1.0),
    "Dropout": layers.Dropout(0.1),
    "channel shuffle": COMPOSED["shuffled"],
    "squeeze and excitation": COMPOSED["squeeze_and_excite"],
    "MultiHeadAttention": lambda x: layers.MultiHeadAttention(2, 4)(sequence(x), sequence(x)),
    "LSTM": on_sequences(layers.LSTM(3)),
    "GRU": on_sequences(layers.GRU(3)),
    "Bidirectional": on_sequences(layers.Bidirectional(layers.LSTM(3))),
    "SimpleRNN": on_sequences(layers.SimpleRNN(3)),
    **{
        name: activation(name)
        for name in (
            "gelu",
            "hard_sigmoid",
            "hard_swish",
            "relu6",
            "sigmoid",
            "softplus",
            "swish",
            "tanh",
        )
    },
}


@pytest.mark.parametrize(("name", "form"), table().items(), ids=table())
def test_row_of_the_table_says_what_becomes_of_the_layer(name, form):
    model = network(lambda x: layers.Reshape((-1,))(SAMPLES[name](conv(x, 3, 1))))
    floats = [d for d in plan(model) if d.action == "float"]
    assert form == ("float" if floats else "integers")
    if floats:
        kind = name if name[0].isupper() else f"activation {name}"
        assert any(kind in d.reason for d in floats), floats


def test_every_layer_with_weights_and_every_merge_is_in_the_table():
    missing = set(SAMPLES) ^ set(table())
    assert not missing
