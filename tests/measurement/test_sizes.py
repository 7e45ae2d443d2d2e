import gzip

import keras
import numpy as np
import pytest
from keras import layers

from tests.measurement.masks import Masked
from tests.measurement.tflite_samples import classifier, convert
from tfaccel.core.transforms import transform_model, transformed_layers
from tfaccel.measurement import measure_gzip_size, measure_sparsity


def test_gzip_size_is_that_of_the_compressed_file(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(10_000) + np.random.default_rng(0).bytes(1000))
    size = measure_gzip_size(path)
    assert 1000 < size < 1200
    assert size == len(gzip.compress(path.read_bytes(), 9))
    assert measure_gzip_size(path) == size


def half_zero():
    """A convolution of 108 weights with 27 zeros, a dense layer of 16 with 4, and biases."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4),
        ]
    )
    conv = np.random.default_rng(0).uniform(0.5, 1.0, (3, 3, 3, 4))
    conv[..., 0] = 0.0
    dense = np.random.default_rng(0).uniform(0.5, 1.0, (4, 4))
    dense[0] = 0.0
    model.set_weights([conv, np.zeros(4), dense, np.zeros(4)])
    return model


def test_sparsity_of_a_model():
    assert measure_sparsity(half_zero()) == 31 / 124


@pytest.mark.parametrize("scheme", ["float32", "float16", "dynamic", "int8"])
def test_sparsity_of_a_file(scheme, tmp_path):
    path = convert(half_zero(), tmp_path / "m.tflite", scheme=scheme)
    assert measure_sparsity(path) == 31 / 124


def test_sparsity_of_a_keras_file(tmp_path):
    half_zero().save(tmp_path / "m.keras")
    assert measure_sparsity(tmp_path / "m.keras") == 31 / 124


def test_masks_count_as_applied():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, kernel_initializer="ones")])
    masked = transform_model(model, lambda _: {"kernel": Masked()})
    ((_, transform),) = transformed_layers(masked)[0].transforms
    transform.state["mask"].assign(np.eye(4, 5))
    assert measure_sparsity(masked) == 16 / 20
    assert measure_sparsity(model) == 0.0


def test_biases_of_two_dimensions_are_no_kernels():
    inputs = keras.Input((3, 4))
    model = keras.Model(inputs, layers.MultiHeadAttention(2, 3)(inputs, inputs))
    assert measure_sparsity(model) == 0.0  # its biases are all zero


def test_no_kernel_no_sparsity(tmp_path):
    model = keras.Sequential([keras.Input((4, 4, 2)), layers.MaxPooling2D()])
    assert measure_sparsity(model) is None
    assert measure_sparsity(convert(model, tmp_path / "m.tflite")) is None


def test_bad_files_and_models_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        measure_sparsity(tmp_path / "missing.keras")
    with pytest.raises(FileNotFoundError, match="no file"):
        measure_gzip_size(tmp_path / "missing")
    path = convert(classifier(), tmp_path / "m.tflite")
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match="cut off"):
        measure_sparsity(path)
    with pytest.raises(TypeError, match=r"needs a keras\.Model"):
        measure_sparsity([])
