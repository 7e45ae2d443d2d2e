"""Every layer, loss, schedule, optimizer and callback."""

import json

import keras
import numpy as np
import pytest

from tests.contracts.tables import (
    CALLBACKS,
    LAYERS,
    LOSSES,
    OPTIMIZERS,
    SCHEDULES,
    convolutional,
    distiller,
    make_data,
    prune,
    sequential,
    update_pruning,
)
from tfaccel.core.artifacts import load_model

each_jit = pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])


def each(table):
    return pytest.mark.parametrize("part", table.values(), ids=table)


def fit(model, *, optimizer=None, callbacks=(), jit=False, steps=1, epochs=2):
    model.compile(
        optimizer or keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=jit,
        steps_per_execution=steps,
    )
    x, y = make_data()
    return model.fit(
        x,
        y,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
        validation_data=(x, y),
    ).history


@each({**LAYERS, **LOSSES, **SCHEDULES})
def test_round_trips_through_its_config(part):
    made = part.make()
    stored = json.loads(json.dumps(keras.saving.serialize_keras_object(made)))
    again = keras.saving.deserialize_keras_object(stored)
    assert type(again) is type(made)
    assert json.dumps(again.get_config()) == json.dumps(made.get_config())


@pytest.mark.one_in(2)
@each_jit
@each(LAYERS)
def test_layer_trains_and_survives_save_and_load(part, jit, tmp_path):
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, name="conv")(inputs)
    x = keras.layers.Flatten()(part.make()(x))
    model = keras.Model(inputs, keras.layers.Dense(4)(x))
    losses = fit(model, jit=jit, epochs=5)["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    images = make_data(8)[0]
    loaded = load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(np.asarray(loaded(images)), np.asarray(model(images)))


@pytest.mark.one_in(2)
@each(LOSSES)
def test_distillation_loss_is_zero_for_equals_and_teaches(part):
    same = keras.ops.convert_to_tensor(np.random.default_rng(0).normal(size=(5, 4)), "float32")
    assert abs(float(part.make().compute_loss(same, same, **part.options))) < 1e-6
    history = imitate(part, jit=False)
    assert history["loss"][-1] < history["loss"][0]


def test_distillation_loss_teaches_compiled_by_xla():
    history = imitate(LOSSES["LogitDistillation"], jit=True)
    assert history["loss"][-1] < history["loss"][0]


def imitate(part, *, jit):
    teacher, student = convolutional(), sequential()
    model = type(distiller(student))(teacher, student, alpha=0.0, losses=part.make())
    return fit(model, jit=jit, epochs=5)


@each(OPTIMIZERS)
def test_optimizer_with_one_worker_is_the_plain_one(part, tmp_path):
    ours, plain = convolutional(), convolutional()
    assert fit(ours, optimizer=part.make())["loss"] == fit(plain)["loss"]
    for mine, theirs in zip(ours.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    ours.save(tmp_path / "ours.keras")
    stored = keras.saving.load_model(tmp_path / "ours.keras").optimizer
    assert type(stored) is keras.optimizers.Adam
    assert int(stored.iterations) == 8


@each(CALLBACKS)
def test_callback_with_one_worker_changes_nothing(part):
    ours, plain = convolutional(), convolutional()
    history = fit(ours, callbacks=[part.make()], steps=2)
    assert history == fit(plain, steps=2)


@each_jit
def test_distiller_trains_a_pruned_student_and_gives_plain_keras(jit, tmp_path):
    import tfaccel

    model = distiller(prune(sequential()))
    history = fit(model, callbacks=update_pruning(), jit=jit, epochs=4)
    assert history["loss"][-1] < history["loss"][0]
    plain = tfaccel.strip(model.student)
    kernel = np.asarray(plain.get_layer("hidden").kernel)
    assert (kernel == 0).sum() == kernel.size // 2
    model.student.save(tmp_path / "student.keras")
    images = make_data(8)[0]
    loaded = load_model(tmp_path / "student.keras")
    np.testing.assert_array_equal(np.asarray(loaded(images)), np.asarray(model.student(images)))
