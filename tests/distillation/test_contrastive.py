"""Contrastive distillation against loops over anchors, and what its memory keeps."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from tests.distillation.test_hints import feature
from tfaccel.distillation.contrastive import ContrastiveRepresentation
from tfaccel.distillation.contrastive_memory import ContrastiveHead
from tfaccel.distillation.distiller import Distiller

SAMPLES, DRAWS, BATCH = 20, 30, 6
TEACHER, STUDENT = feature(BATCH, 7), feature(BATCH, 5, seed=1)
INDEX = np.array([3, 0, 19, 7, 8, 11])


def remembering(**options):
    options = {"samples": SAMPLES, "draws": DRAWS, "dimensions": 4, "seed": 3, **options}
    return ContrastiveRepresentation(**options)


def head_of(loss):
    return loss.make_head((None, 7), (None, 5))


def embeddings(head, teacher=TEACHER, student=STUDENT):
    """Both sides of length 1, in float64."""
    sides = []
    for x, layer in ((teacher, head.teacher_embedding), (student, head.student_embedding)):
        kernel, bias = (np.asarray(weight, "float64") for weight in layer.get_weights())
        vectors = x @ kernel + bias
        sides.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return sides


def memories(head):
    return [np.asarray(head.memory(side), "float64") for side in ("teacher", "student")]


def expected(loss, head, drawn, constants=None, classes=None, known=None):
    """Each anchor's loss as the paper writes it, and the constants Z of both sides."""
    embedded, remembered, n, k = embeddings(head), memories(head), SAMPLES, len(drawn)
    terms, found = np.zeros(BATCH), []
    for anchors, memory in ((embedded[1], remembered[0]), (embedded[0], remembered[1])):
        match = np.exp((anchors * memory[INDEX]).sum(axis=1) / loss.temperature)
        scores = np.exp(anchors @ memory[drawn].T / loss.temperature)
        z = n * np.concatenate([match[:, None], scores], axis=1).mean()
        found.append(z)
        z = z if constants is None else constants[len(found) - 1]
        for i in range(BATCH):
            fits = [
                column
                for column, sample in enumerate(drawn)
                if sample != INDEX[i] and (classes is None or known[sample] != classes[i])
            ]
            p, others = match[i] / z, scores[i, fits] / z
            terms[i] -= np.log(p / (p + k / n))
            if fits:
                terms[i] -= k * np.log((k / n) / (others + k / n)).mean()
    return terms, found


def compute(loss, head, **options):
    return float(loss.compute_loss(TEACHER, STUDENT, head=head, sample_index=INDEX, **options))


def test_memory_loss_equals_loops_and_z_stays():
    loss = remembering()
    head, twin = head_of(loss), head_of(loss)  # the twin draws the same
    head.set_weights(twin.get_weights())
    drawn = np.asarray(twin.draw(DRAWS))
    terms, constants = expected(loss, head, drawn)
    assert compute(loss, head) == pytest.approx(terms.mean(), rel=1e-4)
    # By now the memory is another, the constants are not.
    drawn = np.asarray(twin.draw(DRAWS))
    terms, others = expected(loss, head, drawn, constants)
    assert not np.allclose(others, constants, rtol=1e-2)
    weight = np.array([0, 1, 2, 0.5, 1, 1], "float32")
    assert compute(loss, head, sample_weight=weight) == pytest.approx(
        (terms * weight).mean(), rel=1e-4
    )


@pytest.mark.parametrize("one_hot", [False, True])
def test_remembered_samples_of_the_anchors_class_are_no_negatives(one_hot):
    loss = remembering()
    head, twin = head_of(loss), head_of(loss)
    known = np.arange(SAMPLES) % 3
    known[[1, 2]] = -1  # not seen yet
    head.classes.assign(known)
    classes = np.array([0, 1, 2, 0, 1, 2])
    drawn = np.asarray(twin.draw(DRAWS))
    terms, _ = expected(loss, head, drawn, classes=classes, known=known)
    labels = np.eye(3)[classes] if one_hot else classes
    assert compute(loss, head, labels=labels) == pytest.approx(terms.mean(), rel=1e-4)
    known[INDEX] = classes
    np.testing.assert_array_equal(head.classes, known)


def test_labels_that_are_no_classes_can_be_left_out():
    loss = remembering(same_class=True)
    head, twin = head_of(loss), head_of(loss)
    terms, _ = expected(loss, head, np.asarray(twin.draw(DRAWS)))
    value = compute(loss, head, labels=feature(BATCH, 2, 2))
    assert value == pytest.approx(terms.mean(), rel=1e-4)
    assert (np.asarray(head.classes) == -1).all()


