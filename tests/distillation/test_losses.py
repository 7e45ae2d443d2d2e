"""The loss against scipy, and models whose outputs are no logits."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from scipy.special import softmax
from scipy.stats import entropy

from tfaccel.distillation import LogitDistillation
from tfaccel.pruning import prune


def logits(*shape, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype("float32")


def expected(teacher, student, temperature):
    """Mean of scipy's relative entropies in float64, times T²."""
    p, q = (softmax(x.astype("float64") / temperature, axis=-1) for x in (teacher, student))
    return temperature**2 * entropy(p, q, axis=-1)


@given(temperature=st.floats(0.5, 20), seed=st.integers(0, 999), classes=st.integers(2, 12))
@settings(max_examples=30)
def test_equals_scipys_relative_entropy(temperature, seed, classes):
    teacher, student = logits(6, classes, seed=seed), logits(6, classes, seed=seed + 1)
    loss = LogitDistillation(temperature).compute_loss(teacher, student)
    np.testing.assert_allclose(
        float(loss), expected(teacher, student, temperature).mean(), rtol=2e-4, atol=1e-5
    )


def test_by_hand():
    # Teacher (2/3, 1/3), student (1/2, 1/2): 2/3 ln(4/3) + 1/3 ln(2/3).
    teacher, student = np.log([[2.0, 1.0]]), np.zeros((1, 2))
    by_hand = 2 / 3 * np.log(4 / 3) + 1 / 3 * np.log(2 / 3)
    assert float(LogitDistillation(1.0).compute_loss(teacher, student)) == pytest.approx(by_hand)
    scaled = LogitDistillation(5.0).compute_loss(5 * teacher, 5 * student)
    assert float(scaled) == pytest.approx(25 * by_hand, rel=1e-5)


def test_sharp_logits_are_not_clipped():
    # The stock loss clips probabilities at 1e-7, and the difference with it.
    teacher, student = np.array([[60.0, 0.0]]), np.array([[0.0, 60.0]])
    assert float(LogitDistillation(1.0).compute_loss(teacher, student)) == pytest.approx(60.0)


def test_equals_the_stock_loss_where_that_is_exact():
    teacher, student = logits(8, 5, scale=1.0), logits(8, 5, seed=1, scale=1.0)
    # By default the stock loss takes logits for probabilities; given the class, it does not.
    stock = keras.distillation.LogitsDistillation(4.0, keras.losses.KLDivergence())
    ours = LogitDistillation(4.0).compute_loss(teacher, student)
    assert float(ours) == pytest.approx(float(stock.compute_loss(teacher, student)), rel=1e-4)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 4)])
def test_sample_weights_weigh_the_samples(shape):
    teacher, student = logits(6, 4, 3), logits(6, 4, 3, seed=1)
    weight = np.random.default_rng(2).random(shape).astype("float32")
    each = expected(teacher, student, 2.0) * weight.reshape(6, -1)
    loss = LogitDistillation(2.0).compute_loss(teacher, student, sample_weight=weight)
    assert float(loss) == pytest.approx(each.mean(), rel=1e-4)


def test_several_outputs_are_added():
    first, second = (logits(4, 3), logits(4, 3, seed=1)), (logits(4, 7), logits(4, 7, seed=2))
    loss = LogitDistillation(3.0)
    both = loss.compute_loss({"a": first[0], "b": second[0]}, {"a": first[1], "b": second[1]})
    apart = loss.compute_loss(*first) + loss.compute_loss(*second)
    assert float(both) == pytest.approx(float(apart), rel=1e-6)


def test_half_precision_logits_are_computed_in_float32():
    teacher, student = logits(6, 4), logits(6, 4, seed=1)
    halves = teacher.astype("float16"), student.astype("float16")
    loss = LogitDistillation(4.0).compute_loss(*halves)
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    assert float(loss) == pytest.approx(expected(*halves, 4.0).mean(), rel=1e-4)


def test_round_trips_through_its_config():
    config = keras.saving.serialize_keras_object(LogitDistillation(7.0))
    assert keras.saving.deserialize_keras_object(config) == LogitDistillation(7.0)


@pytest.mark.parametrize(
    ("temperature", "error"), [(0, ValueError), (-1.0, ValueError), ("4", TypeError)]
)
def test_temperature_must_be_positive(temperature, error):
    with pytest.raises(error, match="temperature"):
        LogitDistillation(temperature)


class Passing(layers.Layer):
    """Stands in for fake quantization: a layer that strip takes out."""

    def call(self, inputs):
        return inputs

    def strip_layer(self):
        return None


def ending(name):
    """A model of three classes with an ending of each kind."""
    inputs = keras.Input((8,))
    x = layers.Dense(3, activation="softmax" if "softmax" in name else None)(inputs)
    endings = {
        "logits": lambda: x,
        "dense softmax": lambda: x,
        "softmax layer": lambda: layers.Softmax()(layers.Dense(3)(inputs)),
        "activation sigmoid": lambda: layers.Activation("sigmoid")(x),
        "function softmax": lambda: keras.ops.softmax(layers.Dense(3)(inputs)),
        "softmax, cast": lambda: layers.Activation("linear")(x),
        "softmax, quantized": lambda: Passing()(x),
        "log-softmax": lambda: keras.ops.log_softmax(layers.Dense(3)(inputs)),
        "tanh": lambda: layers.Activation("tanh")(layers.Dense(3)(inputs)),
    }
    return keras.Model(inputs, endings[name](), name="ending")


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("dense softmax", "softmax"),
        ("softmax layer", "softmax"),
        ("function softmax", "softmax"),
        ("activation sigmoid", "sigmoid"),
        ("softmax, cast", "softmax"),
        ("softmax, quantized", "softmax"),
    ],
)
def test_probabilities_are_refused(name, activation):
    loss = LogitDistillation()
    with pytest.raises(ValueError, match=f"teacher 'ending' ends in {activation}.*from_logits"):
        loss.validate_model_compatibility(ending(name), ending("logits"))
    with pytest.raises(ValueError, match=f"student 'ending' ends in {activation}"):
        loss.validate_model_compatibility(ending("logits"), ending(name))


@pytest.mark.parametrize("name", ["logits", "log-softmax", "tanh"])
def test_logits_of_any_range_are_taken(name):
    LogitDistillation().validate_model_compatibility(ending(name), ending("logits"))


def test_a_softmax_inside_a_nested_or_pruned_model_is_found():
    inputs = keras.Input((8,))
    nested = keras.Model(inputs, ending("dense softmax")(inputs))
    pruned = prune(ending("dense softmax"), 0.5, include="*")
    for model in (nested, pruned):
        with pytest.raises(ValueError, match="softmax"):
            LogitDistillation().validate_model_compatibility(model, ending("logits"))


def test_a_single_output_is_refused():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(1)])
    with pytest.raises(ValueError, match="one class"):
        LogitDistillation().validate_model_compatibility(model, model)
