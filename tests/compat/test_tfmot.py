"""TFMOT's pruning code runs with another import line, and prunes as TFMOT does."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import tfaccel
import tfaccel.compat.tfmot as tfmot
from tests.compat import tfmot_jobs
from tests.pruning.samples import masks_of
from tfaccel.core.transforms import transformed_layers

sparsity = tfmot.sparsity.keras
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data(size=64):
    random = np.random.default_rng(0)
    x = random.normal(size=(size, 20)).astype("float32")
    return x, (x[:, :3].argmax(axis=1)).astype("int64")


def dense_network():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((20,)),
            layers.Dense(20, activation="relu", name="hidden"),
            layers.Dense(3, name="logits"),
        ]
    )


def fit(model, epochs=2, **options):
    model.compile("adam", LOSS, metrics=["accuracy"])
    callbacks = [sparsity.UpdatePruningStep()]
    model.fit(*data(), batch_size=16, epochs=epochs, verbose=0, callbacks=callbacks, **options)
    return model


def zeros(kernel):
    return float((np.asarray(kernel) == 0).mean())


# The guide's ways, in words of our own


def test_a_whole_model_is_pruned_over_training_stripped_and_exported(tmp_path):
    base = dense_network()
    pruned = sparsity.prune_low_magnitude(
        base,
        pruning_schedule=sparsity.PolynomialDecay(
            initial_sparsity=0.5, final_sparsity=0.8, begin_step=0, end_step=8, frequency=2
        ),
    )
    fit(pruned, epochs=3, validation_split=0.1)
    exported = sparsity.strip_pruning(pruned)
    assert [type(layer) for layer in exported.layers] == [layers.Dense, layers.Dense]
    assert zeros(exported.layers[0].kernel) == pytest.approx(0.8)
    assert zeros(exported.layers[1].kernel) == pytest.approx(0.8)  # 48 of 60
    assert zeros(base.layers[0].kernel) == 0
    artifact = tfaccel.export.to_tflite(exported, tmp_path / "pruned.tflite")
    assert artifact.size_bytes > 0


def test_some_layers_by_clone_model():
    base = dense_network()

    def only_hidden(layer):
        if layer.name == "hidden":
            return sparsity.prune_low_magnitude(layer)
        return layer

    model = keras.models.clone_model(base, clone_function=only_hidden)
    assert [layer.name for layer in transformed_layers(model)] == ["hidden"]
    x, _ = data()
    np.testing.assert_array_equal(model.predict(x, verbose=0), base.predict(x, verbose=0))
    before = base.layers[0].get_weights()[0].copy()
    fit(model)
    assert zeros(sparsity.strip_pruning(model).layers[0].kernel) == 0.5
    np.testing.assert_array_equal(base.layers[0].get_weights()[0], before)


def test_layers_in_a_definition():
    inputs = keras.Input((20,))
    x = sparsity.prune_low_magnitude(layers.Dense(16, activation="relu"))(inputs)
    functional = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))
    assert zeros(sparsity.strip_pruning(fit(functional)).layers[1].kernel) == 0.5

    sequential = keras.Sequential(
        [
            sparsity.prune_low_magnitude(layers.Dense(16, activation="relu"), input_shape=(20,)),
            layers.Dense(3),
        ]
    )
    assert sequential.built
    stripped = sparsity.strip_pruning(fit(sequential))
    assert [zeros(layer.kernel) for layer in stripped.layers] == [0.5, 0.0]


def test_attention_and_recurrent_layers_in_a_definition(tmp_path):
    inputs = keras.Input((6, 8))
    x = sparsity.prune_low_magnitude(layers.MultiHeadAttention(2, 4, name="attention"))(
        inputs, inputs
    )
    outputs = sparsity.prune_low_magnitude(layers.LSTM(8, name="lstm"))(x)
    model = keras.Model(inputs, outputs)
    keys = {layer.name: [key for key, _ in layer.transforms] for layer in transformed_layers(model)}
    parts = ("query", "key", "value", "attention_output")
    assert keys["attention"] == [f"{part}/kernel" for part in parts]
    assert keys["lstm"] == ["lstm_cell/kernel", "lstm_cell/recurrent_kernel"]
    model.compile("sgd", "mse")
    x, y = np.ones((8, 6, 8), "float32"), np.ones((8, 8), "float32")
    model.fit(x, y, verbose=0, callbacks=[sparsity.UpdatePruningStep()])
    model.save(tmp_path / "attention.keras")
    loaded = keras.models.load_model(tmp_path / "attention.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert zeros(sparsity.strip_pruning(loaded).get_layer("attention").query_dense.kernel) == 0.5


class Scaled(layers.Layer, sparsity.PrunableLayer):
    """A dense layer of the user's with a scale that is no kernel."""

    def build(self, input_shape):
        self.kernel = self.add_weight((input_shape[-1], 8), name="kernel")
        self.scale = self.add_weight((8,), "ones", name="kernel_scale")

    def call(self, x):
        return keras.ops.matmul(x, self.kernel) * self.scale

    def get_prunable_weights(self):
        return [self.kernel]


