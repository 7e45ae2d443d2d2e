import keras
import numpy as np
import pytest

from tfaccel.core.transforms import transformed_layers
from tfaccel.measurement import count
from tfaccel.pruning import selection_for
from tfaccel.pruning.patterns import NofM
from tfaccel.quantization import is_quantization_aware
from tfaccel.recipes.data import load_data
from tfaccel.recipes.schema import AugmentSettings, DataSettings, Stage, TrainSettings
from tfaccel.recipes.stages import Task, make_optimizer, run_stage

MOBILE = {"architecture": "mobile", "arguments": {"stem": 4, "blocks": [[2, 8, 2]], "last": 8}}


@pytest.fixture(scope="module")
def data():
    return load_data(DataSettings(name="digits", limit=96))


def task(data, **changes):
    return Task(data, 32, 0, AugmentSettings(), **changes)


@pytest.fixture(scope="module")
def student(data):
    stage = Stage(name="s", train={**MOBILE, "epochs": 1})
    return run_stage(stage, task(data))


def test_training_is_decided_by_the_seed(data, student):
    stage = Stage(name="s", train={**MOBILE, "epochs": 1})
    again = run_stage(stage, task(data))
    other = run_stage(stage, Task(data, 32, 1, AugmentSettings()))

    for first, second in zip(student.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)
    assert not np.allclose(student.get_weights()[0], other.get_weights()[0], atol=1e-3)


def test_epochs_are_reported_with_their_figures(data):
    heard = []
    stage = Stage(name="s", train={**MOBILE, "epochs": 2})
    run_stage(stage, task(data, on_epoch=lambda epoch, figures: heard.append((epoch, figures))))

    assert [epoch for epoch, _ in heard] == [1, 2]
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= set(heard[0][1])


def test_training_learns():
    settings = {"architecture": "cnn", "arguments": {"filters": [16]}, "learning_rate": 0.01}
    heard = []
    run_stage(
        Stage(name="s", train={**settings, "epochs": 3}),
        task(load_data("digits"), on_epoch=lambda _, figures: heard.append(figures)),
    )

    assert heard[-1]["val_accuracy"] > 0.8  # guessing gives 0.1


def test_a_student_is_distilled(data, student):
    stage = Stage(name="d", distill={**MOBILE, "teacher": "s", "epochs": 1})
    before = student.get_weights()
    model = run_stage(stage, task(data, inputs={"teacher": student}))

    assert isinstance(model, keras.Model)
    assert model.name == "mobile"
    for kept, now in zip(before, student.get_weights(), strict=True):
        np.testing.assert_array_equal(kept, now)


def test_pruning_reaches_its_sparsity(data, student):
    stage = Stage(name="p", prune={"model": "s", "sparsity": 0.75, "epochs": 2})
    model = run_stage(stage, task(data, inputs={"model": student}))

    pruned = {layer.name: layer for layer in transformed_layers(model)}
    chosen = [choice.layer.name for choice in selection_for(student) if choice.chosen]
    assert chosen
    assert set(chosen) == set(pruned)
    for layer in pruned.values():
        ((_, mask),) = layer.transforms
        zeros = keras.ops.convert_to_numpy(mask.state["mask"]) == 0
        assert zeros.sum() == round(0.75 * zeros.size)


def test_a_pattern_reaches_the_rewrite(data, student):
    settings = {"model": "s", "sparsity": 0.5, "epochs": 1, "pattern": "2:4"}
    model = run_stage(Stage(name="p", prune=settings), task(data, inputs={"model": student}))
    patterns = {mask.pattern for layer in transformed_layers(model) for _, mask in layer.transforms}
    assert patterns == {NofM(2, 4)}


def test_channels_are_taken_out(data, student):
    settings = {"model": "s", "keep": 0.6, "epochs": 1, "multiple_of": 1, "teacher": "s"}
    stage = Stage(name="c", prune_channels=settings)
    assert stage.inputs == {"model": "s", "teacher": "s"}
    model = run_stage(stage, task(data, inputs={"model": student, "teacher": student}))
    assert count(model).macs <= 0.6 * count(student).macs
    assert not transformed_layers(model)


def test_a_teacher_helps_while_masks_move(data, student):
    """With alpha 0 the labels count for nothing: only a teacher can have moved the weights."""
    settings = {"model": "s", "sparsity": 0.5, "epochs": 1, "teacher": "s", "alpha": 0.0}
    stage = Stage(name="p", prune=settings)
    heard = []
    model = run_stage(
        stage,
        task(
            data,
            inputs={"model": student, "teacher": student},
            on_epoch=lambda _, figures: heard.append(figures),
        ),
    )

    assert stage.inputs == {"model": "s", "teacher": "s"}
    assert heard[0]["distillation_loss"] > 0
    assert all(
        (mask.last_step > 0) for layer in transformed_layers(model) for _, mask in layer.transforms
    )


def test_include_and_exclude_reach_the_rewrite(data, student):
    stage = Stage(name="p", prune={"model": "s", "sparsity": 0.5, "epochs": 1, "include": ["last"]})
    model = run_stage(stage, task(data, inputs={"model": student}))

    assert [layer.name for layer in transformed_layers(model)] == ["last"]


def test_quantization_aware_training_keeps_the_masks(data, student):
    prune = Stage(name="p", prune={"model": "s", "sparsity": 0.5, "epochs": 1})
    pruned = run_stage(prune, task(data, inputs={"model": student}))
    stage = Stage(name="q", quantize_aware={"model": "p", "epochs": 1})
    model = run_stage(stage, task(data, inputs={"model": pruned}))

    assert is_quantization_aware(model)
    last = next(layer for layer in transformed_layers(model) if layer.name == "last")
    assert [type(t).__name__ for _, t in last.transforms] == ["PruningMask", "FakeQuantizeWeights"]
    ((_, value),) = last.transformed()
    kernel = keras.ops.convert_to_numpy(value)
    assert (kernel == 0).mean() >= 0.5


def test_the_learning_rate_falls_to_zero():
    settings = TrainSettings(architecture="cnn", epochs=1, learning_rate=0.01)
    rate = make_optimizer(settings, 100)._learning_rate

    assert float(rate(0)) == pytest.approx(0.01)
    assert float(rate(50)) == pytest.approx(0.005)  # half way down a cosine
    assert float(rate(100)) == pytest.approx(0, abs=1e-9)
    constant = make_optimizer(settings.model_copy(update={"decay": "none"}), 100)
    assert float(constant.learning_rate) == pytest.approx(0.01)
