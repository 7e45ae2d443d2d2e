"""Relations of the samples of a batch, against loops over pairs and triplets."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes

from tests.distillation.test_hints import feature
from tfaccel.distillation.relational import RelationalDistillation, SimilarityPreserving

LOSSES = [RelationalDistillation(), SimilarityPreserving()]


def huber(x):
    return 0.5 * x**2 if abs(x) <= 1 else abs(x) - 0.5


def distance_loss(teacher, student, weight):
    sides = []
    pairs = list(itertools.permutations(range(len(teacher)), 2))
    root = [(weight[i] * weight[j]) ** 0.5 for i, j in pairs]
    for side in (teacher, student):
        x = side.reshape(len(side), -1).astype("float64")
        lengths = np.array([np.linalg.norm(x[i] - x[j]) for i, j in pairs])
        sides.append(lengths / np.average(lengths, weights=root))
    each = [huber(a - b) for a, b in zip(*sides, strict=True)]
    return np.dot(each, root) / len(pairs)


def angle_loss(teacher, student, weight, vertices):
    trios = [t for t in itertools.permutations(range(len(teacher)), 3) if t[1] < vertices]
    total = 0.0
    for i, j, k in trios:
        cosines = []
        for side in (teacher, student):
            x = side.reshape(len(side), -1).astype("float64")
            a, b = x[i] - x[j], x[k] - x[j]
            cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        total += huber(cosines[0] - cosines[1]) * (weight[i] * weight[j] * weight[k]) ** (1 / 3)
    return total / len(trios)


@pytest.mark.parametrize("vertices", [None, 4, 128])
@pytest.mark.parametrize("weighted", [False, True])
def test_relational_equals_loops(vertices, weighted):
    teacher, student = feature(7, 3, 2) + 5, 3 * feature(7, 4, seed=1) - 9
    weight = np.array([1, 2, 0, 0.5, 1, 3, 1], "float32") if weighted else None
    loss = RelationalDistillation(distance_weight=25.0, angle_weight=50.0, vertices=vertices)
    value = loss.compute_loss(teacher, student, sample_weight=weight)
    weights = np.ones(7) if weight is None else weight
    expected = 25 * distance_loss(teacher, student, weights)
    expected += 50 * angle_loss(teacher, student, weights, vertices or 7)
    assert float(value) == pytest.approx(expected, rel=1e-3)


@given(seed=st.integers(0, 999), scale=st.floats(0.01, 100))
@settings(max_examples=20)
def test_turning_moving_and_scaling_change_no_relation(seed, scale):
    teacher = feature(6, 4, seed=seed)
    turn = orthogonal_procrustes(feature(5, 4, seed=seed + 1), feature(5, 4, seed=seed + 2))[0]
    student = scale * (teacher @ turn + 3.0)
    value = RelationalDistillation().compute_loss(teacher, student.astype("float32"))
    assert float(value) == pytest.approx(0, abs=1e-5)


def test_distances_by_hand():
    # Distances 1, 1, 2 over 4/3, and 1, 1, 1: differences 1/4, 1/4, 1/2.
    teacher = np.array([[0.0], [1.0], [2.0]])
    student = np.eye(3)
    loss = RelationalDistillation(distance_weight=1.0, angle_weight=0.0)
    by_hand = (2 * 0.25**2 + 0.5**2) / 2 / 3
    assert float(loss.compute_loss(teacher, student)) == pytest.approx(by_hand, rel=1e-5)


def test_angles_by_hand():
    # Cosines 1, -1, 1 on the line, ½ three times in the triangle: 3/2 is on huber's straight part.
    loss = RelationalDistillation(distance_weight=0.0, angle_weight=1.0)
    by_hand = (2 * 0.5**2 / 2 + (1.5 - 0.5)) / 3
    value = loss.compute_loss(np.array([[0.0], [1.0], [2.0]]), np.eye(3))
    assert float(value) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("kind", ["one sample", "two", "all equal", "twins", "dead", "no weight"])
def test_degenerate_batches_give_numbers(loss, kind):
    import tensorflow as tf

    student = {
        "one sample": feature(1, 4),
        "two": feature(2, 4),
        "all equal": np.ones((4, 4), "float32"),
        "twins": np.repeat(feature(2, 4), 2, axis=0),
        "dead": np.zeros((4, 4), "float32"),
        "no weight": feature(4, 4),
    }[kind]
    weight = np.zeros(4, "float32") if kind == "no weight" else None
    teacher, student = feature(len(student), 3, seed=1), tf.Variable(student)
    with tf.GradientTape() as tape:
        value = loss.compute_loss(teacher, student, sample_weight=weight)
    assert np.isfinite(float(value))
    assert np.isfinite(tape.gradient(value, student)).all()
    if kind in ("one sample", "no weight"):
        assert float(value) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_batches_of_unknown_size(loss):
    import tensorflow as tf

    spec = [tf.TensorSpec((None, 3)), tf.TensorSpec((None, 2, 2))]
    compiled = tf.function(loss.compute_loss, input_signature=spec)
    for batch in (5, 3):
        teacher, student = feature(batch, 3), feature(batch, 2, 2, seed=1)
        assert float(compiled(teacher, student)) == pytest.approx(
            float(loss.compute_loss(teacher, student)), rel=1e-4
        )


def similarity(teacher, student):
    rows = []
    for side in (teacher, student):
        x = side.reshape(len(side), -1).astype("float64")
        gram = x @ x.T
        rows.append(gram / np.linalg.norm(gram, axis=1, keepdims=True))
    return np.square(rows[0] - rows[1])


def test_similarities_equal_numpy():
    teacher, student = feature(6, 3, 3, 2), feature(6, 5, seed=1)
    value = SimilarityPreserving().compute_loss(teacher, student)
    assert float(value) == pytest.approx(similarity(teacher, student).sum() / 36, rel=1e-4)


def test_similarities_by_hand():
    # Rows (1, 0), (0, 1) and (1, 1)/√2, (1, 1)/√2: 4 differences of which two are 1 - 1/√2.
    value = SimilarityPreserving().compute_loss(np.eye(2), np.ones((2, 1)))
    assert float(value) == pytest.approx((2 * (1 - 0.5**0.5) ** 2 + 2 * 0.5) / 4, rel=1e-6)


def test_samples_without_weight_are_as_if_not_there():
    teacher, student = feature(6, 3), feature(6, 5, seed=1)
    weight = np.array([1, 0, 1, 1, 0, 1], "float32")
    kept = weight > 0
    for loss, pairs, fewer in (
        (SimilarityPreserving(), 36, 16),
        (RelationalDistillation(angle_weight=0.0), 30, 12),
        (RelationalDistillation(distance_weight=0.0), 120, 24),
    ):
        value = float(loss.compute_loss(teacher, student, sample_weight=weight))
        alone = float(loss.compute_loss(teacher[kept], student[kept]))
        assert value * pairs == pytest.approx(alone * fewer, rel=1e-3)
        twice = loss.compute_loss(teacher, student, sample_weight=2 * weight[:, None])
        assert float(twice) == pytest.approx(2 * value, rel=1e-4)


def test_weights_of_steps_are_refused():
    with pytest.raises(ValueError, match=r"between samples.*\(6, 2\)"):
        SimilarityPreserving().compute_loss(
            feature(6, 2), feature(6, 2), sample_weight=np.ones((6, 2))
        )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"distance_weight": -1}, ValueError, "distance_weight"),
        ({"angle_weight": "2"}, TypeError, "angle_weight"),
        ({"distance_weight": 0, "angle_weight": 0}, ValueError, "both 0"),
        ({"vertices": 0}, ValueError, "vertices"),
        ({"vertices": 2.0}, TypeError, "vertices"),
    ],
)
def test_arguments_are_checked(arguments, error, match):
    with pytest.raises(error, match=match):
        RelationalDistillation(**arguments)


def test_round_trips_through_its_config():
    for loss in (RelationalDistillation("a", "b", angle_weight=3.0), SimilarityPreserving("a")):
        config = keras.saving.serialize_keras_object(loss)
        assert keras.saving.deserialize_keras_object(config) == loss
