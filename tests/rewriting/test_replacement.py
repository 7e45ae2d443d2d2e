import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tests.comparing import assert_same_outputs, fingerprint, flat_outputs
from tests.random_models import random_inputs, random_model
from tfaccel.core.transforms import TransformedLayer
from tfaccel.pruning import prune, update_masks
from tfaccel.reporting import diff
from tfaccel.rewriting.replacement import replace_layers


def again(layer):
    """What a rewrite that changes nothing would build."""
    if isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D, layers.MultiHeadAttention)):
        return type(layer).from_config(layer.get_config())
    return None


@pytest.fixture
def model():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, activation="swish", name="conv")(inputs)
    x = layers.ReLU(name="relu")(x)
    x = layers.Conv2D(4, 3, name="last")(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool")(x), name="net")


def sample(model, seed=0):
    shape = (2, *model.input_shape[1:])
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16))
def test_layers_of_the_same_config_are_the_same_model(seed):
    model = random_model(seed)
    was, x = fingerprint(model), random_inputs(model, seed)
    same = replace_layers(model, lambda layer: True, again)
    assert_same_outputs(model, same, x)
    assert [change.change for change in diff(model, same).layers].count("same") == len(
        diff(model, same).layers
    )
    assert fingerprint(model) == was


@settings(max_examples=10)
@given(seed=st.integers(0, 2**16))
def test_a_layer_behind_each_convolution_on_random_models(seed):
    """A chain: the copy of the layer itself, then one that changes nothing."""
    model = random_model(seed)
    x = random_inputs(model, seed)
    longer = replace_layers(
        model,
        lambda layer: isinstance(layer, layers.Conv2D),
        lambda layer: [layer, layers.Identity()],
    )
    assert_same_outputs(model, longer, x)


