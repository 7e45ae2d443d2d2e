"""TFMOT's clustering code runs with another import line, and clusters as TFMOT does."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import tfaccel
from tests.compat import clustering_jobs
from tfaccel.compat.tfmot.clustering import keras as clustering
from tfaccel.core.transforms import transformed_layers
from tfaccel.pruning import prune, update_masks

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
LINEAR = clustering.CentroidInitialization.LINEAR


def data(size=48):
    random = np.random.default_rng(0)
    x = random.normal(size=(size, 20)).astype("float32")
    return x, x[:, :3].argmax(axis=1).astype("int64")


def dense_network():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((20,)),
            layers.Dense(20, activation="relu", name="hidden"),
            layers.Dense(3, name="logits"),
        ]
    )


def fit(model, epochs=1, **options):
    model.compile("adam", LOSS, jit_compile=False)
    model.fit(*data(), batch_size=16, epochs=epochs, verbose=0, **options)
    return model


def distinct(kernel):
    return len(np.unique(np.asarray(kernel)))


# The guide's ways, in words of our own


def test_a_whole_model_is_clustered_stripped_and_exported(tmp_path):
    base = dense_network()
    before = [np.array(weight) for weight in base.get_weights()]
    clustered = clustering.cluster_weights(
        base, number_of_clusters=3, cluster_centroids_init=LINEAR
    )
    exported = clustering.strip_clustering(fit(clustered))
    assert [type(layer) for layer in exported.layers] == [layers.Dense, layers.Dense]
    assert [distinct(layer.kernel) for layer in exported.layers] == [3, 3]
    for old, now in zip(before, base.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)
    assert tfaccel.export.to_tflite(exported, tmp_path / "clustered.tflite").size_bytes > 0


def test_some_layers_by_clone_model():
    base = dense_network()

    def only_hidden(layer):
        if layer.name == "hidden":
            return clustering.cluster_weights(layer, number_of_clusters=4)
        return layer

    model = keras.models.clone_model(base, clone_function=only_hidden)
    assert [layer.name for layer in transformed_layers(model)] == ["hidden"]
    exported = clustering.strip_clustering(fit(model))
    assert distinct(exported.layers[0].kernel) == 4
    assert distinct(exported.layers[1].kernel) == 60


@pytest.mark.parametrize("initialization", clustering.CentroidInitialization)
def test_layers_in_a_definition(initialization):
    settings = {"number_of_clusters": 6, "cluster_centroids_init": initialization}
    inputs = keras.Input((20,))
    x = clustering.cluster_weights(layers.Dense(16, activation="relu"), **settings)(inputs)
    functional = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))
    assert distinct(clustering.strip_clustering(functional).layers[1].kernel) <= 6


def test_sequential_definitions_with_an_input_shape_or_built_later():
    first = layers.Dense(16, activation="relu")
    sequential = keras.Sequential(
        [clustering.cluster_weights(first, 6, input_shape=(20,)), layers.Dense(3)]
    )
    assert sequential.built
    assert distinct(clustering.strip_clustering(fit(sequential)).layers[0].kernel) == 6

    def late():
        network = keras.Sequential([layers.Dense(16, name="late"), layers.Dense(3)])
        return clustering.cluster_weights(network, 6, LINEAR)

    built = late()
    built.build((None, 20))
    assert distinct(clustering.strip_clustering(fit(built)).layers[0].kernel) == 6
    with pytest.raises(ValueError, match=r"'late' begin by its weights.*model.build"):
        fit(late())


def test_attention_and_recurrent_layers_in_a_definition(tmp_path):
    inputs = keras.Input((6, 8))
    attention = layers.MultiHeadAttention(2, 4, name="attention")
    x = clustering.cluster_weights(attention, 5)(inputs, inputs)
    outputs = clustering.cluster_weights(layers.LSTM(8, name="lstm"), 5)(x)
    model = keras.Model(inputs, outputs)
    keys = {layer.name: [key for key, _ in layer.transforms] for layer in transformed_layers(model)}
    parts = ("query", "key", "value", "attention_output")
    assert keys["attention"] == [f"{part}/kernel" for part in parts]
    assert keys["lstm"] == ["lstm_cell/kernel", "lstm_cell/recurrent_kernel"]
    x = np.ones((8, 6, 8), "float32")
    model.save(tmp_path / "attention.keras")
    with clustering.cluster_scope():
        loaded = keras.models.load_model(tmp_path / "attention.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert distinct(clustering.strip_clustering(loaded).get_layer("lstm").cell.kernel) == 5


class Scaled(layers.Layer, clustering.ClusterableLayer):
    """A dense layer of the user's with a scale that is no kernel."""

    def build(self, input_shape):
        self.kernel = self.add_weight((input_shape[-1], 8), "random_normal", name="kernel")
        self.scale = self.add_weight((8,), "random_normal", name="kernel_scale")

    def call(self, x):
        return keras.ops.matmul(x, self.kernel) * self.scale

    def get_clusterable_weights(self):
        return [("kernel", self.kernel)]


