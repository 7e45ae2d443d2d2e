"""Clusters in training, in files and together with pruning and quantization."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfaccel
from tests.pruning.samples import dense_data, dense_model, image_model
from tfaccel.core.transforms import PRUNE, transformed_layers
from tfaccel.measurement.flatbuffer import TFLiteFile
from tfaccel.pruning import PolynomialDecay, UpdatePruning, prune, update_masks
from tfaccel.quantization import quantize_aware
from tfaccel.quantization.clustering import NearestCentroids, cluster, selection_for


def kernels(model):
    """The kernels of a model as its layers use them, by layer."""
    return {
        layer.name: np.asarray(layer.kernel)
        for layer in tfaccel.strip(model).layers
        if hasattr(layer, "kernel")
    }


def distinct(values):
    return len(np.unique(values))


def transform_of(model, name):
    (layer,) = (layer for layer in transformed_layers(model) if layer.name == name)
    (found,) = (t for _, t in layer.transforms if isinstance(t, NearestCentroids))
    return layer, found


def centroids_of(model, name="hidden"):
    return np.asarray(transform_of(model, name)[1].state["centroids"])


def train(model, epochs=2, rate=0.01):
    transforms = [t for layer in transformed_layers(model) for _, t in layer.transforms]
    callbacks = [UpdatePruning()] if any(t.stage == PRUNE for t in transforms) else []
    model.compile(keras.optimizers.Adam(rate), "mse", jit_compile=False)
    options = {"batch_size": 24, "verbose": 0, "shuffle": False}
    model.fit(*dense_data(), epochs=epochs, callbacks=callbacks, **options)
    return model


# What is clustered


def test_kernels_have_so_many_values_and_the_model_stays_as_it_was():
    model = dense_model()
    before = [np.array(weight) for weight in model.get_weights()]
    clustered = cluster(model, 8, seed=1)
    found = kernels(clustered)
    assert {name: distinct(kernel) for name, kernel in found.items()} == {"hidden": 8, "out": 8}
    for old, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)
    # Each weight has the value that is nearest to it.
    table = np.unique(found["hidden"])
    nearest = table[np.abs(before[0][..., None] - table).argmin(axis=-1)]
    np.testing.assert_array_equal(found["hidden"], nearest)
    x, _ = dense_data(8)
    plain = tfaccel.strip(clustered)
    assert [type(layer) for layer in plain.layers] == [layers.Dense, layers.Dense]
    np.testing.assert_array_equal(plain.predict(x, verbose=0), clustered.predict(x, verbose=0))


def test_choices_come_with_reasons():
    reasons = {c.layer.name: c.reason for c in selection_for(image_model(), 20)}
    assert reasons["first"] == "first convolution: few weights, all else rests on them"
    assert reasons["norm"] == reasons["depthwise"] == "no kernel"
    assert reasons["flatten"] == "no weights"
    assert reasons["second"] == "kernel: 576 weights in a table"
    small = {c.layer.name: c.reason for c in selection_for(dense_model(), 20)}
    assert small["out"] == "too small: 64 weights in a table, fewer than 80"
    tables = selection_for(image_model(), 20, per_channel=True)
    assert next(c for c in tables if c.layer.name == "second").reason.startswith("too small: 48")
    named = cluster(image_model(), 4, include=["first", "depthwise"])
    assert [layer.name for layer in transformed_layers(named)] == ["first", "depthwise"]
    rest = cluster(image_model(), 4, exclude="logits")
    assert [layer.name for layer in transformed_layers(rest)] == ["second"]


def test_recurrent_attention_and_embedding_layers():
    inputs = keras.Input((6,))
    x = layers.Embedding(20, 8, name="embedding")(inputs)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    model = keras.Model(inputs, layers.LSTM(8, name="lstm")(x))
    clustered = cluster(model, 4)
    keys = {
        layer.name: [key for key, _ in layer.transforms] for layer in transformed_layers(clustered)
    }
    parts = ("query", "key", "value", "attention_output")
    assert keys == {
        "embedding": ["embeddings"],
        "attention": [f"{part}/kernel" for part in parts],
        "lstm": ["lstm_cell/kernel", "lstm_cell/recurrent_kernel"],
    }
    plain = tfaccel.strip(clustered)
    assert distinct(plain.get_layer("attention").query_dense.kernel) == 4
    x = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(plain.predict(x, verbose=0), clustered.predict(x, verbose=0))


def test_channels_may_have_values_of_their_own():
    clustered = cluster(image_model(), 4, per_channel=True, seed=0)
    kernel = kernels(clustered)["second"]
    assert [distinct(kernel[..., channel]) for channel in range(12)] == [4] * 12
    assert distinct(kernel) == 48
    assert centroids_of(clustered, "second").shape == (12, 4)
    assert centroids_of(clustered, "logits").shape == (1, 4)  # a dense layer has one table
    one = kernels(cluster(image_model(), 4, seed=0))["second"]
    raw = np.asarray(image_model().get_layer("second").kernel)
    assert ((kernel - raw) ** 2).sum() < ((one - raw) ** 2).sum()


@pytest.mark.parametrize("refine", [False, True])
def test_linear_centroids_are_evenly_spaced_unless_refined(refine):
    table = np.sort(centroids_of(cluster(dense_model(), 6, initialization="linear", refine=refine)))
    raw = np.asarray(dense_model().layers[0].kernel)
    assert np.allclose(table, np.linspace(raw.min(), raw.max(), 6), atol=1e-6) != refine


# Gradients


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_gradients_of_centroids_are_those_of_their_weights(aggregation, per_channel):
    options = {"gradient_aggregation": aggregation, "per_channel": per_channel}
    clustered = cluster(image_model(), 4, include="second", seed=0, **options)
    layer, transform = transform_of(clustered, "second")
    plain = tfaccel.strip(clustered)
    x = np.random.default_rng(1).normal(size=(4, 8, 8, 2)).astype("float32")

    def gradients(model, variables):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x) ** 2)
        return [np.asarray(g) for g in tape.gradient(loss, [v.value for v in variables])]

    tables = transform.state["centroids"]
    found, raw = gradients(clustered, [tables, layer.variable("kernel")])
    (direct,) = gradients(plain, [plain.get_layer("second").kernel])
    np.testing.assert_allclose(raw, direct, rtol=1e-4, atol=1e-4)
    kernel = np.asarray(plain.get_layer("second").kernel)
    for row, table in enumerate(np.asarray(tables)):
        part = (..., row) if per_channel else ...
        for place, centroid in enumerate(table):
            own = direct[part][kernel[part] == centroid]
            expected = own.sum() if aggregation == "sum" else own.mean()
            np.testing.assert_allclose(found[row, place], expected, rtol=1e-4, atol=1e-3)


def test_weights_move_to_other_clusters():
    clustered = cluster(dense_model(), 4, seed=0)
    tables, before = centroids_of(clustered), kernels(clustered)["hidden"]
    train(clustered, epochs=6)
    after, moved = kernels(clustered)["hidden"], centroids_of(clustered)
    assert (tables != moved).all()
    assert distinct(after) == 4
    rank = [np.unique(kernel, return_inverse=True)[1] for kernel in (before, after)]
    assert (rank[0] != rank[1]).any()


def test_training_lowers_the_loss_on_either_path():
    losses = {}
    for jit in (False, True):
        clustered = cluster(dense_model(), 6, seed=0)
        x, y = dense_data()
        clustered.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=jit)
        history = clustered.fit(x, y, batch_size=24, epochs=8, verbose=0, shuffle=False)
        losses[jit] = history.history["loss"]
        assert losses[jit][-1] < 0.6 * losses[jit][0]
    np.testing.assert_allclose(losses[False], losses[True], rtol=1e-3)


# Zeros


def pruned_model(sparsity=0.75):
    pruned = prune(dense_model(), sparsity)
    update_masks(pruned, 0)
    return pruned


def test_zeros_of_a_mask_stay_zeros_and_zero_is_one_of_the_values():
    clustered = cluster(pruned_model(), 5, seed=0)
    assert transform_of(clustered, "hidden")[1].preserve_sparsity
    before = kernels(clustered)["hidden"] == 0
    assert before.mean() == 0.75
    kernel = kernels(train(clustered, epochs=4))["hidden"]
    masks = [np.asarray(t.state["mask"]) for _, t in clustered.layers[0].transforms[:1]]
    assert (kernel[~masks[0]] == 0).all()
    assert distinct(kernel) == 5
    assert 0 in kernel


def test_masks_go_on_while_clusters_train():
    pruned = prune(dense_model(), PolynomialDecay(0.0, 0.75, 2, 8, frequency=3))
    clustered = cluster(pruned, 6, seed=0)
    kernel = kernels(train(clustered, epochs=3))["hidden"]
    assert (kernel == 0).mean() >= 0.75
    assert distinct(kernel) <= 6


def test_zeros_of_a_stripped_kernel_stay_zeros():
    plain = tfaccel.strip(pruned_model())
    zeros = np.asarray(plain.layers[0].kernel) == 0
    kept = kernels(train(cluster(plain, 5, seed=0), rate=0.05))["hidden"]
    assert (kept[zeros] == 0).all()
    assert distinct(kept) <= 5
    free = kernels(train(cluster(plain, 5, seed=0, preserve_sparsity=False), rate=0.05))["hidden"]
    assert (free[zeros] != 0).any()


def test_sparsity_is_preserved_where_there_is_some():
    def preserved(model, **options):
        clustered = cluster(model, 5, **options)
        names = [layer.name for layer in transformed_layers(clustered)]
        return [transform_of(clustered, name)[1].preserve_sparsity for name in names]

    assert preserved(dense_model()) == [False, False]
    assert preserved(dense_model(), preserve_sparsity=True) == [True, True]
    assert preserved(prune(dense_model(), 0.5, include="out")) == [False, True]
    assert preserved(tfaccel.strip(pruned_model())) == [True, True]


# Files, precision, backends


@pytest.mark.parametrize("sparse", [False, True])
def test_saving_keeps_outputs_to_the_last_bit_and_training_goes_on(sparse, tmp_path):
    model = tfaccel.strip(pruned_model()) if sparse else dense_model()
    clustered = train(cluster(model, 5, seed=0))
    clustered.save(tmp_path / "clustered.keras")
    loaded = tfaccel.load_model(tmp_path / "clustered.keras")
    x, _ = dense_data(8)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), clustered.predict(x, verbose=0))
    np.testing.assert_array_equal(centroids_of(loaded), centroids_of(clustered))
    ours, theirs = (transform_of(m, "hidden")[1].get_config() for m in (clustered, loaded))
    assert ours == theirs
    for now, before in zip(
        kernels(train(loaded)).values(), kernels(train(clustered)).values(), strict=True
    ):
        np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_keeps_centroids_in_float32(policy):
    keras.config.set_dtype_policy(policy)
    try:
        clustered = cluster(dense_model(), 6, seed=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert transform_of(clustered, "hidden")[1].state["centroids"].dtype == "float32"
    kernel = kernels(train(clustered, epochs=1))["hidden"]
    assert kernel.dtype == np.float32
    assert distinct(kernel) == 6


ON_JAX = """
import keras, numpy as np, tfaccel
from tests.pruning.samples import dense_data, dense_model
from tfaccel.quantization.clustering import cluster

