import keras
import numpy as np
import pytest

from tfaccel.architectures import MobileNetV2
from tfaccel.measurement import count


def test_counts_of_the_paper():
    counts = count(MobileNetV2())
    assert counts.parameters == 3_538_984
    assert counts.macs == pytest.approx(300e6, rel=0.01)


@pytest.mark.parametrize(("width", "size"), [(0.35, 96), (1.4, 75)])
def test_equals_keras_applications_with_its_weights(width, size):
    theirs = keras.applications.MobileNetV2(
        (size, size, 3), alpha=width, weights=None, classes=7, classifier_activation=None
    )
    ours = MobileNetV2((size, size, 3), 7, width, output_stride=32)
    random = np.random.default_rng(0)
    # Batch-norm statistics that are not the neutral ones.
    weights = [
        random.uniform(0.5, 1.5, w.shape) if w.ndim == 1 else w for w in theirs.get_weights()
    ]
    theirs.set_weights(weights)
    ours.set_weights(weights)
    x = random.normal(size=(2, size, size, 3)).astype("float32")
    expected = theirs(x, training=False)
    assert float(keras.ops.max(keras.ops.abs(expected))) > 0.1
    np.testing.assert_allclose(ours(x, training=False), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "before_pooling"),
    # Strides of 2: up to 64 pixels three of them, beyond that five.
    [((8, 8, 1), 1), ((32, 32, 3), 4), ((64, 64, 3), 8), ((65, 65, 3), 3), ((96, 96, 3), 3)],
)
def test_stride_suits_the_image(shape, before_pooling):
    model = MobileNetV2(shape, 10, 0.35)
    assert model.get_layer("last").output.shape[1:3] == (before_pooling, before_pooling)
    assert model.output_shape == (None, 10)


@pytest.mark.parametrize(("output_stride", "size"), [(8, 12), (16, 6), (32, 3)])
def test_output_stride(output_stride, size):
    model = MobileNetV2((96, 96, 3), 2, 0.35, output_stride=output_stride)
    assert model.get_layer("last").output.shape[1] == size


def test_gives_logits_or_what_is_asked_for():
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype("float32")
    logits = MobileNetV2((8, 8, 1), 5, 0.35, last_channels=32)
    assert logits.layers[-1].activation is keras.activations.linear
    assert logits.get_layer("last").filters == 32
    model = MobileNetV2(
        (8, 8, 1), 5, 0.35, last_channels=32, dropout=0.2, classifier_activation="softmax"
    )
    assert model.get_layer("dropout").rate == 0.2
    model.set_weights(logits.get_weights())
    np.testing.assert_allclose(model(x), keras.ops.softmax(logits(x)), atol=1e-6)


def test_survives_save_and_load(tmp_path):
    model = MobileNetV2((8, 8, 1), 5, 0.35, name="tiny")
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype("float32")
    np.testing.assert_array_equal(model(x), loaded(x))
    assert loaded.name == "tiny"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (32, 32)}, "input_shape must be"),
        ({"input_shape": (None, 32, 3)}, "input_shape must be"),
        ({"classes": 0}, "classes must be above 0"),
        ({"width": 0}, "width must be above 0"),
        ({"dropout": 1.0}, "dropout must be a fraction"),
        ({"output_stride": 4}, "output_stride must be one of"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MobileNetV2(**{"input_shape": (32, 32, 3), "classes": 10, **arguments})
