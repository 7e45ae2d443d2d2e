"""Decoupled distillation, many labels and regressions, against scipy and by hand."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from scipy.integrate import quad
from scipy.special import expit, softmax
from scipy.stats import entropy, norm

from tfaccel.distillation.logit_losses import (
    DecoupledDistillation,
    MultiLabelDistillation,
    RegressionDistillation,
)
from tfaccel.distillation.losses import LogitDistillation


def outputs(*shape, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype("float32")


def decoupled(teacher, student, labels, temperature):
    """Both parts of each sample in float64, and the teacher's probability of the target."""
    p, q = (softmax(x.astype("float64") / temperature, axis=-1) for x in (teacher, student))
    target, other, sure = [], [], []
    for row, label in enumerate(labels):
        pairs = [(x[row, label], 1 - x[row, label]) for x in (p, q)]
        target.append(entropy(*pairs))
        other.append(entropy(np.delete(p[row], label), np.delete(q[row], label)))
        sure.append(p[row, label])
    return np.array(target), np.array(other), np.array(sure)


@given(temperature=st.floats(0.7, 10), seed=st.integers(0, 999), classes=st.integers(2, 9))
@settings(max_examples=20)
def test_decoupled_equals_scipy_and_adds_up_to_plain_distillation(temperature, seed, classes):
    teacher, student = outputs(5, classes, seed=seed), outputs(5, classes, seed=seed + 1)
    labels = np.random.default_rng(seed).integers(0, classes, 5)
    target, other, sure = decoupled(teacher, student, labels, temperature)
    loss = DecoupledDistillation(1.5, 6.0, temperature)
    value = float(loss.compute_loss(teacher, student, labels=labels))
    expected = temperature**2 * (1.5 * target + 6.0 * other).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-4)
    # KD = TCKD + (1 - p_t) NCKD (Zhao 2022, eq. 5), of our own two parts this time.
    parts = [
        np.array(
            [
                float(
                    part.compute_loss(
                        teacher[i : i + 1], student[i : i + 1], labels=np.array([label])
                    )
                )
                for i, label in enumerate(labels)
            ]
        )
        for part in (
            DecoupledDistillation(1.0, 0.0, temperature),
            DecoupledDistillation(0.0, 1.0, temperature),
        )
    ]
    whole = float(LogitDistillation(temperature).compute_loss(teacher, student))
    np.testing.assert_allclose(
        (parts[0] + (1 - sure) * parts[1]).mean(), whole, rtol=1e-3, atol=1e-4
    )


def test_a_teacher_that_is_sure_still_tells_of_the_other_classes():
    # Its 1 - p_t is 0 in float32; the others are e^-30 and e^-31 all the same: 1 to 1/e.
    teacher, student = np.array([[30.0, 0.0, -1.0]]), np.array([[30.0, -1.0, 0.0]])
    p = 1 / (1 + np.exp(-1.0))
    value = DecoupledDistillation(1.0, 1.0, 1.0).compute_loss(
        teacher, student, labels=np.array([0])
    )
    assert float(value) == pytest.approx(2 * p - 1, rel=1e-4)


@pytest.mark.parametrize("shape", ["ids", "column", "one-hot", "float ids"])
def test_labels_of_any_form_mean_the_same(shape):
    teacher, student = outputs(6, 4), outputs(6, 4, seed=1)
    ids = np.array([0, 3, 1, 1, 2, 0])
    forms = {
        "ids": ids,
        "column": ids[:, None],
        "one-hot": np.eye(4)[ids],
        "float ids": ids.astype("float32"),
    }
    target, other, _ = decoupled(teacher, student, ids, 4.0)
    value = DecoupledDistillation().compute_loss(teacher, student, labels=forms[shape])
    assert float(value) == pytest.approx(16 * (target + 8 * other).mean(), rel=1e-3)


