"""Steps and clipping values that are trained: the papers' gradients, and what becomes of them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.quantization.networks import conv, images, network
from tfaccel.core.transforms import TransformedLayer, transform_model
from tfaccel.quantization import (
    LSQ,
    PACT,
    RANGES,
    FakeQuantize,
    LearnedClipping,
    LearnedStep,
    LearnedStepWeights,
    MovingExtremes,
    quantize_aware,
)


def values_of(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


# LSQ (Esser et al. 2020)


def by_the_paper(v, s, least, most):
    """Equations 1 to 3: the rounded value, and its derivative by the step."""
    ratio = v / s
    rounded = np.rint(np.clip(ratio, least, most)) * s
    slope = np.where(ratio <= least, least, np.where(ratio >= most, most, -ratio + np.rint(ratio)))
    return rounded, slope


def dense_with_learned_steps(bits):
    dense = keras.Sequential([keras.Input((6,)), layers.Dense(3, name="d")])
    return transform_model(dense, lambda _: {"kernel": LearnedStepWeights((-1,), bits)})


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_steps_and_gradients_are_the_papers(bits):
    layer = dense_with_learned_steps(bits).get_layer("d")
    ((_, rounding),) = layer.transforms
    weight = np.asarray(layer.layer.kernel)
    most = 2 ** (bits - 1) - 1
    step = 2 * np.abs(weight).mean(0, keepdims=True) / np.sqrt(most)
    np.testing.assert_allclose(rounding.state["step"], step, rtol=1e-6)
    expected, slope = by_the_paper(weight, step, -most, most)
    pull = values_of(6, 3, seed=1)
    with tf.GradientTape() as tape:
        rounded = rounding(tf.convert_to_tensor(layer.layer.kernel), training=True)
        total = tf.reduce_sum(rounded * pull)
    by_weight, by_step = tape.gradient(
        total, [layer.layer.kernel.value, rounding.state["step"].value]
    )
    np.testing.assert_allclose(rounded, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(rounding.finalize(weight), expected, rtol=1e-5, atol=1e-7)
    # Six weights have a step together.
    factor = 1 / np.sqrt(6 * most)
    np.testing.assert_allclose(
        by_step, (pull * slope).sum(0, keepdims=True) * factor, rtol=1e-3, atol=1e-5
    )
    inside = np.abs(weight / step) < most
    np.testing.assert_allclose(by_weight, np.where(inside, pull, 0.0), rtol=1e-5)


@pytest.mark.parametrize(("nonnegative", "bits"), [(True, 4), (False, 4), (False, 16)])
def test_values_steps_and_gradients_are_the_papers(nonnegative, bits):
    x = 3 * values_of(5, 4, 2)
    x = np.maximum(x, 0) if nonnegative else x
    least, most = (0, 2**bits - 1) if nonnegative else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    layer = LearnedStep(bits, nonnegative=nonnegative)
    step = 2 * np.abs(x).mean() / np.sqrt(most)
    expected, slope = by_the_paper(x.astype("float64"), step, least, most)
    pull = values_of(5, 4, 2, seed=1)
    with tf.GradientTape() as tape:
        rounded = layer(x, training=True)
        total = tf.reduce_sum(rounded * pull)
    (change,) = layer.trainable_variables
    gradient = tape.gradient(total, change.value)
    # In float32 a value between two levels may fall on either side.
    assert (np.abs(rounded - expected) > step * 1e-2).mean() <= 0.03
    # Eight features of a sample.
    wanted = (pull * slope).sum() / np.sqrt(8 * most)
    assert float(gradient) == pytest.approx(wanted, rel=0.05, abs=0.1 / np.sqrt(8 * most))
    assert float(layer.maximum) == pytest.approx(step * most, rel=1e-5)
    assert float(layer.minimum) == pytest.approx(step * least, rel=1e-5)


def test_a_step_is_trained_on_from_where_it_began():
    layer = LearnedStep(4)
    layer(values_of(8, 3), training=True)
    first = float(layer.learned)
    (change,) = layer.trainable_variables
    change.assign(0.25 * first)
    layer(10 * values_of(8, 3), training=True)  # a later batch begins nothing
    assert float(layer.learned) == pytest.approx(1.25 * first)
    change.assign(-5 * first)
    assert float(layer.learned) == pytest.approx(1e-3 * first)  # never zero


def test_inference_and_training_round_alike():
    x = values_of(40, 3)
    for layer in (LearnedStep(4), LearnedClipping(4)):
        given = np.maximum(x, 0) if isinstance(layer, LearnedClipping) else x
        trained = np.asarray(layer(given, training=True))
        apart = np.abs(trained - np.asarray(layer(given)))
        step = float(layer.maximum - layer.minimum) / 15
        assert (apart > 1e-2 * step).mean() <= 0.02  # halves fall on either side


def test_first_batch_of_zeros_or_with_an_overflow_is_no_beginning():
    for layer in (LearnedStep(8), LearnedClipping(8)):
        layer(np.zeros((4, 2), "float32"), training=True)
        layer(np.array([[1.0, np.inf]], "float32"), training=True)
        layer(np.array([[0.5, 2.0]], "float32"), training=True)
        assert np.isfinite(float(layer.learned))
        assert float(layer.learned) > 0


def test_asymmetric_weights_are_refused():
    with pytest.raises(ValueError, match=r"ranges='lsq'\) are for symmetric weights"):
        LearnedStepWeights((-1,), 4, symmetric=False)


# PACT (Choi et al. 2018)


def test_clipping_and_its_gradient_are_the_papers():
    x = np.array([0.2, 1.0, 2.4, 3.0, 5.0], "float32")
    layer = LearnedClipping(2, decay=0.0)
    layer(x, training=True)
    assert float(layer.learned) == 5.0  # nothing is clipped at the start
    (change,) = layer.trainable_variables
    change.assign(-2.5)
    variable = tf.Variable(x)
    with tf.GradientTape() as tape:
        rounded = layer(variable, training=True)
        total = tf.reduce_sum(rounded * tf.constant([1.0, 2.0, 4.0, 8.0, 16.0]))
    by_value, by_clipping = tape.gradient(total, [variable, change.value])
    # Equation 2 with a = 2.5: levels at thirds of it.
    third = 2.5 / 3
    np.testing.assert_allclose(rounded, [0.0, third, 2.5, 2.5, 2.5], rtol=1e-6)
    np.testing.assert_array_equal(by_value, [1, 2, 4, 0, 0])
    assert float(by_clipping) == 8 + 16


def test_decay_is_added_to_the_loss_until_the_range_is_held():
    layer = LearnedClipping(8, decay=0.01)
    x = np.array([[0.0, 3.0]], "float32")
    layer(x, training=True)
    assert float(sum(layer.losses)) == pytest.approx(0.01 * 9)
    layer.hold_range()
    layer(x, training=True)
    assert float(sum(layer.losses)) == 0.0


@pytest.mark.parametrize("decay", [-0.1, "much"])
def test_bad_decay(decay):
    with pytest.raises((TypeError, ValueError), match="decay must"):
        PACT(decay=decay)


# In a model


def small(x):
    x = layers.ReLU()(layers.BatchNormalization()(conv(x, name="c")))
    return layers.Dense(4, name="d")(layers.Flatten()(conv(x, 4, 1, activation="relu")))


def test_each_way_puts_its_own_layers():
    model = network(small)
    kinds = {
        name: [type(x).__name__ for x in quantize_aware(model, ranges=name).layers]
        for name in ("ema", "lsq", "pact")
    }
    assert kinds["ema"].count("FakeQuantize") == 4
    assert kinds["lsq"].count("LearnedStep") == 4
    # The image and the logits stand behind no ReLU.
    assert (kinds["pact"].count("LearnedClipping"), kinds["pact"].count("FakeQuantize")) == (2, 2)
    weights = [
        type(t).__name__
        for x in quantize_aware(model, ranges="lsq").layers
        if isinstance(x, TransformedLayer)
        for _, t in x.transforms
    ]
    assert set(weights) == {"LearnedStepWeights"}


def test_prescribed_ranges_are_not_learned():
    model = network(lambda x: layers.Dense(4, activation="softmax")(layers.Flatten()(x)))
    last = quantize_aware(model, ranges="lsq").layers[-1]
    assert type(last) is FakeQuantize
    assert last.fixed_range == (0.0, 255 / 256)


@pytest.mark.parametrize("ranges", ["lsq", "pact"])
def test_steps_move_with_the_loss_and_survive_saving(ranges, tmp_path):
    aware = quantize_aware(network(small), "w4a4", ranges=ranges)
    aware.compile("adam", "mse")
    x, y = images(32), np.ones((32, 4))
    aware.fit(x, y, epochs=2, batch_size=16, verbose=0)
    learned = [v for v in aware.trainable_variables if v.path.endswith(("/change", "step"))]
    assert len(learned) == {"lsq": 7, "pact": 2}[ranges]
    assert all(float(abs(v[...]).numpy().max()) > 0 for v in learned)
    aware.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(x), aware(x))


def test_ways_by_name_config_or_instance():
    assert RANGES.names() == ["ema", "lsq", "pact"]
    way = PACT(momentum=0.5, decay=0.1)
    again = RANGES.get(keras.saving.serialize_keras_object(way))
    assert again == way
    assert isinstance(RANGES.get("lsq"), LSQ)
    aware = quantize_aware(network(small), ranges=MovingExtremes(momentum=0.5))
    assert {x.momentum for x in aware.layers if isinstance(x, FakeQuantize)} == {0.5}
    with pytest.raises(ValueError, match=r"no way to find ranges 'emma'.*'ema'"):
        quantize_aware(network(small), ranges="emma")


def test_calibration_sets_what_is_learned():
    step, clipping = LearnedStep(8), LearnedClipping(4)
    step.set_range(-1.0, 3.0)
    assert float(step.maximum) == pytest.approx(3.0)
    assert float(step.minimum) == pytest.approx(-3.0 * 128 / 127)
    clipping.set_range(-1.0, 3.0)
    assert (float(clipping.minimum), float(clipping.maximum)) == (0.0, 3.0)
    assert step.calibrated
    assert clipping.frozen().bits == 8  # the part of a grid of 8 bits
    x = np.linspace(0, 4, 50, dtype="float32")
    np.testing.assert_allclose(clipping.frozen()(x), clipping(x), atol=1e-5)


def test_a_step_that_fell_below_zero_comes_back():
    """The gradient flows though the grid is held above zero; else the weights were lost."""
    layer = dense_with_learned_steps(4).get_layer("d")
    ((_, rounding),) = layer.transforms
    rounding.state["step"].assign([[-0.01, -0.02, 0.3]])
    with tf.GradientTape() as tape:
        rounded = rounding(tf.convert_to_tensor(layer.layer.kernel), training=True)
        total = tf.reduce_sum((rounded - layer.layer.kernel) ** 2)
    slope = np.asarray(tape.gradient(total, rounding.state["step"].value))
    assert (slope[0, :2] < 0).all()  # descent makes them larger

    value = LearnedStep(4, name="v")
    value(values_of(4, 6))
    value(values_of(4, 6), training=True)
    value._change.assign(-10.0)
    with tf.GradientTape() as tape:
        x = tf.convert_to_tensor(values_of(4, 6))
        total = tf.reduce_sum((value(x, training=True) - x) ** 2)
    assert float(tape.gradient(total, value._change.value)) < 0
