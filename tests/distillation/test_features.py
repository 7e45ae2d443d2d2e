"""What the Distiller hands to losses: features, heads, indices, stored outputs."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import layers, ops

import tfaccel
from tests.distillation.test_distiller import compiled, data, fit, linear, net
from tfaccel.distillation import Distiller, ForOutput, HintLoss, LogitDistillation
from tfaccel.distillation.batches import read_batch
from tfaccel.distillation.feature_losses import FeatureLoss
from tfaccel.pruning import UpdatePruning, prune

SEEN = {}


@keras.saving.register_keras_serializable("tfaccel_tests")
@dataclasses.dataclass(frozen=True)
class Projected(FeatureLoss):
    """Squared error between the teacher's feature and a dense layer on the student's."""

    def make_head(self, teacher_shape, student_shape):
        head = layers.Dense(teacher_shape[-1], use_bias=False, name="projection")
        head.build(student_shape)
        return head

    def compute_loss(self, teacher_outputs, student_outputs, *, head=None, **options):
        SEEN.clear()
        SEEN.update(options)
        return ops.mean(ops.square(teacher_outputs - head(student_outputs)))


def hinted(teacher=None, seed=1, **options):
    keras.utils.set_random_seed(seed + 100)
    teacher = net(16) if teacher is None else teacher
    losses = [LogitDistillation(2.0), Projected("hidden", "hidden")]
    return Distiller(teacher, net(4, seed=seed), losses=losses, **options)


def test_a_head_is_trained_beside_the_student():
    distiller = compiled(hinted(), "adam")
    (head,) = distiller.heads
    own = [id(v) for v in distiller.student.weights]
    assert [id(v) for v in distiller.weights] == [*own, id(head.kernel)]
    before = np.array(head.kernel)
    losses = fit(distiller, epochs=8)["distillation_loss"]
    assert losses[-1] < losses[0]
    assert np.abs(np.array(head.kernel) - before).max() > 1e-3
    assert "projection" not in [layer.name for layer in tfaccel.strip(distiller.student).layers]


@pytest.mark.parametrize("jit", [False, True])
def test_one_step_is_the_one_by_hand(jit):
    # A linear student whose features are its outputs, and a linear projection of them.
    teacher, student = linear(0), linear(1)
    layer, taught_by = student.layers[-1].name, teacher.layers[-1].name
    distiller = Distiller(teacher, student, alpha=0.0, losses=[Projected(taught_by, layer)])
    raw, projection = (v.numpy().astype("float64") for v in distiller.trainable_variables)
    x, _ = data(16)
    distiller.compile(keras.optimizers.SGD(0.5), jit_compile=jit)
    distiller.train_on_batch(x)
    error = x @ raw @ projection - x @ teacher.get_weights()[0]
    slope = 2 * error / error.size
    np.testing.assert_allclose(
        student.get_weights()[0], raw - 0.5 * x.T @ slope @ projection.T, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        distiller.heads[0].kernel, projection - 0.5 * (x @ raw).T @ slope, rtol=1e-4, atol=1e-5
    )


def test_the_student_runs_once_in_a_step():
    teacher, student = net(16), net(4, seed=1)
    distiller = Distiller(teacher, student, losses=[Projected("hidden", "hidden")])
    compiled(distiller, keras.optimizers.SGD(0.0))
    x, y = data(32)
    hidden = np.maximum(x @ student.get_layer("hidden").get_weights()[0], 0)
    distiller.train_on_batch(x, y)
    # One update of the moving mean, from 0: (1 - momentum) times the batch's mean.
    np.testing.assert_allclose(
        student.get_layer("norm").moving_mean, 0.01 * hidden.mean(axis=0), rtol=1e-4, atol=1e-6
    )


def test_dropout_is_the_same_in_outputs_and_features():
    # Logits and feature come from one pass, so that the logits follow from the feature.
    keras.utils.set_random_seed(0)
    student = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dropout(0.5, seed=1, name="drop"),
            layers.Dense(3, use_bias=False, name="logits"),
        ]
    )
    kernel = student.get_layer("logits").get_weights()[0]

    class Follows(keras.distillation.DistillationLoss):
        teacher_layer_name = None
        student_layer_name = "drop"

        def compute_loss(self, teacher_outputs, student_outputs, **_):
            return ops.sum(ops.matmul(student_outputs, kernel))

    distiller = Distiller(linear(0), student, alpha=0.0, losses=Follows())
    distiller.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    x, _ = data(16)
    outputs = distiller(x, training=True)
    assert float(distiller.compute_loss(x, y_pred=outputs)) == pytest.approx(
        float(ops.sum(outputs)), rel=1e-5
    )


def test_losses_of_one_name_share_a_head():
    teacher, student = net(16), net(4, seed=1)
    losses = [
        Projected("hidden", "hidden", head_name="shared"),
        Projected("norm", "norm", head_name="shared"),
        Projected("norm", "norm"),
    ]
    distiller = Distiller(teacher, student, losses=losses)
    assert len(distiller.heads) == 2
    assert distiller._head_of == [0, 0, 1]


def test_saved_with_its_heads_it_goes_on_as_if_not_stopped(tmp_path):
    teacher = net(16)
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 12, 1.0, power=1.0)

    def start():
        return compiled(hinted(teacher, alpha=schedule, loss_weights=[1.0, schedule]), "adam")

    whole, part = start(), start()
    fit(whole, epochs=3)
    fit(part, epochs=1)
    part.save(tmp_path / "part.keras")
    resumed = tfaccel.load_model(tmp_path / "part.keras", compile=True)
    assert int(resumed.batches_seen) == 4
    x, _ = data()
    np.testing.assert_array_equal(resumed.predict(x, verbose=0), part.predict(x, verbose=0))
    resumed.teacher = teacher
    fit(resumed, epochs=2)
    for straight, stopped in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_allclose(straight, stopped, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"\[None, 16\].*'net8'.*\[None, 8\]"):
        resumed.teacher = net(8)


@pytest.mark.parametrize("jit", [False, True])
def test_alpha_by_schedule_is_what_the_schedule_says(jit):
    x, y = data(24)
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 2, 1.0, power=1.0)
    teacher, student = linear(0), linear(1)
    distiller = compiled(
        Distiller(teacher, student, alpha=schedule), keras.optimizers.SGD(0.0), jit_compile=jit
    )
    for alpha in (0.0, 0.5, 1.0, 1.0):
        found = distiller.train_on_batch(x, y, return_dict=True)
        distiller.reset_metrics()
        expected = alpha * found["student_loss"] + (1 - alpha) * found["distillation_loss"]
        assert found["loss"] == pytest.approx(expected, rel=1e-5)
    distiller.evaluate(x, y, verbose=0)
    assert int(distiller.batches_seen) == 4  # evaluation does not count


def test_losses_get_labels_indices_weights_and_whether_this_is_training():
    distiller = compiled(hinted(alpha=0.5))
    x, y = data(8)
    index = np.arange(8)[::-1].copy()
    distiller.compile("sgd", distiller.loss, run_eagerly=True)
    distiller.train_on_batch({"inputs": x, "sample_index": index}, y, sample_weight=np.ones(8))
    np.testing.assert_array_equal(SEEN["sample_index"], index)
    np.testing.assert_array_equal(SEEN["labels"], y)
    np.testing.assert_array_equal(SEEN["sample_weight"], np.ones(8))
    assert SEEN["training"]
    distiller.test_on_batch(x, y)
    assert SEEN["sample_index"] is None
    assert not SEEN["training"]


@dataclasses.dataclass
class Stored:
    name: str
    output_shapes: dict


def stored_outputs(teacher, x):
    hidden = keras.Model(teacher.inputs, teacher.get_layer("hidden").output)
    return {
        "final_output": teacher.predict(x, verbose=0),
        "hidden": hidden.predict(x, verbose=0),
    }


def test_stored_outputs_teach_as_the_teacher_does():
    teacher = net(16, dropout=0.5)
    x, y = data()
    stored = Stored("net16", {"final_output": (None, 3), "hidden": (None, 16)})
    live, off_line = compiled(hinted(teacher), "adam"), compiled(hinted(stored), "adam")
    fit(live, epochs=3)
    taught = {"inputs": x, "teacher_outputs": stored_outputs(teacher, x)}
    history = off_line.fit(
        taught, y, batch_size=8, shuffle=False, epochs=3, verbose=0, validation_data=(x, y)
    ).history
    for one, other in zip(live.get_weights(), off_line.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    # Nobody can tell what the teacher would say of validation data: the student's own loss counts.
    assert history["val_loss"] == history["val_student_loss"]
    with pytest.raises(ValueError, match=r"batch does not bring them.*cache\.dataset"):
        fit(off_line)


def test_stored_outputs_must_have_what_the_losses_look_at():
    with pytest.raises(ValueError, match=r"stored outputs of 'net16' have no 'hidden'.*layers="):
        hinted(Stored("net16", {"final_output": (None, 3)}))


def test_logits_alone_may_come_as_a_tensor():
    teacher = net(16)
    x, y = data()
    live = compiled(Distiller(teacher, net(4, seed=1)))
    off_line = compiled(Distiller(Stored("t", {"final_output": (None, 3)}), net(4, seed=1)))
    fit(live)
    taught = {"inputs": x, "teacher_outputs": teacher.predict(x, verbose=0)}
    off_line.fit(taught, y, batch_size=8, shuffle=False, verbose=0)
    for one, other in zip(live.get_weights(), off_line.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "x", [np.ones(3), {"inputs": 1}, {"inputs": 1, "other": 2}, {"sample_index": 1}, [1, 2]]
)
def test_what_is_no_batch_of_ours_goes_to_the_student_as_it_is(x):
    batch = read_batch(x)
    assert batch.inputs is x
    assert batch.sample_index is batch.teacher_outputs is None


def test_outputs_may_differ_where_no_loss_compares_them():
    teacher = keras.Sequential(
        [keras.Input((6,)), layers.Dense(16, name="hidden"), layers.Dense(9)]
    )
    distiller = compiled(Distiller(teacher, net(4), losses=Projected("hidden", "hidden")), "adam")
    assert np.isfinite(fit(distiller)["loss"][0])
    with pytest.raises(ValueError, match="same output shapes"):
        Distiller(teacher, net(4))


def nested(seed):
    keras.utils.set_random_seed(seed)
    inner = keras.Input((6,))
    body = keras.Model(inner, layers.Dense(5, activation="relu")(inner), name="body")
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.Dense(3, name="logits")(body(inputs)), name="nested")


def test_what_a_nested_model_gives_is_a_feature_too():
    teacher, student = nested(0), nested(1)
    x, y = data(16)
    loss = keras.distillation.FeatureDistillation("mse", "body", "body")
    distiller = compiled(Distiller(teacher, student, alpha=0.0, losses=loss))
    found = distiller.evaluate(x, y, verbose=0, return_dict=True)["distillation_loss"]
    features = [model.get_layer("body").predict(x, verbose=0) for model in (teacher, student)]
    assert found == pytest.approx(((features[0] - features[1]) ** 2).mean(), rel=1e-5)


def test_a_head_for_one_of_several_outputs():
    def two_heads(seed, width):
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((6,))
        heads = {"a": layers.Dense(3, name="a")(inputs), "b": layers.Dense(width, name="b")(inputs)}
        return keras.Model(inputs, heads)

    losses = [ForOutput("a", LogitDistillation()), ForOutput("b", HintLoss())]
    distiller = Distiller(two_heads(0, 7), two_heads(1, 4), alpha=0.0, losses=losses)
    assert tuple(distiller.heads[0].kernel.shape) == (4, 7)
    distiller.compile(keras.optimizers.Adam(0.05))
    found = distiller.fit(data(64)[0], epochs=15, verbose=0).history["distillation_loss"]
    assert found[-1] < 0.5 * found[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("hiden", "hidden"), r"teacher 'net16' has no layer 'hiden'.*Did you mean 'hidden'"),
        (("hidden", "body"), r"student 'net4' has no layer 'body'.*summary"),
    ],
)
def test_a_layer_that_is_not_there_is_named(names, message):
    with pytest.raises(ValueError, match=message):
        Distiller(net(16), net(4), losses=Projected(*names))


def test_a_subclassed_teacher_has_no_layers_to_look_at():
    class Custom(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, inputs):
            return self.dense(inputs)

    teacher = Custom()
    teacher(data()[0])
    with pytest.raises(ValueError, match="subclassed Custom"):
        Distiller(teacher, net(4), losses=Projected("dense", "hidden"))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_features_in_mixed_precision(policy):
    teacher = net(16)
    keras.config.set_dtype_policy(policy)
    try:
        student = net(4, seed=1)
    finally:
        keras.config.set_dtype_policy("float32")
    losses = [LogitDistillation(), Projected("hidden", "hidden")]
    found = fit(compiled(Distiller(teacher, student, losses=losses), "adam"), epochs=4)
    assert found["loss"][-1] < found["loss"][0]


def test_features_of_a_pruned_and_quantized_student():
    student = tfaccel.quantization.quantize_aware(prune(net(16, seed=1), 0.5, include=["hidden"]))
    distiller = Distiller(net(32), student, losses=[Projected("hidden", "hidden")])
    history = fit(compiled(distiller, "adam"), epochs=4, callbacks=[UpdatePruning()])
    assert history["loss"][-1] < history["loss"][0]
    plain = tfaccel.strip(distiller.student)
    assert (keras.ops.convert_to_numpy(plain.get_layer("hidden").kernel) == 0).mean() == 0.5


def test_a_weight_must_be_a_number_or_a_schedule():
    with pytest.raises(TypeError, match="loss_weights must be a number"):
        Distiller(net(16), net(4), loss_weights=["a"])
