"""By what a file on disk knows the model and the data that it was made of."""

import hashlib
from typing import Any

import keras
import numpy as np

from tfaccel.core import keras_private

_SAMPLES = 64


def hash_model(model: keras.Model) -> str:
    """Returns the SHA-256 of what a model computes with, in hexadecimal.

    That is its weights, and the classes and activations of its layers, whatever their names.
    """
    digest = hashlib.sha256()
    for layer in keras_private.sublayers(model):
        activation = getattr(getattr(layer, "activation", None), "__name__", None)
        digest.update(f"{type(layer).__name__} {activation}\n".encode())
    for weight in model.weights:
        # bfloat16 has no numpy type of its own, and float32 holds all of its values.
        value = np.ascontiguousarray(keras.ops.convert_to_numpy(weight))
        digest.update(f"{weight.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def hash_data(x: Any) -> str:
    """Returns the SHA-256 of shape, type and up to 64 samples of arrays, in hexadecimal.

    The samples are evenly spaced, first and last among them, so that arrays beyond memory are not
    read as a whole. Order counts.

    Args:
        x: an array, or a structure of arrays of the same length.
    """
    digest = hashlib.sha256()
    for array in keras.tree.flatten(x):
        digest.update(f"{array.dtype} {tuple(array.shape)}\n".encode())
        for place in sample_places(len(array)):
            digest.update(np.ascontiguousarray(array[place : place + 1]).tobytes())
    return digest.hexdigest()


def sample_places(size: int, count: int = _SAMPLES) -> list[int]:
    """Returns up to `count` evenly spaced places in [0, size), first and last among them.

    >>> sample_places(100, 4)
    [0, 33, 66, 99]
    >>> sample_places(3, 4)
    [0, 1, 2]
    """
    return sorted({int(place) for place in np.linspace(0, size - 1, min(size, count))})