class Unknown(layers.Layer):
    def call(self, x):
        return x


def test_layers_of_the_users_say_what_is_pruned():
    model = keras.Sequential([keras.Input((20,)), Scaled(), layers.Dense(3)])
    pruned = fit(sparsity.prune_low_magnitude(model))
    stripped = sparsity.strip_pruning(pruned)
    assert zeros(stripped.layers[0].kernel) == 0.5
    assert zeros(stripped.layers[0].scale) == 0
    with pytest.raises(ValueError, match=r"does not know the layer .*Unknown"):
        sparsity.prune_low_magnitude(Unknown())
    with pytest.raises(ValueError, match=r"does not know the layer .*Unknown"):
        sparsity.prune_low_magnitude(keras.Sequential([keras.Input((20,)), Unknown()]))


def test_training_goes_on_from_a_file(tmp_path):
    pruned = fit(sparsity.prune_low_magnitude(dense_network()))
    pruned.save(tmp_path / "pruned.keras")
    with sparsity.prune_scope():
        loaded = keras.models.load_model(tmp_path / "pruned.keras")
    np.testing.assert_array_equal(masks_of(loaded), masks_of(pruned))
    assert zeros(sparsity.strip_pruning(fit(loaded)).layers[0].kernel) == 0.5


@pytest.mark.parametrize("built", [True, False])
def test_two_of_four_is_not_lost_by_saving(built, tmp_path):
    # TFMOT 0.8.1 leaves sparsity_m_by_n out of its config: see docs/migrating_from_tfmot.md.
    network = dense_network()
    if not built:
        network = keras.Sequential([layers.Dense(20), layers.Dense(3)])
    pruned = sparsity.prune_low_magnitude(network, sparsity_m_by_n=(2, 4))
    pruned.build((None, 20))
    pruned.save(tmp_path / "early.keras")  # before any training, when the setting alone is there
    loaded = fit(keras.models.load_model(tmp_path / "early.keras"))
    loaded.save(tmp_path / "later.keras")
    again = fit(keras.models.load_model(tmp_path / "later.keras"))
    kernel = np.asarray(sparsity.strip_pruning(again).layers[0].kernel)
    assert ((kernel.T.reshape(20, 5, 4) != 0).sum(axis=2) == 2).all()


def test_a_list_of_layers():
    given = [layers.InputLayer((20,)), layers.Dense(20), layers.Dense(3)]
    wrapped = sparsity.prune_low_magnitude(given)
    assert [isinstance(x, sparsity.PruneLowMagnitude) for x in wrapped] == [False, True, True]
    model = keras.Sequential(wrapped)
    assert zeros(sparsity.strip_pruning(fit(model)).layers[0].kernel) == 0.5


# Against TFMOT itself


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    file = tmp_path_factory.mktemp("tfmot") / "kernels.json"
    command = [sys.executable, "-W", "ignore", str(Path(tfmot_jobs.__file__)), str(file)]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads(file.read_text())


@pytest.mark.parametrize("case", tfmot_jobs.CASES)
@pytest.mark.parametrize("who", ["ours", "handed over"])
def test_masks_after_training_are_tfmots(case, who, kernels):
    for kernel, theirs in zip(kernels[f"{case} {who}"], kernels[f"{case} theirs"], strict=True):
        np.testing.assert_array_equal(np.array(kernel) != 0, np.array(theirs) != 0)
        np.testing.assert_allclose(kernel, theirs, atol=1e-5)
        assert 0.4 < zeros(kernel) < 0.8


# Callbacks


def test_a_model_without_masks_is_let_pass_with_a_warning():
    model = dense_network()
    model.compile("sgd", LOSS)
    with pytest.warns(UserWarning, match="found nothing to prune"):
        model.fit(*data(), verbose=0, callbacks=[sparsity.UpdatePruningStep()])


def test_forgetting_the_callback_is_an_error():
    pruned = sparsity.prune_low_magnitude(dense_network())
    with pytest.raises(ValueError, match="never ran"):
        sparsity.strip_pruning(pruned)


def test_a_model_that_is_not_built_is_an_error():
    model = sparsity.prune_low_magnitude(keras.Sequential([layers.Dense(20), layers.Dense(3)]))
    model.compile("sgd", LOSS)
    with pytest.raises(ValueError, match=r"needs a built model.*build\(input_shape\)"):
        model.fit(*data(), verbose=0, callbacks=[sparsity.UpdatePruningStep()])


