"""Teachers of several tasks, one student: by hand, in the limit of one task, and interrupted."""

import keras
import numpy as np
import pytest
from keras import layers
from scipy.special import softmax

import tfaccel
from tfaccel.distillation import Distiller, LogitDistillation
from tfaccel.distillation.ensembles import ensemble
from tfaccel.distillation.for_output import ForOutput
from tfaccel.distillation.logit_losses import RegressionDistillation
from tfaccel.distillation.missing import skip_missing
from tfaccel.distillation.multitask import MultiTaskDistiller, join_teachers
from tfaccel.distillation.task_data import TaskBatches, merge_tasks

FEATURES = 4


def cross_entropy():
    return skip_missing(keras.losses.SparseCategoricalCrossentropy(from_logits=True))


def accuracy():
    return skip_missing(keras.metrics.SparseCategoricalAccuracy("accuracy"))


def teacher_of(units, seed, name="teacher", width=FEATURES):
    keras.utils.set_random_seed(seed)
    deep = [layers.Dense(8, activation="relu"), layers.BatchNormalization(), layers.Dropout(0.5)]
    return keras.Sequential([keras.Input((width,)), *deep, layers.Dense(units)], name=name)


def linear(seed=0, **units):
    keras.utils.set_random_seed(seed)
    x = keras.Input((FEATURES,))
    outputs = {task: layers.Dense(n, use_bias=False, name=task)(x) for task, n in units.items()}
    return keras.Model(x, outputs, name="student")


def deep(seed=0, dropout=0.3, **units):
    keras.utils.set_random_seed(seed)
    x = keras.Input((FEATURES,))
    h = layers.Dropout(dropout, seed=seed)(layers.Dense(6, activation="relu")(x))
    return keras.Model(x, {task: layers.Dense(n, name=task)(h) for task, n in units.items()})


def inputs(size, seed=1):
    return np.random.default_rng(seed).normal(size=(size, FEATURES)).astype("float32")


def kernels(model):
    return {task: model.get_layer(task).get_weights()[0].astype("float64") for task in model.output}


