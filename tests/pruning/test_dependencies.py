"""Which channels go together, on cases that were worked out by hand."""

import keras
import numpy as np
import pytest
from keras import layers

from tfaccel import architectures, pruning
from tfaccel.pruning.dependencies import read_channels


def groups_of(model):
    return sorted((group.names, group.size) for group in read_channels(model).groups)


def image(channels=3):
    return keras.Input((8, 8, channels))


def head(x):
    return layers.Dense(4, name="head")(layers.GlobalAveragePooling2D()(x))


def conv(filters, name, **options):
    return layers.Conv2D(filters, 3, padding="same", name=name, **options)


def test_residual_sums_unite_their_operands():
    inputs = image()
    x = conv(8, "a")(inputs)
    y = conv(8, "c")(layers.BatchNormalization()(conv(6, "b")(x)))
    model = keras.Model(inputs, head(layers.Add()([x, y])))
    assert groups_of(model) == [(("a", "c"), 8), (("b",), 6)]


def test_concatenated_channels_stay_apart():
    inputs = image()
    x = layers.Concatenate()([conv(5, "a")(inputs), conv(7, "b")(inputs)])
    assert groups_of(keras.Model(inputs, head(x))) == [(("a",), 5), (("b",), 7)]


def test_depthwise_and_gates_go_with_what_they_scale():
    inputs = image()
    x = layers.DepthwiseConv2D(3, padding="same")(conv(8, "a")(inputs))
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(8, 1, activation="sigmoid", name="excite")(
        layers.Conv2D(4, 1, activation="relu", name="squeeze")(gate)
    )
    model = keras.Model(inputs, head(layers.Multiply()([x, gate])))
    assert groups_of(model) == [(("a", "excite"), 8), (("squeeze",), 4)]


def test_groups_of_a_convolution_keep_as_many():
    inputs = image()
    x = conv(6, "after", groups=3)(conv(12, "before")(inputs))
    # 12 channels in 3 groups: 4 can go from each at once; the 6 made, 2.
    assert groups_of(keras.Model(inputs, head(x))) == [(("after",), 2), (("before",), 4)]


def test_halves_that_are_shuffled_together_are_united():
    inputs = image()
    a, b = conv(4, "a")(inputs), conv(4, "b")(inputs)
    x = layers.Concatenate()([a, b])
    x = architectures.channel_shuffle(x, 2, name="shuffle")
    assert groups_of(keras.Model(inputs, head(x))) == [(("a", "b"), 4)]


def test_heads_and_units():
    inputs = keras.Input((5, 6))
    x = layers.LSTM(7, return_sequences=True, name="lstm")(inputs)
    y = layers.MultiHeadAttention(4, 3, name="attention")(x, x)
    model = keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x + y)))
    assert groups_of(model) == [(("attention",), 4), (("lstm", "attention"), 7)]


def test_flattened_channels_take_all_their_rows_along():
    inputs = image(2)
    x = layers.Flatten()(conv(4, "a")(inputs))
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    (group,) = read_channels(model).groups
    smaller = pruning.shrink(model, read_channels(model), read_channels(model).groups[0].units[:1])
    assert group.size == 4
    assert [w.shape for w in smaller.weights] == [(3, 3, 2, 3), (3,), (8 * 8 * 3, 3), (3,)]


@pytest.mark.parametrize(
    ("what", "layer"),
    [
        ("LayerNormalization", layers.LayerNormalization()),
        ("Softmax", layers.Softmax()),
        ("softmax", layers.Activation("softmax")),
        ("GroupNormalization", layers.GroupNormalization(2)),
        ("TimeDistributed", layers.TimeDistributed(layers.Dense(3))),
    ],
)
def test_what_cannot_go_is_named_with_its_reason(what, layer):
    inputs = image()
    model = keras.Model(inputs, head(layer(conv(4, "a")(inputs))))
    found = read_channels(model)
    assert found.groups == ()
    assert what in found.reasons["a"]
    assert "an output of" in found.reasons["head"]
    with pytest.raises(ValueError, match="found no channels to remove"):
        pruning.prune_channels(model, 0.5)


def test_every_layer_that_makes_channels_is_in_a_group_or_has_a_reason():
    for model in (
        architectures.MobileNetV3Small((32, 32, 3), 5),
        architectures.ShuffleNetV2((32, 32, 3), 5),
        architectures.GoogLeNet((64, 64, 3), 5, auxiliary=True),
    ):
        found = read_channels(model)
        named = {name for group in found.groups for name in group.names} | set(found.reasons)
        kinds = (layers.Dense, layers.Conv2D)
        makers = {layer.name for layer in model.layers if isinstance(layer, kinds)}
        depthwise = {
            layer.name for layer in model.layers if isinstance(layer, layers.DepthwiseConv2D)
        }
        assert makers - depthwise <= named


def test_mobilenet_v2_has_its_known_groups():
    # Sandler 2018, table 2: 7 stages share their width over their residual blocks; beside them the
    # stem, the 16 expansions and the last convolution can lose channels.
    found = read_channels(architectures.MobileNetV2((32, 32, 3), 5))
    sizes = sorted(group.size for group in found.groups)
    stages = [16, 24, 32, 64, 96, 160, 320]
    repeats = [1, 2, 3, 4, 3, 3, 1]
    inputs = [32, *stages[:-1]]
    expansions = [
        6 * (inputs[stage] if number == 0 else stages[stage])
        for stage in range(1, 7)
        for number in range(repeats[stage])
    ]
    assert sizes == sorted([32, *stages, *expansions, 1280])


def test_masked_models_are_refused():
    inputs = image()
    model = keras.Model(inputs, head(conv(8, "a")(conv(8, "b")(inputs))))
    with pytest.raises(ValueError, match="transformed weights"):
        read_channels(pruning.prune(model, 0.5))


def test_removing_all_of_a_group_is_refused():
    inputs = image()
    model = keras.Model(inputs, head(conv(4, "a")(inputs)))
    found = read_channels(model)
    with pytest.raises(ValueError, match="Keep at least one"):
        pruning.shrink(model, found, found.groups[0].units)
    with pytest.raises(ValueError, match="of no group"):
        pruning.shrink(model, found, np.array([0]))
