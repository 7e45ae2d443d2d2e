"""Hashes of models and data: what they notice, and what they do not."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfaccel.distillation.fingerprints import hash_data, hash_model, sample_places


def net(seed=0, activation="relu", name=None):
    keras.utils.set_random_seed(seed)
    hidden = keras.layers.Dense(4, activation=activation)
    return keras.Sequential([keras.Input((3,)), hidden, keras.layers.Dense(2)], name=name)


def test_a_model_is_its_weights_and_activations_not_its_names(tmp_path):
    model = net()
    assert hash_model(net(name="other")) == hash_model(model)
    model.save(tmp_path / "net.keras")
    assert hash_model(keras.saving.load_model(tmp_path / "net.keras")) == hash_model(model)
    assert hash_model(net(activation="tanh")) != hash_model(model)
    before = hash_model(model)
    model.layers[0].bias.assign([1e-7, 0, 0, 0])
    assert hash_model(model) != before


def test_models_in_bfloat16_are_hashed_too():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype="bfloat16")])
    assert hash_model(model) == hash_model(model)
    assert hash_model(model) != hash_model(net())


@pytest.mark.parametrize("place", [0, 49, 99])
def test_data_is_its_samples_shape_and_type(place):
    x = np.zeros((100, 2), "float32")
    other = x.copy()
    other[sample_places(100)[place * 63 // 99], 1] = 1
    assert hash_data(other) != hash_data(x)
    assert hash_data(x.astype("float64")) != hash_data(x)
    assert hash_data(x[:99]) != hash_data(x)
    assert hash_data({"a": x}) == hash_data({"a": x.copy()})


def test_arrays_on_disk_count_as_those_in_memory(tmp_path):
    x = np.random.default_rng(0).normal(size=(70, 3))
    np.save(tmp_path / "x.npy", x)
    assert hash_data(np.load(tmp_path / "x.npy", mmap_mode="r")) == hash_data(x)


@given(size=st.integers(1, 500), count=st.integers(2, 80))
def test_places_are_within_and_begin_and_end_where_the_data_does(size, count):
    places = sample_places(size, count)
    assert places[0] == 0
    assert places[-1] == size - 1
    assert len(places) == min(size, count)
    assert places == sorted(set(places))
