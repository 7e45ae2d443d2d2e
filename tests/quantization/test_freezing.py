"""When ranges and batch norm stop moving, and what training then computes with."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.quantization.networks import conv, images, network
from tfaccel import distillation
from tfaccel.quantization import FakeQuantize, FreezeRanges, freeze_ranges, quantize_aware
from tfaccel.rewriting.freezable_norm import FreezableBatchNormalization


def body(x):
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.5, name="norm")(conv(x)))
    return layers.Dense(3, name="logits")(layers.GlobalAveragePooling2D()(x))


def compiled(**options):
    aware = quantize_aware(network(body), **options.pop("how", {}))
    aware.compile(keras.optimizers.Adam(0.01), "mse", **options)
    return aware


def state_of(model):
    ranges = [x for x in model.layers if isinstance(x, FakeQuantize)]
    norm = model.get_layer("norm")
    return (
        np.array([[float(x.minimum), float(x.maximum)] for x in ranges]),
        np.concatenate([norm.moving_mean, norm.moving_variance]),
    )


class History(keras.callbacks.Callback):
    """What ranges and statistics were after each batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(state_of(self.model))


def train(model, *callbacks, steps=6):
    history = History()
    x = np.concatenate([images(8, seed) * (1 + seed) for seed in range(steps)])
    model.fit(
        x,
        np.ones((len(x), 3)),
        batch_size=8,
        shuffle=False,
        verbose=0,
        callbacks=[*callbacks, history],
    )
    return history.seen


@pytest.mark.parametrize("ranges", ["ema", "lsq", "pact"])
def test_each_stops_at_its_step(ranges):
    seen = train(compiled(how={"ranges": ranges}), FreezeRanges(4, batch_norm_step=2))
    extents, statistics = zip(*seen, strict=True)
    moved = [not np.array_equal(a, b) for a, b in itertools.pairwise(extents)]
    assert moved == [True, True, True, False, False]
    moved = [not np.array_equal(a, b) for a, b in itertools.pairwise(statistics)]
    assert moved == [True, False, False, False, False]


def test_learned_steps_of_weights_are_held_too():
    class Steps(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seen = []

        def on_train_batch_end(self, batch, logs=None):
            ((_, rounding),) = self.model.get_layer("logits").transforms
            # What it uses, by the largest integer and the largest weight: the step.
            weight = self.model.get_layer("logits").layer.kernel
            step = rounding.finalize(np.full(weight.shape, 1e9, "float32"))
            self.seen.append(np.max(step, axis=0))

    steps = Steps()
    train(compiled(how={"ranges": "lsq"}), FreezeRanges(3), steps)
    moved = [not np.array_equal(a, b) for a, b in itertools.pairwise(steps.seen)]
    assert moved == [True, True, False, False, False]


def test_several_steps_at_once_end_with_their_execution():
    seen = train(compiled(steps_per_execution=3), FreezeRanges(2), steps=9)
    np.testing.assert_array_equal(seen[0][0], seen[-1][0])
    assert len(seen) == 3


def test_weights_gamma_and_beta_train_on():
    model = compiled()
    train(model, FreezeRanges(0))
    norm = model.get_layer("norm")
    before = [np.array(v) for v in (norm.gamma, norm.beta, model.get_layer("logits").layer.kernel)]
    train(model, FreezeRanges(0))
    after = [np.array(v) for v in (norm.gamma, norm.beta, model.get_layer("logits").layer.kernel)]
    assert all((a != b).any() for a, b in zip(before, after, strict=True))


def test_what_is_held_stays_so_after_saving(tmp_path):
    model = compiled()
    train(model, FreezeRanges(1))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    before = state_of(loaded)
    train(loaded)
    for a, b in zip(before, state_of(loaded), strict=True):
        np.testing.assert_array_equal(a, b)


def test_student_of_a_distiller_is_held():
    student = quantize_aware(network(body))
    distiller = distillation.Distiller(network(body), student)
    distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = images(16)
    distiller.fit(x, np.zeros(16, int), batch_size=8, verbose=0, callbacks=[FreezeRanges(1)])
    assert all(int(x.held) for x in student.layers if isinstance(x, FakeQuantize))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": -1}, ValueError, "step must not be below 0"),
        ({"step": 1.5}, TypeError, "step must be int"),
        ({"step": 1, "batch_norm_step": -3}, ValueError, "batch_norm_step must not be below 0"),
    ],
)
def test_bad_steps(arguments, error, message):
    with pytest.raises(error, match=message):
        FreezeRanges(**arguments)


