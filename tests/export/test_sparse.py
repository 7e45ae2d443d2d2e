"""Zeros that are not stored: smaller files with the same outputs."""

import keras
import numpy as np
import pytest
from keras import layers

import tfaccel
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.pruning import prune, update_masks


def pruned_network(sparsity, pattern="element"):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(16, 3, activation="relu", name="first")(inputs)
    x = layers.Conv2D(32, 3, strides=2, activation="relu", name="wide")(x)
    x = layers.Conv2D(64, 1, activation="relu", name="pointwise")(x)
    x = layers.Dense(128, activation="relu", name="hidden")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, layers.Dense(4, name="logits")(x))
    pruned = prune(model, sparsity, pattern=pattern)
    update_masks(pruned, 0)
    return tfaccel.strip(pruned)


@pytest.mark.parametrize(
    ("sparsity", "pattern"), [(0.9, "element"), (0.5, "2:4"), (0.9, "4x1"), (0.8, "channel")]
)
def test_outputs_are_the_dense_files(sparsity, pattern, tmp_path):
    model = pruned_network(sparsity, pattern)
    x = np.random.default_rng(0).normal(size=(4, 12, 12, 3)).astype("float32")
    dense = tfaccel.export.to_tflite(model, tmp_path / "dense.tflite")
    sparse = tfaccel.export.to_tflite(model, tmp_path / "sparse.tflite", sparse=True, verify_data=x)
    expected, found = (TFLiteModel(file.path).predict(x) for file in (dense, sparse))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert sparse.size_bytes < dense.size_bytes
    assert sparse.verification.max_abs_error < 1e-5


def test_a_file_of_nine_tenths_zeros_is_a_fraction_of_the_dense_one(tmp_path):
    model = pruned_network(0.9)
    sizes = [
        tfaccel.export.to_tflite(model, tmp_path / "model.tflite", sparse=sparse).size_bytes
        for sparse in (False, True)
    ]
    kernels = 9 * 16 * 32 + 32 * 64 + 64 * 128 + 128 * 4
    # At least two thirds of the pruned kernels' zeros are gone; indices take the rest.
    assert sizes[0] - sizes[1] > 0.9 * 4 * kernels * 2 / 3


def test_quantized_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"sparse=True is for 'float32'.*'dynamic_int8'.*wrong"):
        tfaccel.export.to_tflite(
            pruned_network(0.9), tmp_path / "model.tflite", "dynamic_int8", sparse=True
        )
    assert not list(tmp_path.iterdir())
