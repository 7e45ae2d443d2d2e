"""Attention maps against numpy and by hand."""

import keras
import numpy as np
import pytest

from tests.distillation.test_hints import feature, pooled
from tfaccel.distillation.attention_transfer import AttentionTransfer


def expected(teacher, student, power):
    rows = []
    for x in (teacher, student):
        flat = (np.abs(x.astype("float64")) ** power).mean(axis=-1).reshape(len(x), -1)
        rows.append(flat / np.linalg.norm(flat, axis=1, keepdims=True))
    return np.square(rows[0] - rows[1]).sum(axis=1)


@pytest.mark.parametrize(
    ("teacher", "student", "sizes"),
    [
        ((4, 6, 6, 7), (4, 6, 6, 3), (6, 6)),
        ((4, 6, 6, 7), (4, 3, 3, 3), (3, 3)),
        ((4, 3, 4, 7), (4, 7, 7, 3), (3, 4)),
        ((4, 9, 7), (4, 6, 3), (6,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("power", [1.0, 2.0, 4])
def test_equals_numpy(teacher, student, sizes, power):
    teacher, student = feature(*teacher), feature(*student, seed=1)
    value = AttentionTransfer(power=power).compute_loss(teacher, student)
    each = expected(pooled(teacher, *sizes), pooled(student, *sizes), power)
    assert float(value) == pytest.approx(each.mean(), rel=1e-4)


def test_by_hand():
    # Maps (3² + 4²) / 2 : 0 and 1 : 1, of length one (1, 0) and (√½, √½).
    teacher, student = np.array([[[3.0, 4.0], [0.0, 0.0]]]), np.array([[[2.0], [-2.0]]])
    value = AttentionTransfer().compute_loss(teacher, student)
    assert float(value) == pytest.approx((1 - 0.5**0.5) ** 2 + 0.5, rel=1e-6)


def test_neither_channels_nor_scale_nor_sign_matter():
    teacher = feature(4, 5, 5, 2)
    student = np.concatenate([teacher, -teacher], axis=-1) * np.array([1, 5, 0.1, 9]).reshape(
        -1, 1, 1, 1
    )
    assert float(AttentionTransfer().compute_loss(teacher, student)) == pytest.approx(0, abs=1e-6)


def test_sample_weights_weigh_the_samples():
    teacher, student = feature(4, 5, 5, 2), feature(4, 5, 5, 3, seed=1)
    weight = np.array([0.0, 1.0, 2.0, 0.5], "float32")
    value = AttentionTransfer().compute_loss(teacher, student, sample_weight=weight)
    assert float(value) == pytest.approx((expected(teacher, student, 2) * weight).mean(), rel=1e-4)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_dead_features_give_no_nan(power):
    import tensorflow as tf

    student = np.maximum(feature(3, 4, 4, 2), 0)
    student[0] = 0
    student = tf.Variable(student)
    with tf.GradientTape() as tape:
        loss = AttentionTransfer(power=power).compute_loss(feature(3, 4, 4, 2, seed=1), student)
    gradient = tape.gradient(loss, student).numpy()
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0
    assert np.isfinite(float(loss))


def test_the_gradient_is_that_of_differences():
    import tensorflow as tf

    loss, teacher = AttentionTransfer(), feature(2, 3, 3, 2)
    student, step = feature(2, 3, 3, 2, seed=1), feature(2, 3, 3, 2, seed=2)
    variable = tf.Variable(student)
    with tf.GradientTape() as tape:
        value = loss.compute_loss(teacher, variable)
    slope = float(tf.reduce_sum(tape.gradient(value, variable) * step))
    ends = [expected(teacher, student + sign * 1e-4 * step, 2).mean() for sign in (1, -1)]
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-2)


def test_vectors_have_no_attention():
    with pytest.raises(ValueError, match="before pooling"):
        AttentionTransfer().compute_loss(feature(4, 3), feature(4, 3))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="power"):
        AttentionTransfer(power=0)
    with pytest.raises(ValueError, match="resize must be one of"):
        AttentionTransfer(resize="nearest")


def test_round_trips_through_its_config():
    loss = AttentionTransfer("a", "b", power=1.5)
    config = keras.saving.serialize_keras_object(loss)
    assert keras.saving.deserialize_keras_object(config) == loss
