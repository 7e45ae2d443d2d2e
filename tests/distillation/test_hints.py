"""Hints against numpy, for features of every kind and unequal shapes."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tfaccel.distillation.distiller import Distiller
from tfaccel.distillation.feature_math import equal_positions, pooling_matrix
from tfaccel.distillation.hints import HintLoss
from tfaccel.distillation.losses import LogitDistillation


def feature(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def pooled(x, *sizes):
    """Adaptive average pooling, one window after the other."""
    for axis, size in enumerate(sizes, start=1):
        n = x.shape[axis]
        windows = [(i * n // size, int(np.ceil((i + 1) * n / size))) for i in range(size)]
        x = np.stack(
            [np.take(x, range(*window), axis=axis).mean(axis=axis) for window in windows], axis=axis
        )
    return x


def value_of(loss, teacher, student, **options):
    head = loss.make_head((None, *teacher.shape[1:]), (None, *student.shape[1:]))
    return head, float(loss.compute_loss(teacher, student, head=head, **options))


@pytest.mark.parametrize(
    ("teacher", "student", "sizes"),
    [
        ((4, 4, 4, 7), (4, 8, 8, 3), (4, 4)),  # the student's resolution is twice the teacher's
        ((4, 8, 6, 7), (4, 4, 3, 3), (4, 3)),
        ((4, 5, 8, 7), (4, 8, 5, 3), (5, 5)),  # each axis by itself, sizes that do not divide
        ((4, 6, 7), (4, 4, 3), (4,)),
        ((4, 7), (4, 3), ()),
    ],
    ids=str,
)
def test_unequal_shapes_equal_numpy(teacher, student, sizes):
    teacher, student = feature(*teacher), feature(*student, seed=1)
    head, value = value_of(HintLoss(), teacher, student)
    kernel, bias = (np.asarray(weight) for weight in head.get_weights())
    predicted = pooled(student, *sizes) @ kernel + bias
    assert value == pytest.approx(np.square(pooled(teacher, *sizes) - predicted).mean(), rel=1e-4)


@given(size=st.integers(1, 20), wanted=st.integers(1, 20))
@settings(max_examples=40)
def test_pooling_equals_keras(size, wanted):
    wanted = min(size, wanted)
    x = feature(2, size, 3)
    ours = np.einsum("bnc,mn->bmc", x, pooling_matrix(size, wanted))
    theirs = layers.AdaptiveAveragePooling1D(wanted, data_format="channels_last")(x)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_bilinear_interpolates_a_ramp_exactly():
    # Inside, the mean of a ramp under a symmetric kernel is its value at the centre.
    ramp = np.arange(16, dtype="float32")[None, :, None]
    teacher = np.zeros((1, 8, 1), "float32")
    _, student = equal_positions(keras.ops.array(teacher), keras.ops.array(ramp), "bilinear")
    inner = np.asarray(student)[0, 1:-1, 0]
    np.testing.assert_allclose(inner, np.arange(16).reshape(8, 2).mean(axis=1)[1:-1], rtol=1e-5)
    image = np.broadcast_to(ramp[:, :, None], (1, 16, 16, 1))
    _, student = equal_positions(keras.ops.zeros((1, 8, 4, 1)), keras.ops.array(image), "bilinear")
    assert tuple(student.shape) == (1, 8, 4, 1)
    np.testing.assert_allclose(np.asarray(student)[0, 1:-1, 2, 0], inner, rtol=1e-5)


@pytest.mark.parametrize("regressor", ["auto", None])
def test_equal_channels_need_no_regressor(regressor):
    teacher, student = feature(4, 6, 5), feature(4, 3, 5, seed=1)
    head, value = value_of(HintLoss(regressor=regressor), teacher, student)
    assert head is None
    assert value == pytest.approx(np.square(pooled(teacher, 3) - student).mean(), rel=1e-5)


@pytest.mark.parametrize("positions", [(), (6,), (6, 5)])
def test_a_regressor_can_be_asked_for(positions):
    shape = (None, *positions, 3)
    kernels = {"linear": (3, 3), "conv": (*[3] * len(positions), 3, 3)}
    for regressor, kernel in kernels.items():
        if regressor == "conv" and not positions:
            continue
        head = HintLoss(regressor=regressor).make_head(shape, shape)
        assert tuple(head.kernel.shape) == kernel
        assert head(np.zeros((2, *positions, 3))).shape == (2, *positions, 3)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_sample_weights_weigh_the_samples(shape):
    teacher, student = feature(4, 3, 3, 2), feature(4, 3, 3, 2, seed=1)
    weight = feature(*shape, seed=2) ** 2
    _, value = value_of(HintLoss(), teacher, student, sample_weight=weight)
    each = np.square(teacher - student).mean(axis=(1, 2, 3))
    assert value == pytest.approx((each * weight.reshape(-1)).mean(), rel=1e-4)


def test_weights_of_steps_weigh_the_steps():
    teacher, student = feature(4, 5, 2), feature(4, 5, 2, seed=1)
    weight = np.random.default_rng(2).integers(0, 2, (4, 5)).astype("float32")
    _, value = value_of(HintLoss(), teacher, student, sample_weight=weight)
    each = np.square(teacher - student).mean(axis=2)
    assert value == pytest.approx((each * weight).mean(), rel=1e-4)


def test_half_precision_is_computed_in_float32():
    teacher, student = (300 * feature(4, 5, seed=seed).astype("float16") for seed in (0, 1))
    value = HintLoss().compute_loss(teacher, student)
    assert keras.backend.standardize_dtype(value.dtype) == "float32"
    exact = np.square(teacher.astype("float64") - student.astype("float64")).mean()
    assert float(value) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(
    ("teacher", "student", "match"),
    [
        ((None, 4, 4, 3), (None, 16, 3), "same number of axes.*pair_layers"),
        ((None,), (None,), "same number of axes"),
        ((None, 4, None), (None, 4, 3), "known numbers of channels"),
        ([(None, 4), (None, 2)], (None, 4), "one tensor"),
        ({"a": (None, 4)}, (None, 4), "one tensor"),
    ],
    ids=str,
)
def test_shapes_that_cannot_be_compared_are_refused(teacher, student, match):
    with pytest.raises(ValueError, match=match):
        HintLoss().make_head(teacher, student)


def test_missing_regressors_are_refused():
    with pytest.raises(ValueError, match='regressor="auto"'):
        HintLoss(regressor=None).make_head((None, 4), (None, 3))
    with pytest.raises(ValueError, match='Take "linear"'):
        HintLoss(regressor="conv").make_head((None, 4), (None, 4))
    with pytest.raises(ValueError, match="make_head"):
        HintLoss().compute_loss(feature(2, 4), feature(2, 3))


@pytest.mark.parametrize("name", ["regressor", "resize"])
def test_arguments_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        HintLoss(**{name: "cubic"})


def test_round_trips_through_its_config():
    for loss in (HintLoss("a", "b", regressor="conv", resize="bilinear"), HintLoss(regressor=None)):
        config = keras.saving.serialize_keras_object(loss)
        assert keras.saving.deserialize_keras_object(config) == loss


def net(filters, seed):
    keras.utils.set_random_seed(seed)
    parts = [
        layers.Conv2D(filters, 3, strides=2, padding="same", activation="relu", name="conv"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(3),
    ]
    return keras.Sequential([keras.Input((8, 8, 1)), *parts])


def test_the_regressor_is_trained_with_the_student_and_left_behind():
    teacher, student = net(8, 0), net(3, 1)
    losses = [HintLoss("conv", "conv"), LogitDistillation()]
    distiller = Distiller(teacher, student, alpha=0.0, losses=losses)
    distiller.compile(keras.optimizers.Adam(0.02))
    before = [weight.copy() for weight in distiller.heads[0].get_weights()]
    x = feature(32, 8, 8, 1)
    history = distiller.fit(x, np.zeros(32), epochs=8, verbose=0).history["distillation_loss"]
    assert history[-1] < 0.7 * history[0]
    assert not np.allclose(before[0], distiller.heads[0].get_weights()[0])
    assert distiller.student.count_params() == net(3, 1).count_params()


def test_missing_layers_are_refused_with_names_that_are_close():
    with pytest.raises(ValueError, match=r"student .* no layer 'covn'.*Did you mean 'conv'"):
        Distiller(net(8, 0), net(3, 1), losses=HintLoss("conv", "covn"))
