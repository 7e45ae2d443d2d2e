"""Mean and variance of every channel, worked out from batch normalization without any data.

What leaves batch norm has, over the training data, mean beta and standard deviation |gamma| in each
channel (Nagel et al. 2019, section 4.2.1). From there the moments are followed through the graph as
if channels were normal and independent.
"""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from tfaccel.core.transforms import TransformedLayer
from tfaccel.core.walking import walk
from tfaccel.quantization.patches import AS_MATRICES, bias_of, to_matrices

Array = npt.NDArray[Any]

_SAME = (
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Dropout,
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.Identity,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.UpSampling1D,
    layers.UpSampling2D,
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
)
_CEILINGS = {"relu": math.inf, "relu6": 6.0}


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance of each channel of a value, [channels]; empty if they are not known."""

    mean: Array
    variance: Array

    @property
    def known(self) -> bool:
        """Whether there are any."""
        return bool(self.mean.size)

    def divided_by(self, factors: Array | None) -> "Moments":
        """Returns the moments of the value with each channel divided by a factor."""
        if not self.known or factors is None:
            return self
        return Moments(self.mean / factors, self.variance / factors**2)


UNKNOWN = Moments(np.zeros(0), np.zeros(0))


def clipped_normal(mean: Array, deviation: Array, low: float, high: float) -> tuple[Array, Array]:
    """Returns mean and variance of a normal variable that is clipped to [low, high].

    Nagel et al. 2019, appendix C. Computed from the integrals of the two tails and of the middle.

    Args:
        mean: of the normal variable, any shape.
        deviation: its standard deviation, of the same shape.
        low: where it is clipped below.
        high: where it is clipped above; may be infinite.

    >>> mean, variance = clipped_normal(np.zeros(1), np.ones(1), 0.0, math.inf)
    >>> round(float(mean[0]), 4), round(float(variance[0]), 4)  # 1 / sqrt(2 pi), 1/2 - 1 / (2 pi)
    (0.3989, 0.3408)
    """
    sigma = np.maximum(deviation, 1e-12)
    alpha = (low - mean) / sigma
    beta = np.full_like(alpha, np.inf) if math.isinf(high) else (high - mean) / sigma
    below, above = _cumulative(alpha), 1 - _cumulative(beta)
    inside = 1 - below - above
    slopes = _density(alpha), _density(beta)
    # x = mean + sigma z within; the first and second moments of z there.
    first = slopes[0] - slopes[1]
    weighted = np.where(np.isfinite(beta), np.where(np.isfinite(beta), beta, 0) * slopes[1], 0.0)
    second = inside + alpha * slopes[0] - weighted
    top = 0.0 if math.isinf(high) else high
    clipped = low * below + top * above + mean * inside + sigma * first
    squares = mean**2 * inside + 2 * mean * sigma * first + sigma**2 * second
    squares = squares + low**2 * below + top**2 * above
    return clipped, np.maximum(squares - clipped**2, 0.0)


def _density(z: Array) -> Array:
    return np.exp(-0.5 * np.where(np.isfinite(z), z, 1e3) ** 2) / math.sqrt(2 * math.pi)


def _cumulative(z: Array) -> Array:
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in z.ravel()]).reshape(z.shape)


def follow_moments(model: keras.Model) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Returns what every layer or operation gets and gives, by its name.

    Of an operation that gives several values, as a split does, nothing is known.

    Args:
        model: a float model, its batch norm not folded.
    """
    gets: dict[str, Moments] = {}
    gives: dict[str, Moments] = {}

    def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
        given = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, Moments)]
        inner = operation.layer if isinstance(operation, TransformedLayer) else operation
        gets[operation.name] = given[0]
        outputs = keras.tree.flatten(operation.output)
        after = _after(inner, given) if len(outputs) == 1 else UNKNOWN
        gives[operation.name] = after
        return [after] * len(outputs)

    for _ in walk(model, [UNKNOWN] * len(model.inputs), call):
        pass
    return gets, gives


def _after(operation: Any, given: list[Moments]) -> Moments:
    if isinstance(operation, layers.BatchNormalization):
        return _after_norm(operation)
    if not all(moments.known for moments in given):
        return UNKNOWN
    first = given[0]
    if type(operation) in AS_MATRICES:
        return _activated(_after_kernel(operation, first), _built_in(operation))
    if isinstance(operation, layers.ReLU):
        if operation.negative_slope or operation.threshold:
            return UNKNOWN
        return _clip(first, math.inf if operation.max_value is None else operation.max_value)
    name = type(operation).__name__
    if name in ("Add", "Subtract") and len(given) > 1:
        signs = [1, *([1 if name == "Add" else -1] * (len(given) - 1))]
        means = [sign * x.mean for sign, x in zip(signs, given, strict=True)]
        return Moments(np.sum(means, axis=0), np.sum([x.variance for x in given], axis=0))
    if isinstance(operation, layers.Activation):
        return _activated(first, _built_in(operation))
    if name in ("Relu", "Relu6"):
        return _clip(first, _CEILINGS[name.lower()])
    return first if isinstance(operation, _SAME) else UNKNOWN


def _built_in(layer: Any) -> str:
    return str(getattr(layer.activation, "__name__", ""))


def _activated(moments: Moments, activation: str) -> Moments:
    if activation == "linear":
        return moments
    return _clip(moments, _CEILINGS[activation]) if activation in _CEILINGS else UNKNOWN


def _clip(moments: Moments, high: float) -> Moments:
    return Moments(*clipped_normal(moments.mean, np.sqrt(moments.variance), 0.0, high))


def _after_norm(norm: Any) -> Moments:
    channels = norm.moving_mean.shape[0]
    beta = keras.ops.convert_to_numpy(norm.beta) if norm.center else np.zeros(channels)
    gamma = keras.ops.convert_to_numpy(norm.gamma) if norm.scale else np.ones(channels)
    return Moments(np.asarray(beta, np.float64), np.asarray(gamma, np.float64) ** 2)


def _after_kernel(layer: Any, moments: Moments) -> Moments:
    weight = to_matrices(layer, np.asarray(keras.ops.convert_to_numpy(layer.kernel), np.float64))
    mean = np.matmul(spread(moments.mean, weight), weight) + bias_of(layer)
    variance = np.matmul(spread(moments.variance, weight), weight**2)
    return Moments(mean.ravel(), variance.ravel())


def spread(values: Any, weight: Array) -> Array:
    """Returns a number for each input channel as the row [groups, 1, k] that meets a kernel.

    Args:
        values: [channels].
        weight: [groups, k, n] the kernel.
    """
    split = np.asarray(values).reshape(len(weight), 1, -1)
    return np.tile(split, (1, 1, weight.shape[1] // split.shape[2]))
