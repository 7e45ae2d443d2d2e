"""What a weight is worth: the lowest scores are pruned first."""

import dataclasses
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.configurable import Configurable
from tfaccel.core.registry import Registry

Array = npt.NDArray[Any]


class Criterion(Configurable):
    """Base class: scores the single weights of one kernel.

    A subclass is a dataclass registered with Keras, so that a model in mid-training can be saved.
    """

    def __call__(self, weight: Array, seed: int) -> Array:
        """Returns a score for each weight, in the kernel's shape; the highest are kept.

        Args:
            weight: the raw kernel.
            seed: a number of this kernel alone, the same at every call.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(weight, seed).")


CRITERIA: Registry[Criterion] = Registry("criterion", Criterion)


@CRITERIA.register("magnitude")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class Magnitude(Criterion):
    """The absolute value (Han 2015; Zhu & Gupta 2017).

    >>> Magnitude()(np.array([-3.0, 1.0]), seed=0)
    array([3., 1.])
    """

    def __call__(self, weight: Array, seed: int) -> Array:  # noqa: ARG002
        """Returns |weight|."""
        return np.abs(weight)


@CRITERIA.register("random")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class Random(Criterion):
    """A random order, the control arm that any criterion has to beat.

    The order of a kernel stays the same throughout training: a rising sparsity only adds zeros.
    """

    def __call__(self, weight: Array, seed: int) -> Array:
        """Returns scores drawn from [0, 1)."""
        return np.random.default_rng(seed).random(weight.shape)
