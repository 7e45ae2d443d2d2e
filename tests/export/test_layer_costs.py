"""Layers are timed one by one, and the times are costs that bits can be chosen by."""

import keras
import pytest
from keras import layers

from tests.quantization.networks import images, network
from tfaccel.export import layer_latencies
from tfaccel.quantization import allocate_bits


def body(x):
    x = layers.Conv2D(4, 1, use_bias=False, name="small")(x)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    x = layers.UpSampling2D(8, name="larger")(x)
    x = layers.Conv2D(64, 3, padding="same", activation="relu", name="large")(x)
    return layers.Dense(2, name="logits")(layers.GlobalAveragePooling2D(name="mean")(x))


def test_a_layer_with_thousands_of_times_the_work_takes_longer():
    model = network(body)
    cost = layer_latencies(model, choices=(8,), exclude="logits", runs=10)
    small, large = (cost(model.get_layer(name), 8) for name in ("small", "large"))
    assert 0 < 5 * small < large
    found = allocate_bits(
        model,
        images(4),
        {"cost": 1.01 * (small + large)},
        choices=(8,),
        cost=cost,
        exclude="logits",
    )
    assert found.cost == pytest.approx(small + large)
    with pytest.raises(ValueError, match="'small' was not timed in 4 bits"):
        cost(model.get_layer("small"), 4)


def test_nonsense_is_refused():
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, layers.Conv1D(2, 3, name="conv")(inputs))
    with pytest.raises(ValueError, match=r"'conv' has the shape .* only a fixed size"):
        layer_latencies(model)
    with pytest.raises(ValueError, match="choices must be one of"):
        layer_latencies(model, choices=(16,))
