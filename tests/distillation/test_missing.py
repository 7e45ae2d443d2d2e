"""Losses and metrics with missing labels give what they give for the labelled samples alone."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from tfaccel.distillation.missing import skip_missing

losses, metrics = keras.losses, keras.metrics
SIZE, CLASSES, TIME = 6, 3, 4


def ids(*shape):
    return np.random.default_rng(1).integers(0, CLASSES, shape)


def normal(*shape, seed=2):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def one_hot(*shape):
    return np.eye(CLASSES, dtype="float32")[ids(*shape)]


def probabilities(*shape):
    return expit(normal(*shape))


CASES = {
    "ids": (
        losses.SparseCategoricalCrossentropy(from_logits=True),
        ids(SIZE),
        normal(SIZE, CLASSES),
    ),
    "ids in a column": (
        losses.SparseCategoricalCrossentropy(from_logits=True),
        ids(SIZE, 1),
        normal(SIZE, CLASSES),
    ),
    "one-hot": (
        losses.CategoricalCrossentropy(from_logits=True),
        one_hot(SIZE),
        normal(SIZE, CLASSES),
    ),
    "one-hot integers": (
        losses.CategoricalCrossentropy(from_logits=True),
        one_hot(SIZE).astype("int32"),
        normal(SIZE, CLASSES),
    ),
    "numbers": (losses.MeanSquaredError(), normal(SIZE), normal(SIZE, 1, seed=3)),
    "double numbers": (losses.Huber(), normal(SIZE, 2).astype("float64"), normal(SIZE, 2, seed=3)),
    "yes or no": (losses.BinaryCrossentropy(), ids(SIZE, 1) % 2, probabilities(SIZE, 1)),
    "signs": (losses.Hinge(), 2.0 * (ids(SIZE, 1) % 2) - 1, normal(SIZE, 1)),
    "shares": (losses.MeanAbsolutePercentageError(), normal(SIZE, 1), normal(SIZE, 1, seed=3)),
    "divergence": (losses.KLDivergence(), probabilities(SIZE, 3), probabilities(SIZE, 3)[::-1]),
}


def with_gaps(labels, missing):
    labels = labels.copy()
    labels[missing] = np.nan if labels.dtype.kind == "f" else -1
    return labels


def alone(loss, labels, outputs):
    """The values that a loss gives each sample, without weights or reduction."""
    return np.asarray(loss.call(keras.ops.cast(labels, "float32"), outputs), "float64")


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=20)
@given(missing=st.lists(st.booleans(), min_size=SIZE, max_size=SIZE), weighted=st.booleans())
def test_a_loss_is_of_the_labelled_samples(name, missing, weighted):
    loss, labels, outputs = CASES[name]
    present = ~np.array(missing)
    weights = np.arange(1.0, SIZE + 1) if weighted else np.ones(SIZE)
    sum_ = (alone(loss, labels, outputs) * weights)[present].sum()
    expected = {
        "sum": sum_,
        "sum_over_batch_size": sum_ / SIZE,
        "mean_with_sample_weight": sum_ / weights[present].sum() if any(present) else 0.0,
    }
    for reduction, value in expected.items():
        wrapped = skip_missing(
            type(loss).from_config({**loss.get_config(), "reduction": reduction})
        )
        found = wrapped(with_gaps(labels, missing), outputs, weights if weighted else None)
        assert float(found) == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_without_reduction_missing_labels_give_zeros():
    loss, labels, outputs = CASES["numbers"]
    missing = np.arange(SIZE) % 2 == 0
    wrapped = skip_missing(losses.MeanSquaredError(reduction="none"))
    expected = np.where(missing, 0.0, alone(loss, labels, outputs))
    np.testing.assert_allclose(wrapped(with_gaps(labels, missing), outputs), expected, rtol=1e-6)


def test_tokens_are_missing_one_by_one():
    labels, outputs = ids(2, TIME), normal(2, TIME, CLASSES)
    missing = np.array([[True, False, False, True], [False, True, True, True]])
    loss = losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    expected = alone(loss, labels, outputs)
    per_sample = np.array([1.0, 10.0])
    found = skip_missing(loss)(with_gaps(labels, missing), outputs, per_sample)
    wanted = (expected * per_sample[:, None])[~missing].sum()
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_a_label_with_a_gap_is_missing_unless_it_is_elementwise():
    labels = np.array([[1.0, np.nan], [0.0, 1.0], [np.nan, np.nan]], "float32")
    p = probabilities(3, 2)
    entropy = -np.where(labels == 1, np.log(p), np.log(1 - p))
    loss = losses.BinaryCrossentropy(reduction="sum")
    assert float(skip_missing(loss)(labels, p)) == pytest.approx(entropy[1].mean(), rel=1e-5)
    found = skip_missing(loss, elementwise=True)(labels, p, np.array([1.0, 2.0, 4.0]))
    assert float(found) == pytest.approx(entropy[0, 0] + 2 * entropy[1].sum(), rel=1e-5)
    batch = skip_missing(losses.BinaryCrossentropy(), elementwise=True)(labels, p)
    assert float(batch) == pytest.approx((entropy[0, 0] + entropy[1].sum()) / 6, rel=1e-5)


def test_unsigned_and_bool_labels_are_never_missing():
    outputs = probabilities(2, 1)
    for labels in (np.array([[255], [1]], "uint8"), np.array([[True], [False]])):
        loss = losses.MeanAbsoluteError()
        expected = np.abs(labels.astype("float32") - outputs).mean()
        assert float(skip_missing(loss)(labels, outputs)) == pytest.approx(expected, rel=1e-5)


def test_a_loss_in_bfloat16_stays_in_it():
    loss = skip_missing(losses.MeanSquaredError(dtype="bfloat16"))
    found = loss(np.array([[1.0], [np.nan]], "float32"), np.array([[3.0], [5.0]], "float32"))
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    assert float(found) == 2.0


@pytest.mark.parametrize("jit", [False, True])
def test_a_step_on_gaps_is_a_step_on_the_rest(jit):
    # 1/x in the label would be infinite, 0/0 would be NaN: nothing of a gap may reach a weight.
    x, y = normal(8, 5), normal(8, 1, seed=4)
    missing = np.arange(8) % 3 != 0
    trained = []
    for rows, labels in ((np.arange(8), with_gaps(y, missing)), (np.flatnonzero(~missing), y)):
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1)])
        model.set_weights([normal(5, 1, seed=5), np.zeros(1)])
        loss = losses.MeanAbsolutePercentageError(reduction="mean_with_sample_weight")
        metric = skip_missing(metrics.MeanAbsoluteError("error"))
        model.compile("sgd", skip_missing(loss), metrics=[metric], jit_compile=jit)
        found = model.train_on_batch(x[rows], labels[rows], return_dict=True)
        trained.append((*model.get_weights(), found["loss"], found["error"]))
    for one, other in zip(*trained, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_a_batch_without_labels_moves_nothing():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(CLASSES)])
    before = [w.copy() for w in model.get_weights()]
    loss = skip_missing(losses.SparseCategoricalCrossentropy(from_logits=True))
    model.compile("sgd", loss)
    assert model.train_on_batch(normal(4, 5), -np.ones(4, int)) == 0
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


METRICS = {
    "accuracy of ids": (metrics.SparseCategoricalAccuracy, ids(SIZE), normal(SIZE, CLASSES)),
    "accuracy in a column": (metrics.SparseCategoricalAccuracy, ids(SIZE, 1), normal(SIZE, 3)),
    "accuracy of one-hot": (metrics.CategoricalAccuracy, one_hot(SIZE), normal(SIZE, CLASSES)),
    "binary": (metrics.BinaryAccuracy, ids(SIZE, 1) % 2, probabilities(SIZE, 1)),
    "error": (metrics.RootMeanSquaredError, normal(SIZE, 1), normal(SIZE, 1, seed=3)),
    "area": (metrics.AUC, ids(SIZE, 1) % 2, probabilities(SIZE, 1)),
    "f1": (metrics.F1Score, one_hot(SIZE), probabilities(SIZE, CLASSES)),
    "r2": (metrics.R2Score, normal(SIZE, 1), normal(SIZE, 1, seed=3)),
    "tokens": (metrics.SparseCategoricalAccuracy, ids(2, TIME), normal(2, TIME, CLASSES)),
}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_of_the_labelled_samples(name):
    make, labels, outputs = METRICS[name]
    missing = np.zeros(labels.shape[: outputs.ndim - 1], bool)
    missing.flat[[1, 3]] = True
    metric, plain = skip_missing(make(name="mine")), make(name="mine")
    assert metric.name == "mine"
    metric.update_state(with_gaps(labels, missing), outputs)
    plain.update_state(labels[~missing], outputs[~missing])
    np.testing.assert_allclose(metric.result(), plain.result(), rtol=1e-5)
    metric.reset_state()
    assert all((np.asarray(v) == 0).all() for v in metric.variables)
    assert len(metric.variables) == len(plain.variables)


def test_metrics_weigh_samples_too_and_entries_by_themselves():
    labels = np.array([[1.0, np.nan], [0.0, 1.0]], "float32")
    outputs = np.array([[0.0, 9.0], [2.0, 4.0]], "float32")
    metric = skip_missing(metrics.MeanAbsoluteError(), elementwise=True)
    metric.update_state(labels, outputs, np.array([1.0, 3.0]))
    assert float(metric.result()) == pytest.approx((1 * 1 + 3 * 2 + 3 * 3) / 7)


def test_both_survive_their_configuration():
    loss = losses.BinaryCrossentropy(label_smoothing=0.5, reduction="sum", name="mine")
    part = skip_missing(loss, elementwise=True)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(part))
    assert (again.name, again.reduction, again.elementwise) == ("mine", "sum", True)
    y, p = np.array([[1.0, np.nan]]), np.array([[0.9, 0.5]])
    smooth = -0.75 * np.log(0.9) - 0.25 * np.log(0.1)  # of the label 0.5 · 1 + 0.5 / 2
    assert float(again(y, p)) == pytest.approx(smooth, rel=1e-5)
    metric = skip_missing(metrics.TopKCategoricalAccuracy(k=2, name="top2"))
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(metric))
    assert (again.name, again.metric.get_config()["k"], again.elementwise) == ("top2", 2, False)


def test_skipping_twice_is_skipping_once():
    for part in (losses.MeanSquaredError(), metrics.MeanSquaredError()):
        once = skip_missing(part)
        assert skip_missing(once) is once


class Numberless(metrics.Metric):
    def update_state(self, y_true, y_pred):
        """Knows no weights."""


class WholeLoss(losses.Loss):
    def __call__(self, y_true, y_pred, sample_weight=None):
        return keras.ops.mean(y_pred)


def test_what_cannot_leave_samples_out_is_refused():
    with pytest.raises(
        TypeError, match=r"instance of a Keras loss or metric.*rather than its name"
    ):
        skip_missing("mse")
    with pytest.raises(TypeError, match="takes no sample weights"):
        skip_missing(Numberless(name="numberless"))
    with pytest.raises(TypeError, match=r"WholeLoss defines __call__\(\) too"):
        skip_missing(WholeLoss())
    with pytest.raises(ValueError, match="A loss of a whole batch cannot leave samples out"):
        skip_missing(losses.Dice())(one_hot(4), probabilities(4, CLASSES))
    with pytest.raises(ValueError, match=r"elementwise=True.*labels of the outputs' shape"):
        skip_missing(losses.MeanSquaredError(), elementwise=True)(ids(4), normal(4, 1))