def test_without_negatives_only_the_match_counts():
    loss, ones = remembering(), np.ones(SAMPLES, "int32")
    head, twin = head_of(loss), head_of(loss)
    head.classes.assign(ones)
    drawn = np.asarray(twin.draw(DRAWS))
    terms, _ = expected(loss, head, drawn, classes=ones[:BATCH], known=ones)
    assert compute(loss, head, labels=ones[:BATCH]) == pytest.approx(terms.mean(), rel=1e-4)


def test_the_memory_moves_by_its_momentum_in_training_alone():
    loss = remembering(momentum=0.8)
    head = head_of(loss)
    before, fresh = memories(head), embeddings(head)
    compute(loss, head, training=False)
    for old, new in zip(before, memories(head), strict=True):
        np.testing.assert_array_equal(old, new)
    compute(loss, head)
    for old, new, embedded in zip(before, memories(head), fresh, strict=True):
        moved = 0.8 * old[INDEX] + 0.2 * embedded
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        np.testing.assert_allclose(new[INDEX], moved, rtol=1e-4, atol=1e-6)
        rest = np.setdiff1d(np.arange(SAMPLES), INDEX)
        np.testing.assert_array_equal(new[rest], old[rest])


def test_evaluation_compares_the_samples_own_embeddings():
    loss = remembering(draws=2000)
    head = head_of(loss)
    head.set_weights(
        [np.zeros_like(w) if w.shape == (SAMPLES, 4) else w for w in head.get_weights()]
    )
    value = float(loss.compute_loss(TEACHER, STUDENT, head=head, training=False))
    # Memories of 0 score 0, exp(0) = 1: with Z = n · mean, all negatives have p = 1 / Z.
    teacher, student = embeddings(head)
    match = np.exp((teacher * student).sum(axis=1) / loss.temperature)
    z = SAMPLES * (match.sum() + 2000 * BATCH) / (2001 * BATCH)
    ratio = 2000 / SAMPLES
    p = match / z
    each = -np.log(p / (p + ratio)) - 2000 * np.log(ratio / (1 / z + ratio))
    assert value == pytest.approx(2 * each.mean(), rel=1e-4)


def test_draws_are_uniform():
    head = head_of(remembering())
    counts = np.bincount(np.asarray(head.draw(20000)), minlength=SAMPLES)
    assert len(counts) == SAMPLES
    assert (np.abs(counts - 1000) < 6 * np.sqrt(950)).all()


@pytest.mark.parametrize("labelled", [False, True])
def test_negatives_of_the_batch_equal_loops(labelled):
    loss = ContrastiveRepresentation(negatives="batch", dimensions=4, temperature=0.2)
    head = head_of(loss)
    teacher, student = embeddings(head)
    classes = np.array([0, 0, 1, 2, 1, 0]) if labelled else np.arange(BATCH)
    each = np.zeros(BATCH)
    for anchors, others in ((student, teacher), (teacher, student)):
        for i in range(BATCH):
            scores = np.exp(anchors[i] @ others.T / 0.2)
            fits = [j for j in range(BATCH) if j == i or classes[j] != classes[i]]
            each[i] -= np.log(scores[i] / scores[fits].sum())
    weight = np.array([0, 1, 2, 0.5, 1, 1], "float32")
    value = loss.compute_loss(
        TEACHER, STUDENT, head=head, labels=classes if labelled else None, sample_weight=weight
    )
    assert float(value) == pytest.approx((each * weight).mean(), rel=1e-4)