def test_model_without_ranges_is_refused_before_training():
    model = network(body)
    model.compile("sgd", "mse")
    with pytest.raises(
        ValueError, match=r"FreezeRanges found no ranges in 'small'.*quantize_aware"
    ):
        train(model, FreezeRanges(1))


# Batch norm


ROWS, IMAGES = (6, 4, 5), (6, 4, 3, 5)  # TensorFlow has an operator of its own for images


def norms(seed=0, shape=ROWS, **options):
    """A plain and a freezable one with the same weights."""
    plain = layers.BatchNormalization(momentum=0.7, **options)
    plain.build((None, *shape[1:]))
    random = np.random.default_rng(seed)
    for weight in plain.weights:
        weight.assign(random.uniform(0.5, 1.5, weight.shape))
    return plain, FreezableBatchNormalization.like(plain)


@pytest.mark.parametrize("shape", [ROWS, IMAGES], ids=["rows", "images"])
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"dtype": "float64"}])
def test_not_frozen_it_is_batch_normalization(options, shape):
    plain, ours = norms(shape=shape, **options)
    x = np.random.default_rng(1).normal(2.0, 3.0, shape).astype("float32")
    for training in (True, False, True):
        np.testing.assert_allclose(
            ours(x, training=training), plain(x, training=training), atol=1e-5
        )
    np.testing.assert_allclose(ours.moving_mean, plain.moving_mean, rtol=1e-6)
    np.testing.assert_allclose(ours.moving_variance, plain.moving_variance, rtol=1e-6)


def test_masked_samples_do_not_count():
    plain, ours = norms()
    x = np.random.default_rng(1).normal(2.0, 3.0, (6, 4, 5)).astype("float32")
    mask = np.random.default_rng(2).random((6, 4)) < 0.5
    outputs = [layer(x, training=True, mask=mask) for layer in (plain, ours)]
    np.testing.assert_allclose(*outputs, atol=1e-4)
    np.testing.assert_allclose(ours.moving_variance, plain.moving_variance, rtol=1e-4)


def gradients(norm, x, training):
    """Of a loss in which every output has its own weight: of the inputs, gamma and beta."""
    weights = np.random.default_rng(3).normal(size=x.shape).astype("float32")
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(norm(inputs, training=training) * weights)
    return tape.gradient(loss, [inputs, norm.gamma.value, norm.beta.value])


@pytest.mark.parametrize("frozen", [False, True], ids=["moving", "frozen"])
@pytest.mark.parametrize("shape", [ROWS, IMAGES], ids=["rows", "images"])
def test_gradients_are_those_of_batch_normalization(shape, frozen):
    plain, ours = norms(shape=shape)
    if frozen:
        ours.freeze_statistics()
    x = np.random.default_rng(1).normal(2.0, 3.0, shape).astype("float32")
    expected, found = gradients(plain, x, not frozen), gradients(ours, x, training=True)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [ROWS, IMAGES], ids=["rows", "images"])
def test_frozen_it_trains_with_the_moving_statistics(shape):
    plain, ours = norms(shape=shape)
    ours.freeze_statistics()
    x = np.random.default_rng(1).normal(2.0, 3.0, shape).astype("float32")
    np.testing.assert_allclose(ours(x, training=True), plain(x, training=False), atol=1e-5)
    np.testing.assert_array_equal(ours.moving_mean, plain.moving_mean)


def test_stripped_it_is_plain():
    plain, ours = norms()
    ours.gamma.trainable = False
    stripped = ours.strip_layer()
    assert type(stripped) is layers.BatchNormalization
    for a, b in zip(stripped.weights, plain.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not stripped.gamma.trainable


def test_renormalization_is_refused():
    norm = layers.BatchNormalization(renorm=True)
    norm.build((None, 4))
    with pytest.raises(ValueError, match="renormalizes"):
        FreezableBatchNormalization.like(norm)


def test_deployed_model_has_fixed_ranges_and_plain_norms():
    model = compiled()
    train(model, steps=2)
    deployed = freeze_ranges(model)
    assert all(x.fixed_range for x in deployed.layers if isinstance(x, FakeQuantize))
    assert type(deployed.get_layer("norm")) is layers.BatchNormalization
    x = images(8)
    np.testing.assert_allclose(deployed(x), model(x), atol=1e-5)