assert keras.backend.backend() == "jax"
model = cluster(dense_model(), 5, seed=0, gradient_aggregation="mean")
model.compile(keras.optimizers.Adam(0.01), "mse")
history = model.fit(*dense_data(), epochs=4, verbose=0).history["loss"]
assert history[-1] < history[0]
plain = tfaccel.strip(model)
assert len(np.unique(np.asarray(plain.layers[0].kernel))) == 5
x = dense_data(8)[0]
np.testing.assert_array_equal(plain.predict(x, verbose=0), model.predict(x, verbose=0))
print("done")
"""


@pytest.mark.exhaustive
def test_clusters_on_jax():
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    command = [sys.executable, "-c", ON_JAX]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "done" in run.stdout


# With quantization


def convolutions():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, use_bias=False, name="first")(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2D(12, 3, use_bias=False, name="second")(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(inputs, layers.Dense(6, name="out")(layers.Flatten()(x)))


def stored_kernels(path):
    """Kernels of a .tflite file as stored, output channels first, in the order of the operators."""
    file = TFLiteFile.read(path)
    found = []
    for operator in file.operators():
        if operator.name in ("CONV_2D", "FULLY_CONNECTED"):
            kernel = operator.inputs[1]
            found.append(file._values(kernel, 0).reshape(file.shape(kernel)))
    return found


def channels_first(kernel):
    return np.moveaxis(kernel, -1, 0)


@pytest.mark.parametrize("order", ["quantized last", "clustered last"])
def test_pruned_clustered_and_quantized_kernels_keep_zeros_and_values_in_the_file(order, tmp_path):
    pruned = prune(convolutions(), 0.7, seed=0)
    update_masks(pruned, 0)
    if order == "quantized last":
        model = quantize_aware(cluster(pruned, 5, seed=0))
    else:
        model = cluster(quantize_aware(pruned), 5, seed=0)
    stages = [[t.stage for _, t in layer.transforms] for layer in transformed_layers(model)]
    assert stages == [[2], [0, 1, 2], [0, 1, 2]]  # the first convolution is quantized alone
    random = np.random.default_rng(0)
    x = random.normal(size=(32, 8, 8, 3)).astype("float32")
    y = random.normal(size=(32, 6)).astype("float32")
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    model.fit(x, y, epochs=3, batch_size=16, verbose=0, callbacks=[UpdatePruning()])
    masks = [
        channels_first(np.asarray(layer.transforms[0][1].state["mask"]))
        for layer in transformed_layers(model)[1:]
    ]
    path = tfaccel.export.to_tflite(model, tmp_path / "model.tflite").path
    stored = stored_kernels(path)
    assert [kernel.dtype for kernel in stored] == [np.int8] * 3
    for kernel, mask in zip(stored[1:], masks, strict=True):
        kept = mask.reshape(kernel.shape)
        assert (kernel[~kept] == 0).all()
        assert (kernel == 0).mean() >= 0.69
        # Each channel has its own scale: of the five values, each has one integer in a channel.
        assert max(map(distinct, kernel)) <= 5
        assert distinct(kernel) >= 5


def test_a_float_file_has_the_values_and_folded_ones_have_them_by_channel(tmp_path):
    clustered = cluster(convolutions(), 5, seed=0)
    path = tfaccel.export.to_tflite(clustered, tmp_path / "model.tflite").path
    _, second, out = stored_kernels(path)
    assert distinct(out) == 5
    assert max(map(distinct, second)) <= 5


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"clusters": 1}, ValueError, "integer of 2 or more"),
        ({"clusters": 4.0}, TypeError, "clusters"),
        ({"initialization": "forgy"}, ValueError, "'linear', 'density'"),
        ({"gradient_aggregation": "max"}, ValueError, "'sum', 'mean'"),
        ({"refine": 1}, TypeError, "refine"),
        ({"preserve_sparsity": "yes"}, TypeError, "preserve_sparsity"),
        ({"include": "hiden"}, ValueError, "Did you mean 'hidden'"),
        ({"exclude": "*"}, ValueError, "nothing to cluster in 'dense'.*hidden: excluded"),
        ({"seed": "a"}, TypeError, "seed"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        cluster(dense_model(), **arguments)


def test_what_cannot_be_clustered_is_refused():
    class Custom(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(TypeError, match="subclassed"):
        cluster(Custom())
    with pytest.raises(ValueError, match="NearestCentroids already"):
        cluster(cluster(dense_model(), 4), 8)
    diverged = dense_model()
    diverged.layers[0].kernel.assign(np.full((12, 16), np.nan))
    with pytest.raises(ValueError, match="finite weights"):
        cluster(diverged)


def test_seeds_repeat():
    first, again, other = (
        centroids_of(cluster(dense_model(), 6, initialization="random", seed=seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