def test_weights_of_the_same_shapes_are_carried_over(model):
    was = fingerprint(model)
    smooth = replace_layers(
        model, "conv", lambda old: layers.Conv2D(old.filters, 3, activation="hard_swish")
    )
    for ours, theirs in zip(smooth.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert smooth.get_layer("conv").activation is keras.activations.hard_swish
    assert [layer.name for layer in smooth.layers] == [layer.name for layer in model.layers]
    assert fingerprint(model) == was


def test_a_built_layer_keeps_its_own_weights(model):
    def zeros(old):
        new = layers.Conv2D(4, 3, name="mine")
        new.build(old.get_build_config()["input_shape"])
        new.set_weights([np.zeros(weight.shape) for weight in old.weights])
        return new

    dead = replace_layers(model, "last", zeros)
    assert not np.any(dead(sample(model)))
    assert dead.get_layer("last").name == "last"


def test_other_shapes_begin_fresh_and_only_one_layer_inherits(model):
    def deeper(old):
        return [
            layers.Conv2D(5, 1, kernel_initializer="ones"),  # other shapes
            layers.Conv2D(4, 1, kernel_initializer="ones"),
            layers.Conv2D(4, 3, kernel_initializer="zeros", name="mine"),  # those of the old one
            layers.ZeroPadding2D(1),
            layers.Conv2D(4, 3, kernel_initializer="ones"),  # those too
        ]

    deep = replace_layers(model, "last", deeper)
    names = [layer.name for layer in deep.layers if "last" in layer.name or layer.name == "mine"]
    assert names == ["last_1", "last_2", "mine", "last_3", "last"]
    assert np.all(deep.get_layer("last_1").kernel == 1.0)
    np.testing.assert_array_equal(deep.get_layer("mine").kernel, model.get_layer("last").kernel)
    assert np.all(deep.get_layer("last").kernel == 1.0)


def test_a_model_can_take_the_place_of_a_layer(model):
    def bottleneck(old):
        inputs = keras.Input((4, 4, 4))
        y = layers.Conv2D(2, 1, name="down")(inputs)
        return keras.Model(inputs, layers.Conv2D(old.filters, 3, name="up")(y))

    nested = replace_layers(model, "last", bottleneck)
    assert isinstance(nested.get_layer("last"), keras.Model)
    assert nested.get_layer("last").get_layer("down").filters == 2
    unbuilt = replace_layers(model, "last", lambda old: keras.Sequential([layers.Conv2D(4, 3)]))
    assert unbuilt.output_shape == model.output_shape


def test_classes_names_patterns_and_predicates_match(model):
    def matched(match):
        seen = []
        replace_layers(model, match, lambda layer: seen.append(layer.name))
        return seen

    assert matched(layers.Conv2D) == ["conv", "last"]
    assert matched((layers.ReLU, layers.GlobalAveragePooling2D)) == ["relu", "pool"]
    assert matched("*l*") == ["relu", "last", "pool"]
    assert matched(["conv", "pool"]) == ["conv", "pool"]
    assert matched(lambda layer: layer.name > "last") == ["relu", "pool"]
    assert matched(lambda layer: False) == []
    with pytest.raises(ValueError, match=r"Dense is no layer of 'net', which has Conv2D, Global"):
        matched(layers.Dense)
    with pytest.raises(ValueError, match="matches no layer"):
        matched("cov")
    with pytest.raises(TypeError, match="3"):
        matched(3)


def test_shared_layers_stay_shared_and_nested_ones_are_found():
    inputs = keras.Input((6, 6, 3))
    shared = layers.Conv2D(3, 3, padding="same", name="shared")
    inner_in = keras.Input((6, 6, 3))
    inner = keras.Model(inner_in, layers.ReLU(name="relu")(shared(inner_in)), name="inner")
    model = keras.Model(inputs, shared(inner(shared(inputs))) + inner(inputs))
    built = []

    def build(old):
        built.append(old.name)
        return [layers.Conv2D(3, 3, padding="same"), layers.Activation("linear")]

    x = sample(model)
    replaced = replace_layers(model, layers.Conv2D, build)
    assert built == ["shared"]
    assert sum(np.prod(w.shape) for w in replaced.weights) == 3 * 3 * 3 * 3 + 3
    np.testing.assert_allclose(replaced(x), model(x), rtol=1e-5, atol=1e-6)
    loud = replace_layers(model, "relu", lambda old: layers.ReLU(negative_slope=0.5))
    assert loud.get_layer("inner").get_layer("relu").negative_slope == 0.5
    assert np.abs(np.asarray(loud(x)) - np.asarray(model(x))).max() > 1e-4


def test_a_layer_of_several_tensors_is_replaced_by_one():
    inputs = keras.Input((4,))
    total = layers.Add(name="sum")([inputs, layers.Dense(4)(inputs)])
    model = keras.Model(inputs, total)
    x = sample(model)
    largest = replace_layers(model, layers.Add, lambda old: layers.Maximum())
    dense = np.asarray(model.layers[1](x))
    np.testing.assert_allclose(largest(x), np.maximum(x, dense), rtol=1e-6)
    with pytest.raises(ValueError, match=r"'sum' \(Add\) is called with 2 tensors"):
        replace_layers(model, layers.Add, lambda old: [layers.Add(), layers.ReLU()])


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda old: layers.Conv2D(5, 3), ValueError, r"gives \(None, 4, 4, 5\), but 'conv' gives"),
        (lambda old: layers.Flatten(), ValueError, r"gives \(None, 108\), but 'conv' gives"),
        (lambda old: layers.Conv1D(4, 3), ValueError, r"'conv' cannot be called .* Conv1D refuses"),
        (lambda old: [layers.ReLU(), "relu"], TypeError, "for 'conv' it returned"),
        (lambda old: [], TypeError, r"for 'conv' it returned \[\]"),
        (lambda old: 3, TypeError, "for 'conv' it returned 3"),
        (lambda old: [layers.ReLU(), layers.ReLU(), old, old], ValueError, "twice, for 'conv'"),
    ],
)
def test_what_does_not_fit_names_the_layer(model, build, error, words):
    was = fingerprint(model)
    with pytest.raises(error, match=words):
        replace_layers(model, "conv", build)
    assert fingerprint(model) == was


def test_layers_of_the_model_and_layers_used_twice_are_refused(model):
    with pytest.raises(ValueError, match="For 'conv' build returned 'last', a layer of 'net'"):
        replace_layers(model, "conv", lambda old: model.get_layer("last"))
    one = layers.Activation("relu")
    with pytest.raises(ValueError, match="twice, for 'relu' and for 'pool'"):
        replace_layers(model, ["relu", "pool"], lambda old: one)


def test_wrapped_layers_are_refused_and_stay_where_left_alone(model):
    pruned = prune(model, 0.5)
    update_masks(pruned, 0)
    wrapped = [x.name for x in pruned.layers if isinstance(x, TransformedLayer)]
    kept = replace_layers(pruned, "relu", lambda old: layers.ReLU(6.0))
    assert [x.name for x in kept.layers if isinstance(x, TransformedLayer)] == wrapped == ["last"]
    with pytest.raises(ValueError, match="'last', which is wrapped"):
        replace_layers(pruned, "last", again)


def test_replaced_models_are_saved_and_loaded(model, tmp_path):
    chain = replace_layers(
        model, layers.Conv2D, lambda old: [old, layers.BatchNormalization(), layers.ReLU()]
    )
    assert [layer.name for layer in chain.layers][1:4] == ["conv_1", "conv_2", "conv"]
    chain.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = sample(model)
    for ours, theirs in zip(flat_outputs(loaded, x), flat_outputs(chain, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_models_without_a_graph_are_refused():
    class Own(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(TypeError, match="subclassed"):
        replace_layers(Own(), "a", again)
    with pytest.raises(ValueError, match="no weights yet"):
        replace_layers(keras.Sequential([layers.Dense(3)]), "dense", again)