def test_decoupled_needs_labels_of_the_right_shape():
    with pytest.raises(ValueError, match=r"no labels.*LogitDistillation"):
        DecoupledDistillation().compute_loss(outputs(4, 3), outputs(4, 3))
    with pytest.raises(ValueError, match=r"class ids or one-hot.*\(4, 5\)"):
        DecoupledDistillation().compute_loss(outputs(4, 3), outputs(4, 3), labels=outputs(4, 5))


def test_decoupled_gradients_are_finite_for_sharp_logits():
    import tensorflow as tf

    student = tf.Variable([[80.0, 0.0, -80.0], [0.0, 0.0, 200.0]])
    with tf.GradientTape() as tape:
        loss = DecoupledDistillation().compute_loss(
            tf.constant([[-50.0, 90.0, 0.0], [0.0, 1.0, 300.0]]), student, labels=np.array([0, 2])
        )
    assert np.isfinite(tape.gradient(loss, student)).all()


@given(temperature=st.floats(0.5, 10), seed=st.integers(0, 999), labels=st.integers(1, 6))
@settings(max_examples=20)
def test_many_labels_equal_scipys_relative_entropy(temperature, seed, labels):
    teacher, student = outputs(5, labels, seed=seed), outputs(5, labels, seed=seed + 1)
    p, q = (expit(x.astype("float64") / temperature) for x in (teacher, student))
    expected = temperature**2 * entropy([p, 1 - p], [q, 1 - q], axis=0).mean()
    value = MultiLabelDistillation(temperature).compute_loss(teacher, student)
    np.testing.assert_allclose(float(value), expected, rtol=1e-3, atol=1e-5)


def test_one_logit_equals_two():
    # The sigmoid of z is the softmax of (z, 0).
    teacher, student = outputs(6, 1), outputs(6, 1, seed=1)
    two = [np.concatenate([x, np.zeros_like(x)], axis=1) for x in (teacher, student)]
    value = MultiLabelDistillation(2.0).compute_loss(teacher, student)
    assert float(value) == pytest.approx(float(LogitDistillation(2.0).compute_loss(*two)), rel=1e-4)


def test_gaussians_of_one_width_equal_the_integral():
    teacher, student, sigma = 0.7, -0.4, 0.5
    p, q = norm(teacher, sigma), norm(student, sigma)
    expected = quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -6, 6)[0]
    loss = RegressionDistillation(sigma)
    assert float(loss.compute_loss(np.array([[teacher]]), np.array([[student]]))) == pytest.approx(
        expected, rel=1e-5
    )


def test_predicted_variances_equal_the_integral():
    teacher, student = outputs(3, 4, scale=0.5), outputs(3, 4, seed=1, scale=0.5)
    expected = []
    for t, s in zip(teacher, student, strict=True):
        for d in range(2):
            p = norm(t[d], np.exp(t[2 + d] / 2))
            q = norm(s[d], np.exp(s[2 + d] / 2))
            expected.append(
                quad(lambda x, p=p, q=q: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -20, 20)[0]
            )
    value = RegressionDistillation(predicts_variance=True).compute_loss(teacher, student)
    assert float(value) == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("column", [True, False])
def test_a_bounding_teacher_counts_only_where_it_is_better(column):
    labels = np.array([0.0, 0.0, 0.0, 0.0])
    teacher = np.array([[1.0], [3.0], [2.0], [2.0]])
    student = np.array([[2.0], [1.0], [2.0], [1.9]])
    # Squared errors 4, 1, 4, 3.61 against 1, 9, 4, 4: equal is not better, unless by the bound.
    given = labels[:, None] if column else labels
    sharp = RegressionDistillation(bound=0.0).compute_loss(teacher, student, labels=given)
    wide = RegressionDistillation(bound=0.5).compute_loss(teacher, student, labels=given)
    assert float(sharp) == pytest.approx(4 / 2 / 4)
    assert float(wide) == pytest.approx((4 + 4 + 3.61) / 2 / 4)