class Unknown(layers.Layer):
    def call(self, x):
        return x


def test_layers_of_the_users_say_what_is_clustered():
    model = keras.Sequential([keras.Input((20,)), Scaled(), layers.Dense(3)])
    stripped = clustering.strip_clustering(fit(clustering.cluster_weights(model, 4)))
    assert (distinct(stripped.layers[0].kernel), distinct(stripped.layers[0].scale)) == (4, 8)
    assert Scaled().get_clusterable_algorithm("kernel") is None
    with pytest.raises(ValueError, match=r"does not know the layer .*Unknown"):
        clustering.cluster_weights(Unknown(), 4)
    with pytest.raises(ValueError, match=r"does not know the layer .*Unknown"):
        clustering.cluster_weights(keras.Sequential([keras.Input((20,)), Unknown()]), 4)


def test_training_goes_on_from_a_file(tmp_path):
    clustered = fit(clustering.cluster_weights(dense_network(), 4))
    clustered.save(tmp_path / "clustered.keras")
    loaded = keras.models.load_model(tmp_path / "clustered.keras")
    x, _ = data()
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), clustered.predict(x, verbose=0))
    wrapped = keras.Sequential(
        [keras.Input((20,)), clustering.cluster_weights(layers.Dense(4), 5, LINEAR, True)]
    )
    wrapped.save(tmp_path / "wrapped.keras")
    again = keras.models.load_model(tmp_path / "wrapped.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), wrapped.predict(x, verbose=0))
    ours, theirs = (
        {key: value for key, value in model.layers[0].get_config().items() if key != "layer"}
        for model in (wrapped, again)
    )
    assert ours == theirs
    assert distinct(clustering.strip_clustering(fit(loaded)).layers[0].kernel) == 4


def test_a_list_of_layers_and_one_that_is_clustered_already():
    given = [layers.InputLayer((20,)), layers.Dense(20), layers.Dense(3)]
    wrapped = clustering.cluster_weights(given, 4)
    assert [isinstance(x, clustering.ClusterWeights) for x in wrapped] == [False, True, True]
    assert clustering.cluster_weights(wrapped[1], 8) is wrapped[1]
    twice = clustering.cluster_weights(clustering.cluster_weights(dense_network(), 4), 8)
    assert distinct(clustering.strip_clustering(twice).layers[0].kernel) <= 4


def test_zeros_of_a_pruned_model_are_preserved():
    pruned = prune(dense_network(), 0.5)
    update_masks(pruned, 0)
    for base in (tfaccel.strip(pruned), pruned):
        clustered = clustering.cluster_weights(base, 5, LINEAR, preserve_sparsity=True)
        kernel = np.asarray(clustering.strip_clustering(fit(clustered)).layers[0].kernel)
        assert (kernel == 0).mean() >= 0.5
        assert distinct(kernel) <= 5


def test_few_weights_of_a_convolution_are_left_alone_with_a_warning():
    model = keras.Sequential([keras.Input((4, 4, 1)), layers.Conv2D(2, 2, name="small")])
    with pytest.warns(UserWarning, match="'small' is not clustered: 8 clusters for 8 weights"):
        assert not transformed_layers(clustering.cluster_weights(model, 8))
    with pytest.warns(UserWarning, match="4 clusters for 4 weights of each channel"):
        clustering.cluster_weights(model, 4, cluster_per_channel=True)
    assert transformed_layers(clustering.cluster_weights(model, 4))


# Against TFMOT itself


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    file = tmp_path_factory.mktemp("tfmot") / "kernels.json"
    command = [sys.executable, "-W", "ignore", str(Path(clustering_jobs.__file__)), str(file)]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads(file.read_text())


@pytest.mark.parametrize("case", clustering_jobs.CASES)
@pytest.mark.parametrize("who", ["ours", "handed over"])
def test_kernels_after_training_are_tfmots(case, who, kernels):
    started = (clustering_jobs.CONVOLUTION, clustering_jobs.DENSE)
    pairs = zip(kernels[f"{case} {who}"], kernels[f"{case} theirs"], strict=True)
    for (kernel, theirs), start in zip(pairs, started, strict=True):
        np.testing.assert_allclose(kernel, theirs, atol=1e-5)
        # They did train: the outermost centroid has left the largest weight.
        assert abs(np.max(kernel) - start.max()) > 1e-3


def test_every_name_of_tfmot_is_there_but_its_own_look_ups():
    assert set(clustering.__all__) - {"ClusterWeights"} == {
        "CentroidInitialization",
        "ClusterableLayer",
        "ClusteringSummaries",
        "cluster_scope",
        "cluster_weights",
        "strip_clustering",
    }


# Summaries and arguments


def test_summaries_hold_a_histogram_of_the_centroids(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    clustered = clustering.cluster_weights(dense_network(), 4)
    summaries = clustering.ClusteringSummaries(str(tmp_path / "a"), cluster_update_freq="batch")
    fit(clustered, callbacks=[summaries])
    epochs = clustering.ClusteringSummaries(str(tmp_path / "b"))
    fit(clustered, epochs=2, callbacks=[epochs])
    for folder, steps in (("a", [1, 2, 3]), ("b", [3, 6])):
        events = EventAccumulator(str(tmp_path / folder / "clustering"))
        events.Reload()
        tags = ["clustering/hidden/kernel", "clustering/logits/kernel"]
        assert sorted(events.Tags()["tensors"]) == tags
        assert [event.step for event in events.Tensors(tags[0])] == steps
    with pytest.raises(ValueError, match="log_dir"):
        clustering.ClusteringSummaries(log_dir="")


def test_wrong_arguments_say_what_is_right():
    with pytest.raises(ValueError, match="takes a Sequential or Functional"):
        clustering.cluster_weights("model", 4)
    for clusters, options in ((1, {}), (2, {"preserve_sparsity": True}), (2.5, {})):
        with pytest.raises(ValueError, match="number_of_clusters must be an integer of"):
            clustering.cluster_weights(layers.Dense(2), clusters, **options)
    with pytest.raises(ValueError, match=r"one of CentroidInitialization.LINEAR"):
        clustering.cluster_weights(layers.Dense(2), 4, "kmeans")
    with pytest.raises(ValueError, match="'SUM' or 'AVG'"):
        clustering.cluster_weights(layers.Dense(2), 4, cluster_gradient_aggregation="MAX")

    class Subclassed(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="subclassed"):
        clustering.cluster_weights(Subclassed(), 4)
    with pytest.raises(ValueError, match="strip_clustering"):
        clustering.strip_clustering("model")
