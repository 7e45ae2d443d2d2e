"""What holds for every network: its arguments, its strides, plain Keras inside, save and load."""

import inspect

import keras
import numpy as np
import pytest

import tfaccel.architectures
from tests.architectures.networks import CLASSES, NETWORKS, SHAPE, small
from tfaccel.architectures import (
    NIN,
    VGG16,
    GoogLeNet,
    MobileNetV1,
    MobileNetV3Large,
    MobileNetV3Small,
    ShuffleNetV1,
    SqueezeNet,
)
from tfaccel.measurement import count

each = pytest.mark.parametrize("name", NETWORKS)
BUILDERS = {build.__name__: build for build, _, _ in NETWORKS.values()}


def images(count=3, shape=SHAPE):
    return np.random.default_rng(0).normal(size=(count, *shape)).astype("float32")


def test_the_table_has_every_network():
    public = {name for name in tfaccel.architectures.__all__ if name[0].isupper()}
    layers = {name for name in public if inspect.isclass(getattr(tfaccel.architectures, name))}
    assert public - layers - {"BERT", "Reformer"} == set(BUILDERS)  # those are for sequences


@pytest.mark.one_in(3)
@each
def test_plain_keras_that_survives_save_and_load(name, tmp_path):
    model = small(name)
    assert {type(layer).__module__.partition(".")[0] for layer in model.layers} == {"keras"}
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(model(images()), loaded(images()))
    assert loaded.name == model.name


@pytest.mark.one_in(3)
@each
def test_gives_logits_or_what_is_asked_for(name):
    logits = small(name)
    probabilities = small(name, classifier_activation="softmax", dropout=0.1, name="own_name")
    assert probabilities.name == "own_name"
    probabilities.set_weights(logits.get_weights())
    expected = keras.ops.softmax(logits(images()))
    np.testing.assert_allclose(probabilities(images()), expected, atol=1e-6)
    assert any(isinstance(layer, keras.layers.Dropout) for layer in probabilities.layers)
    without = small(name, dropout=0.0)
    assert not any(isinstance(layer, keras.layers.Dropout) for layer in without.layers)


@pytest.mark.one_in(3)
@each
def test_takes_odd_shapes_and_other_channels(name):
    build, width, own = NETWORKS[name]
    model = build((11, 18, 1), CLASSES, width, **own)
    assert model(images(2, (11, 18, 1))).shape == (2, CLASSES)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", BUILDERS)
def test_width_scales_about_with_its_square(name):
    build = BUILDERS[name]
    narrow, wide = (count(build((16, 16, 3), 5, width)).macs for width in (0.5, 1.0))
    # The stem and the classes scale with the width itself, and channels are rounded.
    assert 0.2 < narrow / wide < 0.4


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (32, 32)}, "input_shape must be"),
        ({"input_shape": (None, 32, 3)}, "input_shape must be"),
        ({"classes": 0}, "classes must be above 0"),
        ({"width": 0}, "width must be above 0"),
        ({"dropout": 1.0}, "dropout must be a fraction"),
    ],
)
def test_bad_arguments_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        BUILDERS[name](**{"input_shape": (32, 32, 3), "classes": 10, **arguments})


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (NIN, {"variant": "mnist"}, "variant must be one of"),
        (VGG16, {"hidden": (8, 0)}, "hidden must be above 0"),
        (GoogLeNet, {"output_stride": 4}, "output_stride must be one of 8, 16, 32"),
        (SqueezeNet, {"output_stride": 32}, "output_stride must be one of 4, 8, 16"),
        (SqueezeNet, {"version": "2"}, "version must be one of"),
        (MobileNetV1, {"output_stride": 1}, "output_stride must be one of"),
        (MobileNetV3Small, {"output_stride": 1}, "output_stride must be one of"),
        (ShuffleNetV1, {"groups": 5}, "groups must be one of"),
    ],
)
def test_own_bad_arguments_are_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build((32, 32, 3), 10, 0.25, **arguments)


# The last map before pooling: of 32 pixels an eighth (SqueezeNet: a quarter), of 96 the published.
STRIDES = [
    (NIN, {}, "class_maps", (8, 3)),
    (GoogLeNet, {}, "inception_5b_concat", (4, 3)),
    (SqueezeNet, {}, "class_maps", (8, 6)),
    (MobileNetV1, {}, "block_12_pointwise", (4, 3)),
    (MobileNetV3Small, {}, "last", (4, 3)),
    (MobileNetV3Large, {}, "last", (4, 3)),
    (ShuffleNetV1, {}, "stage_4_unit_3_add", (4, 3)),
]


@pytest.mark.parametrize(("build", "arguments", "layer", "sides"), STRIDES)
def test_stride_suits_the_image(build, arguments, layer, sides):
    for size, side in zip((32, 96), sides, strict=True):
        model = build((size, size, 3), 5, 0.25, **arguments)
        assert model.get_layer(layer).output.shape[1:3] == (side, side)


@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (GoogLeNet, "inception_5b_concat"),
        (MobileNetV1, "block_12_pointwise"),
        (MobileNetV3Small, "last"),
        (MobileNetV3Large, "last"),
        (ShuffleNetV1, "stage_4_unit_3_add"),
    ],
)
@pytest.mark.parametrize(("output_stride", "side"), [(8, 12), (16, 6), (32, 3)])
def test_output_stride(build, layer, output_stride, side):
    model = build((96, 96, 3), 5, 0.25, output_stride=output_stride)
    assert model.get_layer(layer).output.shape[1] == side


def test_vgg_has_smaller_hidden_layers_for_small_images():
    assert [VGG16((32, 32, 3), 10).get_layer("hidden_1").units] == [512]
    model = VGG16((65, 65, 3), 10, 0.125)
    assert [model.get_layer(f"hidden_{i}").units for i in (1, 2)] == [512, 512]
    assert model.get_layer("flatten").output.shape[-1] == 3 * 3 * 64


def test_auxiliary_heads_of_googlenet_can_be_dropped():
    model = GoogLeNet((32, 32, 3), 5, 0.125, auxiliary=True, classifier_activation="softmax")
    outputs = model(images(2, (32, 32, 3)))
    assert set(outputs) == {"logits", "auxiliary_1", "auxiliary_2"}
    for probabilities in outputs.values():
        np.testing.assert_allclose(keras.ops.sum(probabilities, -1), 1.0, rtol=1e-5)
    alone = keras.Model(model.input, model.output["logits"])
    expected = GoogLeNet((32, 32, 3), 5, 0.125)
    assert alone.count_params() == expected.count_params()


@pytest.mark.exhaustive
def test_googlenet_trains_with_its_auxiliary_heads():
    keras.utils.set_random_seed(0)
    model = GoogLeNet((16, 16, 3), 2, 0.125, auxiliary=True, batch_norm=True)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    heads = ("logits", "auxiliary_1", "auxiliary_2")
    model.compile(
        keras.optimizers.SGD(0.05),
        dict.fromkeys(heads, loss),
        loss_weights={"logits": 1.0, "auxiliary_1": 0.3, "auxiliary_2": 0.3},
    )
    x = images(16, (16, 16, 3))
    y = np.arange(16) % 2
    x[y == 1] += 0.5
    history = model.fit(x, dict.fromkeys(heads, y), epochs=8, verbose=0).history["loss"]
    assert history[-1] < 0.7 * history[0]


def test_vgg_without_hidden_layers():
    model = VGG16((16, 16, 3), 5, 0.125, hidden=())
    assert model.get_layer("logits").kernel.shape == (64, 5)
    assert "hidden_1" not in {layer.name for layer in model.layers}
