"""Chains of teachers: who teaches whom, and what a rerun finds again."""

import functools
import json

import keras
import numpy as np
import pytest
from keras import layers

from tfaccel.distillation import Distiller
from tfaccel.distillation.chains import born_again, distill_chain, propose_assistants

CLASSES = 3


def net(units, seed=0):
    keras.utils.set_random_seed(100 + seed)
    hidden = layers.Dense(units, activation="relu")
    return keras.Sequential([keras.Input((4,)), hidden, layers.Dropout(0.2), layers.Dense(CLASSES)])


def data():
    x = np.random.default_rng(1).normal(size=(24, 4)).astype("float32")
    return x, np.argmax(x[:, :CLASSES], axis=-1)


def fit(distiller, stage):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # A few eager steps take less time than a trace.
    distiller.compile(keras.optimizers.SGD(0.1), loss, run_eagerly=True)
    distiller.fit(*data(), batch_size=8, epochs=2, verbose=0)  # shuffled, with dropout


def accuracy(model):
    x, y = data()
    return float((np.argmax(model(x), -1) == y).mean())


def assert_same_weights(one, other):
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_each_model_is_taught_by_the_one_before():
    teacher, assistants, student = net(9), [net(7), net(5)], net(3)
    before = teacher.get_weights()
    seen = []

    def watched(distiller, stage):
        seen.append((stage, distiller.teacher, distiller.student, distiller.student_loss_weight))
        fit(distiller, stage)

    make = functools.partial(Distiller, alpha=0.1)
    result = distill_chain(teacher, assistants, student, watched, make=make, evaluate=accuracy)
    models = [teacher, *assistants, student]
    names = ["assistant_1", "assistant_2", "student"]
    assert seen == [(names[i], models[i], models[i + 1], 0.1) for i in range(3)]
    assert result.student is student
    assert [stage.model for stage in result.stages] == models[1:]
    assert [stage.parameters for stage in result.stages] == [8 * n + 3 for n in (7, 5, 3)]
    assert [stage.accuracy for stage in result.stages] == [accuracy(m) for m in models[1:]]
    assert not any(stage.resumed for stage in result.stages)
    for old, new in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_chain_is_distillers_one_after_another():
    result = distill_chain(net(9), [net(6)], net(3), fit, seed=5)
    teacher, assistant, student = net(9), net(6), net(3)
    keras.utils.set_random_seed(5)
    fit(Distiller(teacher, assistant), "")
    keras.utils.set_random_seed(6)
    fit(Distiller(assistant, student), "")
    assert_same_weights(result.student, student)


def test_a_rerun_goes_on_after_the_last_finished_model(tmp_path):
    whole = distill_chain(net(9), [net(6)], net(3), fit)
    fitted = []

    def killed(distiller, stage):
        if stage == "student":
            raise KeyboardInterrupt
        fit(distiller, stage)

    def noted(distiller, stage):
        fitted.append(stage)
        fit(distiller, stage)

    with pytest.raises(KeyboardInterrupt):
        distill_chain(net(9), [net(6)], net(3), killed, path=tmp_path / "chain")
    # Models that were built anew, with other weights: those of the file count.
    again = distill_chain(net(9), [net(6, seed=1)], net(3), noted, path=tmp_path / "chain")
    assert fitted == ["student"]
    assert [stage.resumed for stage in again.stages] == [True, False]
    for one, other in zip(whole.stages, again.stages, strict=True):
        assert_same_weights(one.model, other.model)
    student = net(3, seed=4)
    last = distill_chain(
        net(9), [net(6)], student, noted, path=tmp_path / "chain", evaluate=accuracy
    )
    assert fitted == ["student"]
    assert last.student is student
    assert_same_weights(student, whole.student)
    assert last.stages[1].accuracy == accuracy(whole.student)
    record = json.loads((tmp_path / "chain" / "chain.json").read_text())
    assert record["student"]["accuracy"] == last.stages[1].accuracy


def test_what_a_lost_model_taught_is_trained_anew(tmp_path):
    fitted = []

    def noted(distiller, stage):
        fitted.append(stage)
        fit(distiller, stage)

    distill_chain(net(9), [net(6)], net(3), fit, path=tmp_path)
    (tmp_path / "assistant_1.keras").write_bytes(b"cut off")
    # Another start: a student of the old assistant would not be this one's.
    result = distill_chain(net(9), [net(6, seed=8)], net(3), noted, path=tmp_path)
    assert fitted == ["assistant_1", "student"]
    assert not any(stage.resumed for stage in result.stages)
    distill_chain(net(9), [net(6)], net(3), noted, path=tmp_path)
    assert fitted == ["assistant_1", "student"]


@pytest.mark.parametrize(
    ("teacher", "assistant", "seed", "message"),
    [
        (lambda: net(9, seed=1), lambda: net(6), 0, "'assistant_1' .* teacher is another"),
        (lambda: net(9), lambda: net(5), 0, "'assistant_1' .* other shapes"),
        (lambda: net(9), lambda: net(6), 1, "'assistant_1' .* seed is another"),
    ],
)
def test_the_folder_of_another_chain_is_refused(teacher, assistant, seed, message, tmp_path):
    distill_chain(net(9), [net(6)], net(3), fit, path=tmp_path)
    with pytest.raises(ValueError, match=message):
        distill_chain(teacher(), [assistant()], net(3), fit, path=tmp_path, seed=seed)