def test_joined_teachers_say_what_each_says(tmp_path):
    teachers = {"a": teacher_of(3, 0), "b": teacher_of(2, 1)}  # of the same name
    weights = {task: teacher.get_weights() for task, teacher in teachers.items()}
    names = [layer.name for layer in teachers["a"].layers]
    several = ensemble([teacher_of(3, 2), teacher_of(3, 3)])
    both = linear(seed=4, d=2, e=5)
    other = linear(seed=5, f=2, g=5)
    pair = keras.Model(other.input, [other.output["f"], other.output["g"]], name="pair")
    joined = join_teachers({**teachers, "c": several, ("e", "d"): both, ("f", "g"): pair})
    x = inputs(5)
    said = joined.predict(x, verbose=0)
    expected = {task: model.predict(x, verbose=0) for task, model in teachers.items()}
    expected["c"] = several.predict(x, verbose=0)
    expected |= both.predict(x, verbose=0)
    expected |= other.predict(x, verbose=0)
    assert list(said) == ["a", "b", "c", "e", "d", "f", "g"]
    for task, values in said.items():
        np.testing.assert_array_equal(values, expected[task], err_msg=task)
    # Shared, neither copied nor changed.
    assert any(v is teachers["a"].weights[0] for v in joined.weights)
    assert [layer.name for layer in teachers["a"].layers] == names
    assert teachers["a"].name == teachers["b"].name == "teacher"
    for task, teacher in teachers.items():
        for one, other in zip(weights[task], teacher.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
    joined.save(tmp_path / "joined.keras")
    again = tfaccel.load_model(tmp_path / "joined.keras").predict(x, verbose=0)
    np.testing.assert_array_equal(again["b"], said["b"])


def test_joined_teachers_take_dicts_of_inputs():
    def net(units):
        x = {"ids": keras.Input((2,), name="ids", dtype="int32"), "n": keras.Input((1,), name="n")}
        both = layers.Concatenate()([layers.Rescaling(1.0)(x["ids"]), x["n"]])
        return keras.Model(x, layers.Dense(units)(both))

    first, second = net(2), net(3)
    x = {"ids": np.array([[1, 2]]), "n": np.array([[0.5]])}
    said = join_teachers({"a": first, "b": second})(x)
    np.testing.assert_array_equal(said["b"], second(x))


def test_teachers_that_do_not_go_together_are_refused():
    one = teacher_of(2, 0)
    with pytest.raises(ValueError, match="got none"):
        join_teachers({})
    with pytest.raises(TypeError, match=r"join_teachers\(\) needs a keras.Model"):
        join_teachers({"a": "teacher.keras"})
    with pytest.raises(TypeError, match="teachers must be Mapping"):
        join_teachers([one])
    with pytest.raises(ValueError, match=r"'teacher' takes \(4,\) float32 and 'wide' takes \(5,\)"):
        join_teachers({"a": one, "b": teacher_of(2, 0, "wide", width=5)})
    with pytest.raises(ValueError, match=r"'a' got two.*ensemble"):
        join_teachers({"a": one, ("a",): one})
    with pytest.raises(ValueError, match=r"of \('a', 'b'\) needs an output for each.*has 1"):
        join_teachers({("a", "b"): one})
    with pytest.raises(ValueError, match=r"has \['c', 'd'\]"):
        join_teachers({"a": linear(c=2, d=3)})


@pytest.mark.parametrize("jit", [False, True])
def test_annealed_steps_are_cross_entropy_with_mixed_targets(jit):
    """BAM, eq. 2: target = λ y + (1 - λ) teacher; a task without teacher has y, a gap no y."""
    steps, rate, size = 4, 0.5, 8
    student = linear(a=3, b=2, c=2)
    teachers = {"a": linear(seed=5, a=3), "b": linear(seed=6, b=2)}
    taught = {task: kernels(model)[task] for task, model in teachers.items()}
    expected = kernels(student)
    random = np.random.default_rng(0)
    y = {task: random.integers(-1, n, (steps, size)) for task, n in (("a", 3), ("b", 2), ("c", 2))}
    x = inputs(steps * size).reshape(steps, size, FEATURES)
    for step in range(steps):
        blend = step / steps
        for task, kernel in expected.items():
            labels = y[task][step]
            target = np.eye(kernel.shape[1])[labels] * (labels >= 0)[:, None]
            p = softmax(x[step] @ kernel, axis=-1)
            gradient = p * (labels >= 0)[:, None] - target
            if task in taught:
                soft = p - softmax(x[step] @ taught[task], axis=-1)
                gradient = blend * gradient + (1 - blend) * soft
            expected[task] = kernel - rate * x[step].T @ gradient / size
    distiller = MultiTaskDistiller(
        teachers, student, annealing_steps=steps, temperature=1.0, losses={"c": cross_entropy()}
    )
    loss = {task: cross_entropy() for task in y}
    distiller.compile(keras.optimizers.SGD(rate), loss, jit_compile=jit)
    labels = {task: values.reshape(-1) for task, values in y.items()}
    distiller.fit(x.reshape(-1, FEATURES), labels, batch_size=size, shuffle=False, verbose=0)
    for task, kernel in kernels(student).items():
        np.testing.assert_allclose(kernel, expected[task], rtol=1e-4, atol=1e-5, err_msg=task)


def test_one_task_is_the_distiller_to_the_last_digit():
    teacher, x = teacher_of(3, 0), inputs(32)
    y = np.random.default_rng(0).integers(0, 3, 32)
    plain_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    options = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}

    tasks = deep(seed=2, a=3)
    alone = keras.models.clone_model(tasks)
    alone.set_weights(tasks.get_weights())
    alone = keras.Model(alone.input, alone.output["a"])
    many = MultiTaskDistiller({"a": teacher}, tasks, alpha=0.3, temperature=2.0)
    many.compile("adam", {"a": plain_loss}, metrics={"a": ["accuracy"]})
    one = Distiller(teacher, alone, alpha=0.3, temperature=2.0)
    one.compile("adam", plain_loss, metrics=["accuracy"])
    found = many.fit(x, {"a": y}, **options).history
    expected = one.fit(x, y, **options).history
    for key in ("loss", "student_loss", "distillation_loss"):
        assert found[key] == expected[key]
    assert found["accuracy"] == expected["accuracy"]
    for mine, other in zip(tasks.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_mixed_target_of_numbers_is_two_squares():
    # λ (y - s)² + (1 - λ)(t - s)² has the gradient of (λ y + (1 - λ) t - s)².
    student, teacher = linear(n=2), linear(seed=3, n=2)
    x, y = inputs(8), np.random.default_rng(2).normal(size=(8, 2)).astype("float32")
    before, taught = kernels(student)["n"], kernels(teacher)["n"]
    error = x @ before - (0.25 * y + 0.75 * (x @ taught))
    expected = before - 0.1 * x.T @ (2 * error) / error.size
    loss = RegressionDistillation(sigma=0.5**0.5)
    distiller = MultiTaskDistiller({"n": teacher}, student, alpha=0.25, losses={"n": loss})
    distiller.compile(keras.optimizers.SGD(0.1), {"n": "mse"})
    distiller.train_on_batch(x, {"n": y})
    np.testing.assert_allclose(kernels(student)["n"], expected, rtol=1e-4, atol=1e-6)


def test_each_task_has_its_weight_and_its_samples():
    student = linear(a=3, b=2)
    teachers = {"a": linear(seed=5, a=3), "b": linear(seed=6, b=2)}
    x, labels = inputs(6), np.array([0, -1, 1, -1, -1, -1])
    expected = kernels(student)
    for task, weight in (("a", 2.0), ("b", 1.0)):
        soft = softmax(x @ expected[task], axis=-1)
        soft = soft - softmax(x @ kernels(teachers[task])[task], axis=-1)
        present = labels >= 0 if task == "a" else np.ones(6, bool)
        step = weight * x.T @ (soft * present[:, None]) / 6
        expected[task] = expected[task] - 0.5 * step
    distiller = MultiTaskDistiller(
        teachers,
        student,
        alpha=0.0,
        temperature=1.0,
        loss_weights={"a": 2.0},
        only_labelled=True,
    )
    distiller.compile(keras.optimizers.SGD(0.5))
    distiller.train_on_batch(x, {"a": labels, "b": np.zeros(6, int)})
    for task, kernel in kernels(student).items():
        np.testing.assert_allclose(kernel, expected[task], rtol=1e-4, atol=1e-6)


def test_teachers_alone_need_no_labels():
    teacher = linear(seed=5, a=3, b=2)
    student = linear(b=2, a=3)  # in another order
    distiller = MultiTaskDistiller({("a", "b"): teacher}, student, alpha=0.0)
    distiller.compile(keras.optimizers.Adam(0.1))
    distiller.fit(inputs(64), epochs=40, verbose=0)
    x = inputs(16, seed=9)
    for task, said in teacher.predict(x, verbose=0).items():
        found = student.predict(x, verbose=0)[task]
        np.testing.assert_allclose(softmax(found, -1), softmax(said, -1), atol=0.05)


def test_training_goes_on_where_it_was_saved(tmp_path):
    teachers = {"a": teacher_of(3, 0), "b": teacher_of(2, 1)}
    random = np.random.default_rng(0)
    x, y = merge_tasks(
        {"a": (inputs(20), random.integers(0, 3, 20)), "b": (inputs(12), random.integers(0, 2, 12))}
    )
    options = {"batch_size": 8, "shuffle": False, "verbose": 0}

    def made():
        student = deep(seed=2, dropout=0.0, a=3, b=2, c=2)
        distiller = MultiTaskDistiller(
            teachers, student, annealing_steps=8, losses={"c": cross_entropy()}
        )
        tasks = ("a", "b", "c")
        loss = {task: cross_entropy() for task in tasks}
        distiller.compile("adam", loss, metrics={task: [accuracy()] for task in tasks})
        return distiller

    y["c"] = np.full(32, -1)
    y["c"][::3] = 1
    whole, half = made(), made()
    expected = whole.fit(x, y, epochs=2, **options).history
    half.fit(x, y, epochs=1, **options)
    half.save(tmp_path / "half.keras")
    again = tfaccel.load_model(tmp_path / "half.keras", compile=True)
    assert type(again) is MultiTaskDistiller
    with pytest.raises(ValueError, match="no teacher"):
        again.fit(x, y, **options)
    again.teacher = teachers
    found = again.fit(x, y, epochs=1, **options).history
    for key, values in found.items():
        assert values[0] == pytest.approx(expected[key][1], rel=1e-5), key
    for one, other in zip(whole.student.get_weights(), again.student.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert {"a_accuracy", "b_accuracy", "c_accuracy"} <= set(found)
    again.student.save(tmp_path / "student.keras")  # a plain Keras model
    said = keras.saving.load_model(tmp_path / "student.keras").predict(x, verbose=0)
    np.testing.assert_array_equal(said["b"], again.predict(x, verbose=0)["b"])


def test_two_data_sets_make_a_student_of_both():
    # Neither data set says anything of the other's task.
    x, other = inputs(300), inputs(300, seed=7)
    data = {"sign": (x, (x[:, 0] > 0).astype(int)), "side": (other, (other[:, 1] > 0).astype(int))}
    teachers = {}
    for task, (rows, labels) in data.items():
        teachers[task] = linear(**{task: 2})
        teachers[task].compile(keras.optimizers.Adam(0.1), {task: cross_entropy()})
        teachers[task].fit(rows, {task: labels}, epochs=3, verbose=0)
    student = deep(seed=1, dropout=0.0, sign=2, side=2)
    batches = TaskBatches(data, batch_size=20, one_task=True)
    distiller = MultiTaskDistiller(
        teachers, student, temperature=1.0, annealing_steps=5 * len(batches)
    )
    distiller.compile(
        keras.optimizers.Adam(0.03),
        {task: cross_entropy() for task in data},
        metrics={task: [accuracy()] for task in data},
    )
    distiller.fit(batches, epochs=5, verbose=0)
    found = distiller.evaluate(*merge_tasks(data), verbose=0, return_dict=True)
    assert found["sign_accuracy"] > 0.9
    assert found["side_accuracy"] > 0.9


class Stored:
    """What teachers said, as it comes with the data."""

    name = "stored"

    def __init__(self):
        self.output_shapes = {"final_output": {"a": (None, 3), "b": (None, 2)}}


def test_stored_outputs_stand_for_the_teachers():
    teachers, x = {"a": teacher_of(3, 0), "b": teacher_of(2, 1)}, inputs(8)
    y = {"a": np.arange(8) % 3, "b": np.arange(8) % 2}
    found = []
    said = join_teachers(teachers).predict(x, verbose=0)
    stored = {"inputs": x, "teacher_outputs": said}
    for teacher, batch in ((teachers, x), (Stored(), stored)):
        student = linear(seed=3, a=3, b=2)
        distiller = MultiTaskDistiller(teacher, student, alpha=0.5)
        distiller.compile("sgd", {task: cross_entropy() for task in "ab"})
        distiller.train_on_batch(batch, y)
        found.append(kernels(student))
    for task in "ab":
        np.testing.assert_allclose(found[0][task], found[1][task], rtol=1e-5)


def test_a_plain_distiller_does_it_too():
    teacher, student = linear(seed=5, a=3), linear(a=3, b=2)
    losses = [ForOutput("a", LogitDistillation(1.0))]
    distiller = Distiller(teacher, student, losses=losses, alpha=0.5)
    distiller.compile("sgd", {task: cross_entropy() for task in "ab"})
    y = {"a": np.array([0, -1]), "b": np.array([-1, 1])}
    assert np.isfinite(distiller.train_on_batch(inputs(2), y)).all()


def test_what_does_not_fit_is_refused():
    teachers, student = {"a": linear(a=3), "b": linear(b=2)}, linear(a=3, b=2, c=2)
    with pytest.raises(ValueError, match=r"task 'c' has no teacher.*the Keras loss"):
        MultiTaskDistiller(teachers, student)
    with pytest.raises(ValueError, match=r"teachers of 'b', but the student 'student' has.*'a'"):
        MultiTaskDistiller(teachers, linear(a=3))
    with pytest.raises(ValueError, match="student 'teacher' needs a dict of outputs by task"):
        MultiTaskDistiller(teachers, teacher_of(3, 0))
    with pytest.raises(ValueError, match=r"same output shapes.*\(None, 3\).*\(None, 4\)"):
        MultiTaskDistiller(teachers, linear(a=4, b=2))
    with pytest.raises(ValueError, match=r"alpha=0.5 was given too"):
        MultiTaskDistiller(teachers, student, alpha=0.5, annealing_steps=3)
    with pytest.raises(ValueError, match="annealing_steps must be above 0"):
        MultiTaskDistiller(teachers, student, annealing_steps=0)
    with pytest.raises(ValueError, match="losses has 'd', but the tasks are 'a', 'b', 'c'"):
        MultiTaskDistiller(teachers, student, losses={"d": LogitDistillation()})
    with pytest.raises(TypeError, match="loss_weights must be Mapping"):
        MultiTaskDistiller(teachers, linear(a=3, b=2), loss_weights=[1.0, 2.0])
    with pytest.raises(TypeError, match="loss must be DistillationLoss"):
        MultiTaskDistiller(teachers, linear(a=3, b=2), losses={"a": keras.losses.Huber()})
    every = {task: LogitDistillation() for task in "ab"}
    with pytest.raises(ValueError, match=r"temperature=2.0 is for the default loss"):
        MultiTaskDistiller(teachers, linear(a=3, b=2), losses=every, temperature=2.0)
    with pytest.raises(TypeError, match="teachers must be Mapping or Model or StoredTeacher"):
        MultiTaskDistiller([linear(a=3)], linear(a=3))