def test_a_bounding_teacher_judges_a_sample_by_all_its_outputs():
    labels, teacher = np.zeros((1, 2)), np.array([[1.0, 1.0]])
    student = np.array([[2.0, 0.0]])  # better in one of two, worse on the whole: 4 against 2
    value = RegressionDistillation(bound=0.0).compute_loss(teacher, student, labels=labels)
    assert float(value) == pytest.approx((4 + 0) / 2 / 2)


LOSSES = [
    DecoupledDistillation(temperature=2.0),
    MultiLabelDistillation(2.0),
    RegressionDistillation(0.5),
    RegressionDistillation(predicts_variance=True),
]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_weights_and_several_outputs(loss):
    labels, weight = np.array([0, 1, 2, 0]), np.array([0.0, 1.0, 2.0, 0.5], "float32")
    first = outputs(4, 4), outputs(4, 4, seed=1)
    second = outputs(4, 6, seed=2), outputs(4, 6, seed=3)

    def alone(pair, row):
        rows = [side[row : row + 1] for side in pair]
        return float(loss.compute_loss(*rows, labels=labels[row : row + 1]))

    expected = sum(weight[row] * (alone(first, row) + alone(second, row)) for row in range(4)) / 4
    value = loss.compute_loss(
        {"a": first[0], "b": second[0]},
        {"a": first[1], "b": second[1]},
        sample_weight=weight,
        labels={"a": labels, "b": labels},
    )
    assert float(value) == pytest.approx(expected, rel=1e-4)
    assert float(loss.compute_loss(first[0], first[0], labels=labels)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("loss", [*LOSSES, RegressionDistillation(2.0, bound=0.1)], ids=str)
def test_round_trips_through_its_config(loss):
    config = keras.saving.serialize_keras_object(loss)
    assert keras.saving.deserialize_keras_object(config) == loss


def test_too_many_labels_are_refused():
    with pytest.raises(ValueError, match=r"labels must be one for all.*3 for 1 outputs"):
        DecoupledDistillation().compute_loss(
            outputs(2, 3), outputs(2, 3), labels=[np.array([0, 1])] * 3
        )


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "match"),
    [
        (DecoupledDistillation, {"alpha": -1}, ValueError, "alpha"),
        (DecoupledDistillation, {"beta": "8"}, TypeError, "beta"),
        (DecoupledDistillation, {"temperature": 0}, ValueError, "temperature"),
        (MultiLabelDistillation, {"temperature": 0.0}, ValueError, "temperature"),
        (RegressionDistillation, {"sigma": 0.0}, ValueError, "sigma"),
        (RegressionDistillation, {"bound": -1}, ValueError, "bound"),
        (RegressionDistillation, {"predicts_variance": 1}, TypeError, "predicts_variance"),
        (
            RegressionDistillation,
            {"predicts_variance": True, "bound": 0.1},
            ValueError,
            "Leave out one",
        ),
        (RegressionDistillation, {"sigma": 2.0, "predicts_variance": True}, ValueError, "effect"),
    ],
)
def test_arguments_are_checked(kind, arguments, error, match):
    with pytest.raises(error, match=match):
        kind(**arguments)


def model(units, activation=None):
    return keras.Sequential([keras.Input((3,)), layers.Dense(units, activation)], name="net")


def test_models_are_checked():
    fine = model(2)
    for loss, activation in (
        (DecoupledDistillation(), "softmax"),
        (MultiLabelDistillation(), "sigmoid"),
    ):
        with pytest.raises(ValueError, match=f"student 'net' ends in {activation}"):
            loss.validate_model_compatibility(fine, model(2, activation))
        loss.validate_model_compatibility(fine, fine)
    with pytest.raises(ValueError, match=r"teacher 'net' has an output.*MultiLabelDistillation"):
        DecoupledDistillation().validate_model_compatibility(model(1), model(1))
    MultiLabelDistillation().validate_model_compatibility(model(1), model(1))
    with pytest.raises(ValueError, match=r"as many log variances.*student 'net'.*\(None, 3\)"):
        RegressionDistillation(predicts_variance=True).validate_model_compatibility(fine, model(3))
    RegressionDistillation().validate_model_compatibility(fine, model(3))