def test_mistakes_in_chains_are_refused_before_any_work():
    def never(distiller, stage):
        raise AssertionError(stage)

    model = net(3)
    with pytest.raises(ValueError, match="same model comes twice"):
        distill_chain(net(9), [model], model, never)
    with pytest.raises(TypeError, match="distill_chain"):
        distill_chain(net(9), ["assistant.keras"], model, never)
    with pytest.raises(TypeError, match="fit must be a function"):
        distill_chain(net(9), [], model, None)
    with pytest.raises(ValueError, match="generations must be 1 or more"):
        born_again(model, 0, never)
    with pytest.raises(ValueError, match="ensemble needs two"):
        born_again(model, 1, never, ensemble=True)
    with pytest.raises(ValueError, match="Make a new one"):
        born_again(lambda _: model, 1, never, teacher=model)


# 8 parameters for each unit and 3 more.
def test_assistants_by_parameters_are_geometric_steps():
    teacher, student = net(64), net(2)
    built = []

    def build(width):
        built.append(width)
        return net(width)

    widths = [64, 48, 32, 16, 8, 4, 2]
    (one,) = propose_assistants(build, widths, teacher, student)
    assert built == widths
    # sqrt(515 * 19) = 98.9: 131 is off by a factor of 1.32, 67 by 1.48.
    assert (one.width, one.parameters, one.accuracy) == (16, 131, None)
    assert one.target == pytest.approx(np.sqrt(515 * 19))
    two = propose_assistants(build, widths, teacher, student, count=2)
    # Steps of 515 / (515 / 19) ** (1 / 3) = 171.4 and 57.1: 131 and 67 (259 is farther).
    assert [assistant.width for assistant in two] == [16, 8]
    np.testing.assert_allclose([a.target for a in two], [171.44, 57.07], rtol=1e-3)


def test_no_candidate_is_taken_twice():
    found = propose_assistants(net, [8, 9, 10], net(64), net(2), count=3)
    assert [assistant.width for assistant in found] == [10, 9, 8]


def test_assistants_by_accuracy_are_nearest_to_the_mean():
    # Accuracies of the candidates are not in the order of their sizes.
    accuracies = {64: 0.9, 32: 0.88, 16: 0.7, 8: 0.79, 4: 0.65, 2: 0.6}
    asked = []

    def evaluate(model):
        asked.append(model.layers[0].units)
        return accuracies[model.layers[0].units]

    teacher, student = net(64), net(2)
    options = {"by": "accuracy", "evaluate": evaluate}
    (one,) = propose_assistants(net, [32, 16, 8, 4], teacher, student, **options)
    assert (one.width, one.accuracy) == (8, 0.79)  # the mean is 0.75: 0.04 off against 0.05
    assert one.target == pytest.approx(0.75)
    assert sorted(asked) == [2, 4, 8, 16, 32, 64]
    two = propose_assistants(net, [32, 16, 8, 4], teacher, student, 2, **options)
    assert [assistant.width for assistant in two] == [16, 8]  # for 0.7 and 0.8
    assert [assistant.target for assistant in two] == pytest.approx([0.7, 0.8])


@pytest.mark.parametrize(
    ("widths", "teacher", "student", "options", "message"),
    [
        ([8], 4, 16, {}, "Swap them"),
        ([2, 64, 99], 64, 2, {}, "there are 0: the widths give {2: 19, 64: 515, 99: 795}"),
        ([8], 64, 2, {"count": 2}, "2 assistants need"),
        ([8], 64, 2, {"by": "accuracy"}, "needs evaluate="),
        ([8], 64, 2, {"by": "size"}, "'parameters', 'accuracy'"),
    ],
)
def test_proposals_that_cannot_be_made_are_refused(widths, teacher, student, options, message):
    with pytest.raises(ValueError, match=message):
        propose_assistants(net, widths, net(teacher), net(student), **options)


def test_generations_teach_one_another_and_resume(tmp_path):
    original = net(5)
    before = original.get_weights()
    seen = []

    def noted(distiller, stage):
        seen.append((stage, distiller.teacher, distiller.student))
        fit(distiller, stage)

    result = born_again(original, 2, noted, ensemble=True, path=tmp_path)
    zero, one, two = (stage.model for stage in result.stages)
    assert seen == [
        ("generation_0", None, zero),
        ("generation_1", zero, one),
        ("generation_2", one, two),
    ]
    assert np.abs(zero.get_weights()[0] - one.get_weights()[0]).max() > 0.01
    for old, new in zip(before, original.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    x, _ = data()
    expected = np.mean([keras.ops.softmax(m(x)) for m in (one, two)], axis=0)
    found = keras.ops.softmax(result.ensemble(x))
    np.testing.assert_allclose(found, expected, atol=1e-6)

    more = born_again(original, 3, noted, path=tmp_path)
    assert [stage for stage, *_ in seen[3:]] == ["generation_3"]
    assert [stage.resumed for stage in more.stages] == [True, True, True, False]
    assert_same_weights(more.stages[2].model, two)
    assert_same_weights(born_again(net(5), 3, fit).student, more.student)


def test_generations_can_be_built_and_begin_with_a_teacher():
    teacher = net(5)
    asked = []

    def build(generation):
        asked.append(generation)
        return net(5, seed=generation)

    teachers = []

    def noted(distiller, stage):
        teachers.append(distiller.teacher)
        fit(distiller, stage)

    result = born_again(build, 2, noted, teacher=teacher)
    assert asked == [1, 2]
    assert teachers == [teacher, result.stages[0].model]
    assert [stage.name for stage in result.stages] == ["generation_1", "generation_2"]
    assert result.ensemble is None
