"""The networks compute what those of keras.applications do, once they have the same weights."""

import keras
import numpy as np
import pytest

from tfaccel.architectures import (
    VGG16,
    VGG19,
    MobileNetV1,
    MobileNetV2,
    MobileNetV3Large,
    MobileNetV3Small,
)

applications = keras.applications
PLAIN = {"weights": None, "classes": 7, "classifier_activation": None}
THIRD = {**PLAIN, "include_preprocessing": False}


def slim(theirs, size):
    return theirs((size, size, 3), **PLAIN)


# The 75 pixels are odd at several strides, where "same" padding differs from side to side.
CASES = {
    "VGG16": (
        lambda: applications.VGG16(input_shape=(32, 32, 3), **PLAIN),
        lambda: VGG16((32, 32, 3), 7, hidden=(4096, 4096)),
        32,
    ),
    "VGG19": (
        lambda: applications.VGG19(input_shape=(32, 32, 3), **PLAIN),
        lambda: VGG19((32, 32, 3), 7, hidden=(4096, 4096)),
        32,
    ),
    "MobileNet": (
        lambda: applications.MobileNet((96, 96, 3), alpha=0.5, **PLAIN),
        lambda: MobileNetV1((96, 96, 3), 7, 0.5, output_stride=32),
        96,
    ),
    "MobileNetV2 0.35": (
        lambda: applications.MobileNetV2((96, 96, 3), alpha=0.35, **PLAIN),
        lambda: MobileNetV2((96, 96, 3), 7, 0.35, output_stride=32),
        96,
    ),
    "MobileNetV2 1.4": (
        lambda: applications.MobileNetV2((75, 75, 3), alpha=1.4, **PLAIN),
        lambda: MobileNetV2((75, 75, 3), 7, 1.4, output_stride=32),
        75,
    ),
    "MobileNetV3Small 0.75": (
        lambda: applications.MobileNetV3Small((75, 75, 3), alpha=0.75, **THIRD),
        lambda: MobileNetV3Small((75, 75, 3), 7, 0.75, output_stride=32),
        75,
    ),
    "MobileNetV3Small 0.35": (
        lambda: applications.MobileNetV3Small((64, 64, 3), alpha=0.35, **THIRD),
        lambda: MobileNetV3Small((64, 64, 3), 7, 0.35, output_stride=32),
        64,
    ),
    "MobileNetV3Large": (
        lambda: applications.MobileNetV3Large((96, 96, 3), **THIRD),
        lambda: MobileNetV3Large((96, 96, 3), 7, output_stride=32),
        96,
    ),
    "MobileNetV3Large 1.25": (
        lambda: applications.MobileNetV3Large((75, 75, 3), alpha=1.25, **THIRD),
        lambda: MobileNetV3Large((75, 75, 3), 7, 1.25, output_stride=32),
        75,
    ),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_equal(name):
    make_theirs, make_ours, size = CASES[name]
    theirs, ours = make_theirs(), make_ours()
    random = np.random.default_rng(0)
    # Batch-norm statistics and biases that are not the neutral ones.
    weights = [
        random.uniform(0.5, 1.5, w.shape) if w.ndim == 1 else w for w in theirs.get_weights()
    ]
    theirs.set_weights(weights)
    # Where theirs has a 1 x 1 convolution of one pixel at the end, ours has a dense layer.
    shapes = [w.shape for w in ours.weights]
    assert [int(np.prod(shape)) for shape in shapes] == [w.size for w in weights]
    ours.set_weights([w.reshape(shape) for w, shape in zip(weights, shapes, strict=True)])
    x = random.normal(size=(2, size, size, 3)).astype("float32")
    expected = np.asarray(theirs(x, training=False)).reshape(2, 7)
    spread = expected.std()
    assert spread > 1e-3
    np.testing.assert_allclose(ours(x, training=False), expected, rtol=1e-5, atol=1e-4 * spread)
