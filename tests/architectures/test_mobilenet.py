import keras
import numpy as np
import pytest

from tfaccel.architectures import MobileNetV2


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
