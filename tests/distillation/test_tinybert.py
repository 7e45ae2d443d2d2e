"""TinyBERT: what is compared with what, and both stages on tiny models."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from tfaccel.architectures.bert import BERT
from tfaccel.core.artifacts import load_model
from tfaccel.distillation.distiller import Distiller
from tfaccel.distillation.tinybert import (
    distill_general,
    distill_task,
    take_projections,
    with_encoder_weights,
)
from tfaccel.distillation.transformer_losses import (
    AttentionScoresLoss,
    HiddenStateLoss,
    layer_map,
    tinybert_losses,
)

LENGTH, VOCABULARY = 6, 20


def bert(depth, width, classes=None, heads=2, seed=0, length=LENGTH):
    return BERT(
        VOCABULARY,
        length,
        depth=depth,
        width=width,
        heads=heads,
        feed_forward=8,
        classes=classes,
        dropout=0.0,
        seed=seed,
    )


def shaken(model, seed=0):
    random = np.random.default_rng(seed)
    model.set_weights([0.5 * random.normal(size=w.shape) for w in model.get_weights()])
    return model


def tokens(batch=32, seed=0):
    ids = np.random.default_rng(seed).integers(4, VOCABULARY, (batch, LENGTH)).astype("int32")
    ids[::2, 4:] = 0
    return ids


def untrained(teacher, student):
    return Distiller(teacher, student, alpha=0.0, losses=tinybert_losses(teacher, student))


def features(model, names, ids):
    inside = keras.Model(model.input, [model.get_layer(name).output for name in names])
    return [np.asarray(value, "float64") for value in keras.tree.flatten(inside(ids))]


def test_layer_map_of_the_paper():
    assert layer_map(4, 12) == (3, 6, 9, 12)  # section 4.1: g(m) = 3 m
    assert layer_map(6, 12) == (2, 4, 6, 8, 10, 12)
    assert layer_map(3, 3) == (1, 2, 3)


@given(student=st.integers(1, 20), times=st.integers(1, 10))
def test_layer_map_is_even_and_ends_with_the_last(student, times):
    found = layer_map(student, student * times)
    assert len(found) == student
    assert found[-1] == student * times
    assert set(np.diff((0, *found))) == {times}


def test_what_is_compared_with_what():
    losses = tinybert_losses(bert(6, 8), bert(2, 4))
    pairs = [(type(loss), loss.teacher_layer_name, loss.student_layer_name) for loss in losses]
    assert pairs == [
        (HiddenStateLoss, "embeddings", "embeddings"),
        (AttentionScoresLoss, "block_2_scores", "block_0_scores"),
        (HiddenStateLoss, "block_2_hidden", "block_0_hidden"),
        (AttentionScoresLoss, "block_5_scores", "block_1_scores"),
        (HiddenStateLoss, "block_5_hidden", "block_1_hidden"),
    ]
    # W_e is another matrix than W_h, which all blocks share.
    heads = [loss.head_name for loss in losses if isinstance(loss, HiddenStateLoss)]
    assert heads[0] != heads[1] == heads[2]


@pytest.mark.parametrize("weighted", [False, True])
def test_hidden_states_by_hand(weighted):
    random = np.random.default_rng(0)
    teacher, student = random.normal(size=(3, 5, 7)), random.normal(size=(3, 5, 4))
    weights = np.array([0.5, 0.0, 2.0]) if weighted else None
    loss = HiddenStateLoss("a", "b")
    head = loss.make_head((None, 5, 7), (None, 5, 4))
    (projection,) = head.get_weights()
    squares = (student @ projection - teacher) ** 2
    expected = np.mean(squares * (1 if weights is None else weights[:, None, None]))
    found = loss.compute_loss(teacher, student, head=head, sample_weight=weights)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"


def test_attention_scores_by_hand():
    random = np.random.default_rng(0)
    teacher, student = random.normal(size=(2, 3, 4, 5, 5))
    marked = teacher.copy(), student.copy()
    for scores in marked:
        scores[:, :, :, 4] -= 10_000  # as models mark padding
    zeroed = teacher.copy(), student.copy()
    for scores in zeroed:
        scores[:, :, :, 4] = 0
    expected = np.mean((zeroed[0] - zeroed[1]) ** 2)
    loss = AttentionScoresLoss("a", "b")
    assert float(loss.compute_loss(*marked)) == pytest.approx(expected, rel=1e-5)
    assert float(loss.compute_loss(*zeroed)) == pytest.approx(expected, rel=1e-5)
    assert loss.make_head((None, 4, 5, 5), (None, 4, 5, 5)) is None


def test_padding_adds_nothing():
    teacher, student = shaken(bert(2, 8)), shaken(bert(1, 4), 1)
    ids = tokens(4)
    for loss in tinybert_losses(teacher, student):
        taught = features(teacher, [loss.teacher_layer_name], ids)[0]
        learnt = features(student, [loss.student_layer_name], ids)[0]
        head = loss.make_head(taught.shape, learnt.shape)
        options = {} if head is None else {"head": head}
        found = float(loss.compute_loss(taught, learnt, **options))
        if head is not None:
            learnt = learnt @ head.get_weights()[0]
        real = ids != 0
        if learnt.ndim == 4:
            squares = ((taught - learnt) ** 2).transpose(0, 2, 3, 1)
            real = real[:, :, None] & real[:, None, :]
        else:
            squares = (taught - learnt) ** 2
        assert 0 < real.mean() < 1
        expected = squares[real].sum() / squares.size
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", [HiddenStateLoss("a", "b", "c"), AttentionScoresLoss("a", "b")])
def test_losses_survive_their_config(loss):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert again == loss


def test_general_stage_teaches_the_inside(tmp_path):
    teacher, student = shaken(bert(2, 8)), bert(1, 4, seed=1)
    ids = tokens(64)
    before = [w.copy() for w in teacher.get_weights()]
    general = distill_general(
        teacher,
        student,
        ids,
        epochs=25,
        batch_size=16,
        learning_rate=0.02,
        seed=0,
        jit_compile=False,
    )
    assert general.student is student
    history = general.history.history["distillation_loss"]
    assert history[-1] < 0.6 * history[0]
    for one, other in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)

    # The reported loss is the paper's sum, with the projections as they are now.
    losses = tinybert_losses(teacher, student)
    embedding, hidden = (head.get_weights()[0] for head in general.heads)
    taught, learnt = (
        features(model, [f"{name}" for name in names], ids)
        for model, names in (
            (teacher, [loss.teacher_layer_name for loss in losses]),
            (student, [loss.student_layer_name for loss in losses]),
        )
    )
    projections = [embedding, np.eye(LENGTH), hidden]
    expected = sum(
        np.mean((mine @ projection - theirs) ** 2)
        for theirs, mine, projection in zip(taught, learnt, projections, strict=True)
    )
    found = general.evaluate(ids, verbose=0, return_dict=True)["distillation_loss"]
    assert found == pytest.approx(expected, rel=1e-4)
    general.save(tmp_path / "general.keras")
    loaded = load_model(tmp_path / "general.keras")
    np.testing.assert_array_equal(loaded.heads[1].get_weights()[0], hidden)


def test_task_stage_teaches_the_inside_and_then_the_logits():
    teacher, student = shaken(bert(2, 8, classes=3)), bert(1, 4, classes=3, seed=1)
    ids = tokens(64)
    first = [w.copy() for w in student.get_layer("logits").get_weights()]
    options = {"batch_size": 16, "learning_rate": 0.02, "seed": 0, "jit_compile": False}
    general = untrained(bert(2, 8), bert(1, 4))

    inside = tinybert_losses(teacher, student)[-1]
    names = [inside.teacher_layer_name], [inside.student_layer_name]

    def explained():
        """Share of the teacher's last hidden states that a linear map of the student's leaves."""
        theirs = features(teacher, names[0], ids)[0].reshape(-1, 8)
        mine = features(student, names[1], ids)[0].reshape(-1, 4)
        rest = theirs - mine @ np.linalg.lstsq(mine, theirs, rcond=None)[0]
        return (rest**2).sum() / (theirs**2).sum()

    before = explained()
    distilled = distill_task(
        teacher,
        student,
        ids,
        intermediate_epochs=20,
        prediction_epochs=0,
        general=general,
        **options,
    )
    assert distilled.student is student
    assert explained() < 0.8 * before
    # Nothing is said about predictions yet.
    for one, other in zip(first, student.get_layer("logits").get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)

    distilled = distill_task(
        teacher,
        student,
        ids,
        intermediate_epochs=0,
        prediction_epochs=15,
        validation_data=(ids, np.argmax(np.asarray(teacher(ids)), axis=-1)),
        **options,
    )
    history = distilled.history.history
    taught, learnt = (np.asarray(model(ids), "float64") for model in (teacher, student))
    probabilities = softmax(taught, axis=-1)
    entropies = (log_softmax(taught, axis=-1) - log_softmax(learnt, axis=-1)) * probabilities
    assert history["val_distillation_loss"][-1] == pytest.approx(entropies.sum(-1).mean(), rel=1e-3)
    assert history["distillation_loss"][-1] < 0.7 * history["distillation_loss"][0]
    agreement = np.mean(np.argmax(taught, -1) == np.argmax(learnt, -1))
    assert history["val_accuracy"][-1] == pytest.approx(agreement)


def test_projections_are_taken_over_or_refused():
    ids = tokens(8)
    one, other = (untrained(bert(1, 8), bert(1, 4)) for _ in range(2))
    assert (one.heads[0].get_weights()[0] != other.heads[0].get_weights()[0]).any()
    take_projections(other, one)
    for new, old in zip(other.heads, one.heads, strict=True):
        np.testing.assert_array_equal(new.get_weights()[0], old.get_weights()[0])
    with pytest.raises(ValueError, match=r"\(4, 8\).*\(2, 8\)"):
        distill_task(
            bert(1, 8, classes=2), bert(1, 2, classes=2), ids, general=one, jit_compile=False
        )


def test_a_classifier_takes_the_weights_of_an_encoder():
    classifier, encoder = bert(2, 8, classes=3), shaken(bert(2, 8, seed=5))
    before = [w.copy() for w in classifier.get_weights()]
    new = with_encoder_weights(classifier, encoder)
    ids = tokens(4)
    body = keras.Model(new.input, new.get_layer("block_1_hidden").output)
    np.testing.assert_array_equal(body(ids), encoder(ids))
    np.testing.assert_array_equal(
        new.get_layer("logits").get_weights()[0], classifier.get_layer("logits").get_weights()[0]
    )
    for one, other in zip(before, classifier.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: layer_map(4, 6), r"\[1, 2, 3, 6\]"),
        (lambda: layer_map(0, 6), "student_depth must be above 0"),
        (lambda: tinybert_losses(bert(2, 8, heads=4), bert(2, 8)), "as many heads"),
        (lambda: tinybert_losses(bert(2, 8), bert(2, 8, length=5)), "same length"),
        (
            lambda: tinybert_losses(keras.Sequential([keras.Input((3,))]), bert(2, 8)),
            "teacher 'sequential.*no layers 'embeddings'",
        ),
        (lambda: distill_general(bert(2, 8, classes=2), bert(1, 4), tokens()), "hidden states"),
        (lambda: distill_general(bert(2, 8), bert(1, 4), tokens(), epochs=0), "epochs"),
        (
            lambda: distill_task(
                bert(2, 8, 2),
                bert(1, 4, 2),
                tokens(),
                intermediate_epochs=0,
                prediction_epochs=0,
            ),
            "epochs are 0",
        ),
        (lambda: distill_task(bert(2, 8, 2), bert(1, 4, 2), tokens(), alpha=0.5), "labels"),
        (lambda: with_encoder_weights(bert(1, 8, 2), bert(2, 8)), "no such layer"),
        (lambda: with_encoder_weights(bert(2, 4, 2), bert(2, 8)), r"\(20, 8\).*\(20, 4\)"),
        (
            lambda: AttentionScoresLoss().compute_loss(
                np.ones((1, 2, 3, 3)), np.ones((1, 4, 3, 3))
            ),
            "teacher's heads",
        ),
    ],
)
def test_errors(call, told):
    with pytest.raises(ValueError, match=told):
        call()