def test_summaries_hold_the_sparsity_of_each_mask(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pruned = sparsity.prune_low_magnitude(dense_network())
    pruned.compile("sgd", LOSS)
    summaries = sparsity.PruningSummaries(log_dir=str(tmp_path))
    callbacks = [sparsity.UpdatePruningStep(), summaries]
    pruned.fit(*data(), epochs=2, batch_size=16, verbose=0, callbacks=callbacks)
    events = EventAccumulator(str(tmp_path / "metrics"))
    events.Reload()
    tags = events.Tags()["tensors"]
    assert sorted(tags) == [
        f"{layer}/kernel/{what}"
        for layer in ("hidden", "logits")
        for what in ("sparsity", "threshold")
    ]
    found = [
        (event.step, float(np.frombuffer(event.tensor_proto.tensor_content, "float32")[0]))
        if event.tensor_proto.tensor_content
        else (event.step, event.tensor_proto.float_val[0])
        for event in events.Tensors("hidden/kernel/sparsity")
    ]
    assert found == [(0, 0.0), (4, 0.5)]
    with pytest.raises(ValueError, match="log_dir"):
        sparsity.PruningSummaries(log_dir="")


# Arguments


def test_wrong_arguments_say_what_is_right():
    with pytest.raises(ValueError, match="takes a Sequential or Functional"):
        sparsity.prune_low_magnitude("model")
    with pytest.raises(ValueError, match="block_size must be a pair"):
        sparsity.prune_low_magnitude(layers.Dense(2), block_size=4)
    with pytest.raises(ValueError, match="'AVG', 'MAX'"):
        sparsity.prune_low_magnitude(layers.Dense(2), block_pooling_type="SUM")

    class Subclassed(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="subclassed"):
        sparsity.prune_low_magnitude(Subclassed())
    with pytest.raises(ValueError, match="strip_pruning"):
        sparsity.strip_pruning("model")


def test_every_name_of_tfmot_is_there():
    assert set(sparsity.__all__) - {"PruneLowMagnitude"} == {
        "ConstantSparsity",
        "PolynomialDecay",
        "PrunableLayer",
        "PruneForLatencyOnXNNPack",
        "PruningPolicy",
        "PruningSchedule",
        "PruningSummaries",
        "UpdatePruningStep",
        "prune_low_magnitude",
        "prune_scope",
        "strip_pruning",
    }


class Once(sparsity.PruningSchedule):
    """A schedule of the user's, as TFMOT's guide has it."""

    def __call__(self, step):
        return self._should_prune_in_step(step, 2, 2, 1), 0.25

    def get_config(self):
        return {}


def test_a_schedule_of_the_users():
    pruned = fit(sparsity.prune_low_magnitude(dense_network(), Once()))
    assert zeros(sparsity.strip_pruning(pruned).layers[0].kernel) == 0.25


# The policy


def mobile(stem_padding="valid", extra=None):
    inputs = keras.Input((16, 16, 3))
    x = layers.ZeroPadding2D(1)(inputs)
    x = layers.Conv2D(8, 3, strides=2, padding=stem_padding, use_bias=False, name="stem")(x)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    y = layers.Conv2D(8, 1, name="pointwise")(y)
    x = layers.Add()([x, y])
    if extra is not None:
        x = extra(x)
    x = layers.GlobalAveragePooling2D(keepdims=True)(x)
    return keras.Model(inputs, layers.Dense(4, name="logits")(layers.Flatten()(x)))


def headless():
    model = mobile()
    return keras.Model(model.inputs, model.layers[-4].output)


def test_the_policy_prunes_pointwise_convolutions():
    policy = sparsity.PruneForLatencyOnXNNPack()
    pruned = sparsity.prune_low_magnitude(mobile(), pruning_policy=policy)
    assert [layer.name for layer in transformed_layers(pruned)] == ["pointwise"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: mobile(stem_padding="same"), "sparse inference begins"),
        (lambda: mobile(extra=layers.Conv2D(8, 3, name="wide")), "'wide'"),
        (lambda: mobile(extra=layers.Activation("tanh", name="tanh")), "'tanh'"),
        (headless, "sparse inference ends"),
        (dense_network, "sparse inference begins"),
    ],
)
def test_the_policy_refuses_what_xnnpack_does_not_run(model, message):
    model = model()
    policy = sparsity.PruneForLatencyOnXNNPack()
    with pytest.raises(ValueError, match=message):
        sparsity.prune_low_magnitude(model, pruning_policy=policy)


def test_a_policy_of_the_users():
    class NoLogits(sparsity.PruningPolicy):
        def allow_pruning(self, layer):
            return layer.name != "logits"

        def ensure_model_supports_pruning(self, model):
            assert model.built

    pruned = sparsity.prune_low_magnitude(dense_network(), pruning_policy=NoLogits())
    assert [layer.name for layer in transformed_layers(pruned)] == ["hidden"]
