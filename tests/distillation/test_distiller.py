"""The Distiller: what it computes, what it leaves untouched, what it saves."""

import io
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from scipy.special import softmax

import tfaccel
from tfaccel.distillation import Distiller, LogitDistillation
from tfaccel.pruning import ConstantSparsity, UpdatePruning, prune

CLASSES = 3


def net(units=8, seed=0, dropout=0.0, regularizer=None):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(units, activation="relu", kernel_regularizer=regularizer, name="hidden"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(dropout, seed=seed, name="dropout"),
            layers.Dense(CLASSES, name="logits"),
        ],
        name=f"net{units}",
    )


def linear(seed):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((6,)), layers.Dense(CLASSES, use_bias=False)])


def data(size=32):
    random = np.random.default_rng(1)
    x = random.normal(size=(size, 6)).astype("float32")
    return x, np.argmax(x[:, :CLASSES], axis=-1)


def hard_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(distiller, optimizer="sgd", **options):
    distiller.compile(optimizer, hard_loss(), metrics=["accuracy"], **options)
    return distiller


def fit(distiller, epochs=1, **options):
    x, y = data()
    options = {"batch_size": 8, "shuffle": False, "verbose": 0, **options}
    return distiller.fit(x, y, epochs=epochs, **options).history


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_one_step_of_sgd_is_the_formulas(alpha, jit):
    teacher, student = linear(0), linear(1)
    x, y = data(16)
    weights = np.random.default_rng(5).random(16)
    rate, temperature = 0.5, 3.0
    taught, raw = (model.get_weights()[0].astype("float64") for model in (teacher, student))

    hard = softmax(x @ raw, axis=-1) - np.eye(CLASSES)[y]
    # d/dz of T² KL(p(t/T) || p(z/T)) is T (p(z/T) - p(t/T)).
    soft = temperature * (
        softmax(x @ raw / temperature, axis=-1) - softmax(x @ taught / temperature, axis=-1)
    )
    per_sample = weights[:, None] * (alpha * hard + (1 - alpha) * soft)
    expected = raw - rate * x.T @ per_sample / len(x)

    distiller = Distiller(teacher, student, alpha=alpha, temperature=temperature)
    compiled(distiller, keras.optimizers.SGD(rate), jit_compile=jit)
    distiller.train_on_batch(x, y, sample_weight=weights)
    np.testing.assert_allclose(student.get_weights()[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(teacher.get_weights()[0], taught)


def test_losses_and_metrics_are_reported_as_they_are():
    teacher, student = net(16), net(4, seed=1)
    x, y = data()
    student.compile(loss=hard_loss(), metrics=["accuracy"])
    alone = student.evaluate(x, y, verbose=0, return_dict=True)
    teacher_logits, student_logits = teacher.predict(x, verbose=0), student.predict(x, verbose=0)
    soft = float(LogitDistillation(4.0).compute_loss(teacher_logits, student_logits))
    distiller = compiled(Distiller(teacher, student, alpha=0.25, temperature=4.0))
    found = distiller.evaluate(x, y, batch_size=5, verbose=0, return_dict=True)
    assert found["student_loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(alone["accuracy"])
    assert found["distillation_loss"] == pytest.approx(soft, rel=1e-5)
    assert found["loss"] == pytest.approx(0.25 * alone["loss"] + 0.75 * soft, rel=1e-5)
    np.testing.assert_array_equal(distiller.predict(x, verbose=0), student_logits)


def test_alpha_1_is_the_student_alone():
    plain, student = net(4, dropout=0.4, regularizer="l2"), net(4, dropout=0.4, regularizer="l2")
    plain.compile("adam", hard_loss())
    x, y = data()
    plain.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    fit(compiled(Distiller(net(16), student, alpha=1.0), "adam"), epochs=2)
    for one, other in zip(plain.get_weights(), student.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_regularizers_of_the_student_count_once_and_in_full():
    x, y = data(8)
    teacher = net(16)
    with_it = compiled(Distiller(teacher, net(4, seed=2, regularizer="l2"), alpha=0.25))
    without = compiled(Distiller(teacher, net(4, seed=2), alpha=0.25))
    kernel = with_it.student.get_weights()[0]
    difference = with_it.evaluate(x, y, verbose=0)[0] - without.evaluate(x, y, verbose=0)[0]
    assert difference == pytest.approx(0.01 * (kernel**2).sum(), rel=1e-4)


def test_the_teacher_is_left_as_it_is():
    teacher = net(16, dropout=0.5)
    teacher.get_layer("hidden").trainable = False
    flags = [layer.trainable for layer in teacher.layers]
    weights = [w.copy() for w in teacher.get_weights()]
    distiller = compiled(Distiller(teacher, net(4, seed=1)))
    fit(distiller, epochs=2)
    assert [layer.trainable for layer in teacher.layers] == flags
    assert len(teacher.trainable_variables) == 4
    for before, after in zip(weights, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert not teacher.compiled


def test_the_teacher_runs_without_dropout():
    # With the teacher's own weights as the student, only dropout could make a difference.
    teacher = net(8, dropout=0.5)
    student = keras.models.clone_model(teacher)
    student.set_weights(teacher.get_weights())
    student.get_layer("dropout").rate = 0.0
    student.get_layer("norm").trainable = False  # in inference mode too
    distiller = Distiller(teacher, student, alpha=0.0)
    distiller.compile(keras.optimizers.SGD(0.0))
    x, _ = data()
    assert distiller.fit(x, verbose=0).history["loss"][0] == pytest.approx(0.0, abs=1e-6)


def test_without_alpha_no_labels_are_needed_and_the_teacher_is_imitated():
    teacher, student = net(16), net(8, seed=1)
    distiller = Distiller(teacher, student, alpha=0.0)
    distiller.compile(keras.optimizers.Adam(0.02))
    x, _ = data(128)
    losses = distiller.fit(x, epochs=20, verbose=0).history["distillation_loss"]
    assert losses[-1] < 0.3 * losses[0]


def test_to_keras_the_distiller_is_the_student():
    teacher, student = net(16), net(4, seed=1)
    distiller = compiled(Distiller(teacher, student))
    assert [id(v) for v in distiller.weights] == [id(v) for v in student.weights]
    assert distiller.count_params() == student.count_params()
    assert distiller.student is student
    assert distiller.teacher is teacher
    assert distiller.train_step.__func__ is keras.Model.train_step


@pytest.mark.one_in(2)
@pytest.mark.parametrize("jit", [False, True])
def test_saved_in_mid_training_it_goes_on_as_if_not_stopped(jit, tmp_path):
    teacher = net(16)

    def start():
        student = net(4, seed=1)  # without dropout, whose seed Keras does not save
        return compiled(
            Distiller(teacher, student, alpha=0.3, temperature=4.0), "adam", jit_compile=jit
        )

    whole, part = start(), start()
    fit(whole, epochs=3)
    fit(part, epochs=1)
    part.save(tmp_path / "part.keras")
    resumed = keras.saving.load_model(tmp_path / "part.keras")
    resumed.teacher = teacher
    fit(resumed, epochs=2)
    for straight, stopped in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(straight, stopped)


def test_a_file_holds_the_student_and_not_the_teacher(tmp_path):
    teacher, student = net(256), net(4, seed=1)
    distiller = compiled(Distiller(teacher, student, alpha=0.2, temperature=6.0))
    fit(distiller)
    distiller.save(tmp_path / "distiller.keras")
    with zipfile.ZipFile(tmp_path / "distiller.keras") as archive:
        assert b"net256" not in archive.read("config.json")
        with h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as weights:
            shapes = []
            weights.visititems(lambda _, item: shapes.append(getattr(item, "shape", ())))
    assert (6, 4) in shapes  # the student's first kernel
    assert not any(256 in shape for shape in shapes)
    loaded = keras.saving.load_model(tmp_path / "distiller.keras")
    x, y = data()
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), student.predict(x, verbose=0))
    assert loaded.student_loss_weight == 0.2
    assert loaded.distillation_losses == [LogitDistillation(6.0)]
    own = loaded.evaluate(x, y, verbose=0, return_dict=True)
    assert own["loss"] == own["student_loss"]
    with pytest.raises(ValueError, match=r"distiller\.teacher = "):
        fit(loaded)


def test_weights_go_to_a_checkpoint_and_back(tmp_path):
    distiller = compiled(Distiller(net(16), net(4, seed=1)))
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.weights.h5", save_weights_only=True
    )
    fit(distiller, callbacks=[checkpoint])
    other = compiled(Distiller(net(16, seed=3), net(4, seed=4)))
    other.load_weights(tmp_path / "best.weights.h5")
    for one, two in zip(distiller.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_student_of_a_float32_teacher(policy):
    teacher = net(16)
    keras.config.set_dtype_policy(policy)
    try:
        student = net(4, seed=1)
    finally:
        keras.config.set_dtype_policy("float32")
    distiller = compiled(Distiller(teacher, student), "adam")
    scaled = isinstance(distiller.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    losses = fit(distiller, epochs=4, validation_data=data())
    assert np.isfinite(losses["loss"]).all()
    assert losses["loss"][-1] < losses["loss"][0]
    assert {"val_accuracy", "val_student_loss"} <= set(losses)


def test_several_steps_per_execution_change_nothing():
    histories = []
    for steps in (1, 4):
        distiller = compiled(Distiller(net(16), net(4, seed=1)), steps_per_execution=steps)
        fit(distiller, epochs=2)
        histories.append(distiller.get_weights())
    for one, several in zip(*histories, strict=True):
        np.testing.assert_allclose(one, several, rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_a_pruned_student_comes_out_plain_and_sparse(jit):
    student = prune(net(16, seed=1), ConstantSparsity(0.5, 2), include=["hidden", "logits"])
    distiller = compiled(Distiller(net(32), student), jit_compile=jit)
    fit(distiller, callbacks=[UpdatePruning()])
    plain = tfaccel.strip(distiller.student)
    assert (keras.ops.convert_to_numpy(plain.get_layer("hidden").kernel) == 0).mean() == 0.5
    x, _ = data()
    outputs = [model.predict(x, verbose=0) for model in (plain, distiller)]
    np.testing.assert_allclose(*outputs, atol=1e-6)  # XLA rounds in another order


def test_stock_losses_join_in_with_their_weights():
    teacher, student = net(8), net(8, seed=1)
    feature = keras.distillation.FeatureDistillation("mse", "hidden", "hidden")
    distiller = Distiller(
        teacher, student, alpha=0.0, losses=[LogitDistillation(2.0), feature], loss_weights=[1, 0.5]
    )
    distiller.compile("sgd")
    x, y = data()
    hidden = [
        keras.Model(model.inputs, model.get_layer("hidden").output).predict(x, verbose=0)
        for model in (teacher, student)
    ]
    logits = [model.predict(x, verbose=0) for model in (teacher, student)]
    expected = float(LogitDistillation(2.0).compute_loss(*logits))
    expected += 0.5 * ((hidden[0] - hidden[1]) ** 2).mean()
    found = distiller.evaluate(x, y, verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(expected, rel=1e-4)
    assert len(distiller.weights) == len(student.weights)
    assert np.isfinite(distiller.fit(x, verbose=0).history["loss"][0])


def test_several_outputs_and_dict_metrics():
    def two_heads(seed):
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((6,))
        heads = {"a": layers.Dense(3, name="a")(inputs), "b": layers.Dense(4, name="b")(inputs)}
        return keras.Model(inputs, heads)

    distiller = Distiller(two_heads(0), two_heads(1), alpha=0.5)
    distiller.compile("sgd", {"a": hard_loss(), "b": hard_loss()}, metrics={"b": ["accuracy"]})
    x, y = data()
    history = distiller.fit(x, {"a": y, "b": y}, verbose=0).history
    assert "b_accuracy" in history
    assert np.isfinite(history["loss"][0])


def test_a_subclassed_teacher_serves():
    class Custom(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(CLASSES)

        def call(self, inputs):
            return self.dense(inputs)

    teacher = Custom()
    with pytest.raises(ValueError, match="built teacher"):
        Distiller(teacher, net(4))
    teacher(data()[0])
    assert np.isfinite(fit(compiled(Distiller(teacher, net(4))))["loss"][0])


def test_a_loss_is_needed_where_alpha_gives_it_weight():
    distiller = Distiller(net(8), net(4), alpha=0.5)
    distiller.compile("sgd")
    with pytest.raises(ValueError, match="Pass loss="):
        fit(distiller)


def wide_output():
    return keras.Sequential([keras.Input((6,)), layers.Dense(5)], name="wide")


def wide_input():
    return keras.Sequential([keras.Input((7,)), layers.Dense(CLASSES)], name="long")


def probabilities():
    return keras.Sequential([keras.Input((6,)), layers.Dense(CLASSES, activation="softmax")])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"teacher": wide_output},
            ValueError,
            r"'wide' has \(None, 5\) and .*'net4' has \(None, 3\)",
        ),
        ({"teacher": wide_input}, ValueError, r"input shapes.*\(None, 7\).*\(None, 6\)"),
        ({"teacher": probabilities}, ValueError, "ends in softmax"),
        ({"teacher": lambda: "teacher.keras"}, TypeError, "teacher must be"),
        ({"student": lambda: None}, TypeError, "student must be"),
        ({"student": lambda: keras.Sequential([layers.Dense(3)])}, ValueError, "built student"),
        ({"alpha": 1.5}, ValueError, "alpha"),
        ({"alpha": "a"}, TypeError, "alpha"),
        ({"temperature": 0}, ValueError, "temperature"),
        ({"losses": []}, ValueError, "empty"),
        ({"losses": "kl"}, TypeError, "losses"),
        ({"losses": LogitDistillation(), "temperature": 2.0}, ValueError, "to the loss itself"),
        ({"loss_weights": [1.0, 2.0]}, ValueError, "2 for 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    arguments = {"teacher": net, "student": lambda: net(4), **arguments}
    made = {k: v() if k in ("teacher", "student") else v for k, v in arguments.items()}
    with pytest.raises(error, match=message):
        Distiller(**made)


def test_labels_of_the_wrong_shape_are_refused():
    distiller = compiled(Distiller(net(8), net(4)))
    with pytest.raises(ValueError, match="shape"):
        distiller.fit(data()[0], np.zeros((32, 5, 2)), verbose=0)
