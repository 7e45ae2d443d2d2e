"""Ensembles of teachers: their logits against numpy, their weights left alone."""

import keras
import numpy as np
import pytest
from keras import layers
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import entropy

import tfaccel
from tfaccel.distillation import Distiller
from tfaccel.distillation.ensembles import CombinedLogits, ensemble

CLASSES = 4


def net(seed, name="net", activation=None, classes=CLASSES, features=5):
    keras.utils.set_random_seed(seed)
    hidden = layers.Dense(6, activation="relu")
    top = layers.Dense(classes, activation=activation, kernel_initializer="random_normal")
    return keras.Sequential(
        [keras.Input((features,)), hidden, layers.BatchNormalization(), top], name=name
    )


def x(size=16):
    return 20 * np.random.default_rng(3).normal(size=(size, 5)).astype("float32")


def said(teachers):
    return np.stack([teacher(x()) for teacher in teachers]).astype("float64")


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("count", [2, 3])
def test_the_mean_is_that_of_softened_probabilities(temperature, count):
    teachers = [net(seed) for seed in range(count)]
    logits = np.asarray(ensemble(teachers, temperature=temperature)(x()))
    expected = softmax(said(teachers) / temperature, axis=-1).mean(axis=0)
    np.testing.assert_allclose(softmax(logits / temperature, axis=-1), expected, atol=1e-6)


def test_the_mean_of_logits_is_the_geometric_mean_of_probabilities_at_any_temperature():
    teachers = [net(seed) for seed in range(3)]
    logits = np.asarray(ensemble(teachers, "mean_logits")(x()))
    for temperature in (1.0, 5.0):
        product = np.prod(softmax(said(teachers) / temperature, axis=-1), axis=0) ** (1 / 3)
        expected = product / product.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(softmax(logits / temperature, axis=-1), expected, atol=1e-6)


def test_for_two_teachers_confidence_is_one_over_the_entropy():
    teachers = [net(seed) for seed in range(2)]
    logits = np.asarray(ensemble(teachers, "confidence", temperature=2.0)(x()))
    weights = 1 / entropy(softmax(said(teachers), axis=-1), axis=-1)
    weights = (weights / weights.sum(axis=0))[..., None]
    expected = (weights * softmax(said(teachers) / 2, axis=-1)).sum(axis=0)
    np.testing.assert_allclose(softmax(logits / 2, axis=-1), expected, atol=1e-5)


def test_confidence_of_three_teachers_by_hand():
    # Entropies log 4, log 2 and almost 0: weights (1 - H / sum H) / 2.
    far = 50.0
    logits = [
        np.array([row], "float32")
        for row in ([0, 0, 0, 0], [0, 0, -far, -far], [-far, -far, -far, 0])
    ]
    weights = (1 - np.array([2, 1, 0]) / 3) / 2
    expected = weights @ np.array([[0.25] * 4, [0.5, 0.5, 0, 0], [0, 0, 0, 1.0]])
    found = CombinedLogits("confidence")(logits)
    np.testing.assert_allclose(softmax(found, axis=-1)[0], expected, atol=1e-5)


def test_teachers_that_are_all_sure_count_alike():
    logits = [np.array([row], "float32") for row in ([1000, 0, 0], [0, 1000, 0])]
    found = np.asarray(CombinedLogits("confidence")(logits))
    np.testing.assert_allclose(found[0, :2], np.log([0.5, 0.5]), atol=1e-4)
    assert np.isfinite(found).all()


def test_unlikely_classes_do_not_underflow():
    logits = np.array([[[200.0, 0.0, -300.0]], [[180.0, 0.0, -310.0]]])
    found = CombinedLogits()([each.astype("float32") for each in logits])
    expected = logsumexp(log_softmax(logits, axis=-1), axis=0) - np.log(2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("combine", ["mean", "mean_logits", "confidence"])
def test_it_survives_saving_and_trains_a_student(combine, tmp_path):
    # All have the same name, and layers of the same names.
    teachers = [net(seed) for seed in range(3)]
    before = [w.copy() for teacher in teachers for w in teacher.get_weights()]
    combined = ensemble(teachers, combine, temperature=3.0)
    assert len(combined.weights) == len(before)
    combined.save(tmp_path / "ensemble.keras")
    loaded = tfaccel.load_model(tmp_path / "ensemble.keras")
    np.testing.assert_array_equal(loaded(x()), combined(x()))
    student = net(7)
    distiller = Distiller(combined, student, alpha=0.0, temperature=3.0)
    distiller.compile(keras.optimizers.SGD(0.01), run_eagerly=True)
    history = distiller.fit(x(), epochs=5, verbose=0).history["loss"]
    assert history[-1] < history[0]
    for old, new in zip(before, [w for t in teachers for w in t.get_weights()], strict=True):
        np.testing.assert_array_equal(old, new)
    assert all(teacher.trainable and teacher.name == "net" for teacher in teachers)


def test_weights_are_shared_not_copied():
    teachers = [net(0), net(1)]
    combined = ensemble(teachers)
    old = np.asarray(combined(x()))
    teachers[1].set_weights([2 * w for w in teachers[1].get_weights()])
    assert np.abs(np.asarray(combined(x())) - old).max() > 0.1


def test_several_inputs_and_outputs_are_matched_by_name():
    def forked(seed):
        keras.utils.set_random_seed(seed)
        inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((2,), name="b")}
        both = layers.Concatenate()([inputs["a"], inputs["b"]])
        outputs = {"x": layers.Dense(3, name="x")(both), "y": layers.Dense(4, name="y")(both)}
        return keras.Model(inputs, outputs)

    teachers = [forked(0), forked(1)]
    random = np.random.default_rng(0)
    batch = {"a": random.normal(size=(5, 3)), "b": random.normal(size=(5, 2))}
    found = ensemble(teachers, "mean_logits")(batch)
    alone = [teacher(batch) for teacher in teachers]
    for key in "xy":
        expected = (alone[0][key] + alone[1][key]) / 2
        np.testing.assert_allclose(found[key], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("teachers", "options", "error", "message"),
    [
        (lambda: [net(0)], {}, ValueError, "two teachers or more, but got 1"),
        (lambda: net(0), {}, TypeError, "teachers must be list or tuple"),
        (lambda: [net(0), net(1, activation="softmax")], {}, ValueError, "ends in softmax"),
        (lambda: [net(0), net(1, classes=3)], {}, ValueError, r"same outputs.*4\) .*3\) "),
        (lambda: [net(0), net(1, features=7)], {}, ValueError, "same inputs"),
        (lambda: [net(0), "net.keras"], {}, TypeError, "load_model"),
        (lambda: [net(0), net(1)], {"combine": "vote"}, ValueError, "'mean', 'mean_logits'"),
        (lambda: [net(0), net(1)], {"temperature": 0}, ValueError, "temperature must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(teachers, options, error, message):
    with pytest.raises(error, match=message):
        ensemble(teachers(), **options)