def test_feature_maps_are_averaged_first():
    loss = ContrastiveRepresentation(negatives="batch", dimensions=4)
    maps = feature(BATCH, 3, 2, 5, seed=4)
    head = head_of(loss)
    values = [
        float(loss.compute_loss(TEACHER, student, head=head))
        for student in (maps, maps.mean(axis=(1, 2)))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def net(units, seed):
    keras.utils.set_random_seed(seed)
    parts = [layers.Dense(units, activation="relu", name="features"), layers.Dense(3)]
    return keras.Sequential([keras.Input((4,)), *parts])


def data():
    x = feature(32, 4)
    y = x[:, :3].argmax(axis=1)
    return {"inputs": x, "sample_index": np.arange(32)}, y


def distiller(**options):
    loss = ContrastiveRepresentation(
        "features",
        "features",
        **{"samples": 32, "draws": 16, "dimensions": 4, "seed": 5, **options},
    )
    made = Distiller(net(16, 0), net(4, 1), alpha=0.5, losses=loss)
    keras.utils.set_random_seed(2)
    return made


def fit(made, epochs, jit=False):
    if not made.compiled:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        made.compile(keras.optimizers.Adam(0.01), loss, jit_compile=jit)
    return made.fit(*data(), batch_size=12, epochs=epochs, shuffle=False, verbose=0).history


def test_learns_and_resumes_as_if_never_stopped(tmp_path):
    whole, part = distiller(), distiller()
    part.heads[0].set_weights(whole.heads[0].get_weights())
    history = fit(whole, 6)["distillation_loss"]
    assert history[-1] < history[0]
    fit(part, 2)
    part.save(tmp_path / "part.keras")
    resumed = keras.saving.load_model(tmp_path / "part.keras")
    resumed.teacher = net(16, 0)
    fit(resumed, 4)
    for a, b in zip(whole.heads[0].get_weights(), resumed.heads[0].get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(whole.student.get_weights(), resumed.student.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.exhaustive
def test_xla_learns_the_same():
    plain, compiled = distiller(), distiller()
    compiled.heads[0].set_weights(plain.heads[0].get_weights())
    values = [fit(made, 2, jit=jit)["loss"] for made, jit in ((plain, False), (compiled, True))]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-3)
    memory = [made.heads[0].memory("student") for made in (plain, compiled)]
    np.testing.assert_allclose(memory[0], memory[1], atol=1e-3)


ON_JAX = """
import keras, numpy as np
assert keras.backend.backend() == "jax"
from tests.distillation.test_contrastive import distiller, fit, net, data
from tfaccel.distillation import Distiller
from tfaccel.distillation.attention_transfer import AttentionTransfer
from tfaccel.distillation.contrastive import ContrastiveRepresentation
from tfaccel.distillation.hints import HintLoss
from tfaccel.distillation.logit_losses import DecoupledDistillation
from tfaccel.distillation.relational import RelationalDistillation, SimilarityPreserving

at = ("features", "features")
losses = [
    HintLoss(*at), SimilarityPreserving(*at), RelationalDistillation(*at),
    ContrastiveRepresentation(*at, negatives="batch"), DecoupledDistillation(),
    ContrastiveRepresentation(*at, samples=32, draws=16),
]
made = Distiller(net(16, 0), net(4, 1), losses=losses)
before = np.asarray(made.heads[-1].memory("student"))
history = fit(made, 3, jit=True)["distillation_loss"]
assert history[-1] < history[0], history
assert not np.allclose(before, made.heads[-1].memory("student"))
maps = np.random.default_rng(0).normal(size=(3, 6, 6, 2)), np.ones((3, 4, 4, 5))
assert np.isfinite(float(AttentionTransfer().compute_loss(*maps)))
print("done")
"""


@pytest.mark.exhaustive
def test_all_losses_learn_on_jax():
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    run = subprocess.run(
        [sys.executable, "-c", ON_JAX], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "done" in run.stdout


def test_the_head_round_trips_through_its_config():
    head = head_of(remembering())
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(head))
    assert isinstance(twin, ContrastiveHead)
    assert [w.shape for w in twin.get_weights()] == [w.shape for w in head.get_weights()]
    assert twin.get_config() == head.get_config()
    loss = remembering(same_class=True)
    assert keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss)) == loss


def test_what_is_missing_is_said():
    loss = remembering()
    with pytest.raises(ValueError, match="make_head"):
        loss.compute_loss(TEACHER, STUDENT, sample_index=INDEX)
    with pytest.raises(ValueError, match=r'"sample_index": numpy.arange.*negatives="batch"'):
        loss.compute_loss(TEACHER, STUDENT, head=head_of(loss))
    with pytest.raises(ValueError, match="The student's feature must be one tensor"):
        loss.make_head((None, 4), [(None, 4), (None, 4)])
    with pytest.raises(ValueError, match=r"class ids or one-hot.*\(6, 2, 2\)"):
        compute(loss, head_of(loss), labels=feature(BATCH, 2, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, r"samples=len\(x\)"),
        ({"negatives": "batch", "samples": 4}, ValueError, "of the batch none"),
        ({"negatives": "queue"}, ValueError, "negatives must be one of"),
        ({"samples": 1}, ValueError, "samples must be 2 or more"),
        ({"samples": 4, "draws": 0}, ValueError, "draws"),
        ({"samples": 4, "dimensions": 2.0}, TypeError, "dimensions"),
        ({"samples": 4, "temperature": 0.0}, ValueError, "temperature"),
        ({"samples": 4, "momentum": 1.0}, ValueError, "momentum"),
        ({"samples": 4, "seed": "a"}, TypeError, "seed"),
        ({"samples": 4, "same_class": None}, TypeError, "same_class"),
    ],
)
def test_arguments_are_checked(arguments, error, match):
    with pytest.raises(error, match=match):
        ContrastiveRepresentation(**arguments)
