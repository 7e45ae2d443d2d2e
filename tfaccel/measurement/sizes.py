"""What a file takes on a disk and in a download, and how much of it is zeros."""

import gzip
import os

import keras
import numpy as np

from tfaccel.core.artifacts import load_model
from tfaccel.core.checks import check_file, check_model
from tfaccel.core.graph import flat_layers
from tfaccel.core.stripping import bake_weights
from tfaccel.measurement.flatbuffer import TFLiteFile


def measure_gzip_size(path: str | os.PathLike[str]) -> int:
    """Returns the bytes of a file compressed with gzip at its highest level.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty.
    """
    content = check_file(path, "measure_gzip_size").read_bytes()
    return len(gzip.compress(content, compresslevel=9, mtime=0))


def measure_sparsity(model: keras.Model | str | os.PathLike[str]) -> float | None:
    """Returns the share of zeros among the kernels' weights.

    Kernels are weights of two dimensions and more that are no biases. Masks and other transforms of
    weights count as applied.

    Args:
        model: a built Functional or Sequential model, or a .keras or .tflite file.

    Returns:
        0 to 1, or None if there is no kernel.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the model is subclassed, or is no model.
        ValueError: the model is not built, or the file is damaged or of another kind.
    """
    if isinstance(model, (str, os.PathLike)):
        file = check_file(model, "measure_sparsity", suffixes=(".keras", ".tflite"))
        if file.suffix == ".tflite":
            return TFLiteFile.read(file).sparsity()
        model = load_model(file)
    check_model(model, "measure_sparsity")
    total = zeros = 0
    for layer in flat_layers(bake_weights(model)):
        for weight in layer.weights:
            if len(weight.shape) > 1 and not weight.name.endswith("bias"):
                values = keras.ops.convert_to_numpy(weight)
                total += values.size
                zeros += values.size - int(np.count_nonzero(values))
    return zeros / total if total else None
