"""Small quantization-aware models with known ranges, and how far their files are from them."""

import keras
import numpy as np
from keras import layers

from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.quantization import quantize_aware

IMAGE = (8, 8, 3)


def images(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *IMAGE)).astype("float32")


def conv(x, filters=4, size=3, name=None, **options):
    return layers.Conv2D(filters, size, name=name, **options)(x)


def network(body):
    """A float model whose biases, batch norms and slopes are random; some factors negative."""
    keras.utils.set_random_seed(6)
    inputs = keras.Input(IMAGE, name="image")
    model = keras.Model(inputs, body(inputs), name="small")
    random = np.random.default_rng(6)
    for weight in model.weights:
        if len(weight.shape) == 1:
            low = 0.5 if "variance" in weight.path else -0.5
            weight.assign(random.uniform(low, 1.5, weight.shape))
    return model


def calibrate(aware, batches=4):
    """Shows a quantization-aware model some data, as training does; batch norm learns from it."""
    for seed in range(batches):
        aware(images(64, seed), training=True)
    return aware


def aware_network(body, **options):
    """A float model and the quantization-aware one of it, with ranges."""
    model = network(body)
    return model, calibrate(quantize_aware(model, **options))


def steps_apart(path, aware, x):
    """Distances between file and Keras in steps of the file's output, or 1/255 of a float's."""
    file = TFLiteModel(path)
    expected = np.asarray(aware(x, training=False))
    step = file.outputs[0].scale or np.ptp(expected) / 255
    return np.abs(file.predict(x) - expected) / step
