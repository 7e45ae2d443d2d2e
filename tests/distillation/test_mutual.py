"""Mutual learning: its step against numpy, its students, training on from a file."""

import keras
import numpy as np
import pytest
from keras import layers
from scipy.special import log_softmax, softmax

import tfaccel
from tfaccel.distillation.mutual import MutualLearning

CLASSES = 3


def linear(seed):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((6,)), layers.Dense(CLASSES, use_bias=False)])


def net(units=5, seed=0, dropout=0.0, **options):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(units, activation="relu", **options),
            layers.BatchNormalization(),
            layers.Dropout(dropout, seed=seed),
            layers.Dense(CLASSES),
        ]
    )


def data(size=24):
    x = np.random.default_rng(1).normal(size=(size, 6)).astype("float32")
    return x, np.argmax(x[:, :CLASSES], axis=-1)


def compiled(model, optimizer="sgd", **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    options = {"metrics": ["accuracy"], **options}
    # A few eager steps take less time than a trace.
    model.compile(optimizer, loss, **{"run_eagerly": "jit_compile" not in options, **options})
    return model


def fit(model, epochs, **options):
    x, y = data()
    return model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **options).history


@pytest.mark.parametrize(("count", "jit"), [(2, False), (2, True), (3, False)])
def test_one_step_is_that_of_each_student_by_hand(count, jit):
    students = [linear(seed) for seed in range(count)]
    raw = [student.get_weights()[0].astype("float64") for student in students]
    x, y = data(16)
    sample_weight = np.random.default_rng(5).random(16)
    said = [softmax(x @ kernel, axis=-1) for kernel in raw]
    rate, expected = 0.5, []
    for k, kernel in enumerate(raw):
        # d/dz of the cross-entropy is p - onehot, of KL(q || p) it is p - q.
        gradient = said[k] - np.eye(CLASSES)[y]
        for peer in range(count):
            if peer != k:
                gradient = gradient + (said[k] - said[peer]) / (count - 1)
        expected.append(kernel - rate * x.T @ (sample_weight[:, None] * gradient) / len(x))
    options = {"jit_compile": True} if jit else {}
    mutual = compiled(MutualLearning(students), keras.optimizers.SGD(rate), **options)
    mutual.train_on_batch(x, y, sample_weight=sample_weight)
    for student, kernel in zip(students, expected, strict=True):
        np.testing.assert_allclose(student.get_weights()[0], kernel, rtol=1e-4, atol=1e-5)


def test_losses_and_metrics_are_reported_as_they_are():
    students = [net(5, 0, kernel_regularizer="l2"), net(4, 1), net(6, 2, kernel_regularizer="l1")]
    x, y = data()
    alone = []
    for student in students:
        compiled(student)
        alone.append(student.evaluate(x, y, verbose=0, return_dict=True))
    logs = [log_softmax(s.predict(x, verbose=0).astype("float64"), axis=-1) for s in students]
    divergence = sum(
        (np.exp(p) * (p - q)).sum(axis=-1).mean() for p in logs for q in logs if p is not q
    )
    mutual = compiled(MutualLearning(students, weight=0.3))
    found = mutual.evaluate(x, y, batch_size=24, verbose=0, return_dict=True)
    for number, each in enumerate(alone):
        assert found[f"student_{number + 1}_loss"] == pytest.approx(each["loss"], rel=1e-4)
    own = sum(each["loss"] for each in alone)
    assert found["student_loss"] == pytest.approx(own, rel=1e-4)
    assert found["distillation_loss"] == pytest.approx(divergence / 2, rel=1e-4)
    assert found["loss"] == pytest.approx(own + 0.3 * divergence / 2, rel=1e-4)
    assert found["accuracy"] == alone[0]["accuracy"]
    np.testing.assert_array_equal(mutual.predict(x, verbose=0), students[0].predict(x, verbose=0))


def test_without_the_divergence_each_student_trains_as_alone():
    alone = [net(5, 0, 0.3, kernel_regularizer="l2"), net(4, 1)]
    together = [net(5, 0, 0.3, kernel_regularizer="l2"), net(4, 1)]
    for student in alone:
        fit(compiled(student, "adam"), 2)
    fit(compiled(MutualLearning(together, weight=0.0), "adam"), 2)
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_students_agree_more_with_the_divergence_than_without():
    x, _ = data()
    noise = np.random.default_rng(0).integers(0, CLASSES, len(x))

    def disagreement(weight):
        students = [linear(0), linear(1)]
        mutual = MutualLearning(students, weight=weight)
        compiled(mutual, keras.optimizers.SGD(0.1), jit_compile=False)
        mutual.fit(x, noise, batch_size=24, epochs=20, verbose=0)
        one, other = (softmax(s.predict(x, verbose=0), axis=-1) for s in students)
        return np.abs(one - other).mean()

    assert disagreement(5.0) < 0.6 * disagreement(0.0)


def test_it_trains_on_from_a_file_as_if_it_had_not_stopped(tmp_path):
    def start():  # without dropout, whose seed Keras does not save
        schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 9, 1.0, power=1.0)
        return compiled(MutualLearning([net(5, 0), net(4, 1)], weight=schedule), "adam")

    whole, part = start(), start()
    fit(whole, 3, validation_data=data())
    fit(part, 1)
    part.save(tmp_path / "part.keras")
    resumed = tfaccel.load_model(tmp_path / "part.keras", compile=True)
    assert [s.count_params() for s in resumed.students] == [s.count_params() for s in part.students]
    fit(resumed, 2)
    for one, other in zip(whole.students, resumed.students, strict=True):
        assert type(other) is keras.Sequential
        for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_variables_are_those_of_all_students_each_once():
    students = [net(5, 0), net(4, 1)]
    mutual = MutualLearning(students)
    wanted = [id(weight) for student in students for weight in student.trainable_variables]
    assert sorted(id(weight) for weight in mutual.trainable_variables) == sorted(wanted)


@pytest.mark.parametrize(
    ("students", "options", "error", "message"),
    [
        (lambda: [net()], {}, ValueError, "two different students or more, but got 1"),
        (lambda: [net()] * 2, {}, ValueError, "one comes twice"),
        (net, {}, TypeError, "students must be list or tuple"),
        (lambda: [net(), "net"], {}, TypeError, "students must be Model"),
        (lambda: [net(), keras.Sequential([layers.Dense(3)])], {}, ValueError, "needs a built"),
        (
            lambda: [net(), keras.Sequential([net(), layers.Softmax()])],
            {},
            ValueError,
            "ends in softmax",
        ),
        (lambda: [net(), net()], {"temperature": 0}, ValueError, "temperature must be above 0"),
        (lambda: [net(), net()], {"weight": "much"}, TypeError, "must be a number"),
    ],
)
def test_what_makes_no_sense_is_refused(students, options, error, message):
    with pytest.raises(error, match=message):
        MutualLearning(students(), **options)


def test_there_is_no_teacher_to_set_and_a_loss_is_needed():
    mutual = MutualLearning([net(5, 0), net(4, 1)])
    with pytest.raises(ValueError, match="no teacher to set"):
        mutual.teacher = net()
    mutual.compile("sgd")
    with pytest.raises(ValueError, match="there is none"):
        mutual.fit(*data(), verbose=0)
