"""What a weight is worth: the lowest scores are pruned first."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.configurable import Configurable
from tfaccel.core.registry import Registry

Array = npt.NDArray[Any]


COMPUTED, LEARNED, GIVEN = "computed", "learned", "given"


class Criterion(Configurable):
    """Base class: scores the single weights of one kernel.

    A subclass is a dataclass registered with Keras, so that a model in mid-training can be saved.

    Attributes:
        source: where scores come from: COMPUTED from the weight when a mask is decided, LEARNED as
            a variable beside the weight, or GIVEN once by `prune` from data and a loss. Those of
            the last two are saved with the model.
    """

    source: ClassVar[str] = COMPUTED

    def __call__(self, weight: Array, seed: int, scores: Array | None = None) -> Array:
        """Returns a score for each weight, in the kernel's shape; the highest are kept.

        Args:
            weight: the raw kernel.
            seed: a number of this kernel alone, the same at every call.
            scores: what was learned or given; None for a criterion that computes.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(weight, seed).")

    def scores_from(self, products: Sequence[Array]) -> Array:
        """Returns the scores of a criterion that is given them.

        Args:
            products: for each batch, gradient of the mean loss times weight.
        """
        raise NotImplementedError(f"{type(self).__name__} must define scores_from(products).")


CRITERIA: Registry[Criterion] = Registry("criterion", Criterion)


@CRITERIA.register("magnitude")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class Magnitude(Criterion):
    """The absolute value (Han 2015; Zhu & Gupta 2017).

    >>> Magnitude()(np.array([-3.0, 1.0]), seed=0)
    array([3., 1.])
    """

    def __call__(self, weight: Array, seed: int, scores: Array | None = None) -> Array:  # noqa: ARG002
        """Returns |weight|."""
        return np.abs(weight)


@CRITERIA.register("random")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class Random(Criterion):
    """A random order, the control arm that any criterion has to beat.

    The order of a kernel stays the same throughout training: a rising sparsity only adds zeros.
    """

    def __call__(self, weight: Array, seed: int, scores: Array | None = None) -> Array:  # noqa: ARG002
        """Returns scores drawn from [0, 1)."""
        return np.random.default_rng(seed).random(weight.shape)


@CRITERIA.register("movement")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class Movement(Criterion):
    """Scores that are trained beside the weights (Sanh 2020, Movement pruning, hard top-v).

    A score falls by the learning rate times (gradient x weight): weights that move away from zero
    gain, those that shrink lose. Pruned weights rest, their scores go on and may bring them back.
    The scale of the scores does not matter, only their order, so the optimizer's learning rate
    serves. Meant for fine-tuning a trained model.
    """

    source: ClassVar[str] = LEARNED

    def __call__(self, weight: Array, seed: int, scores: Array | None = None) -> Array:  # noqa: ARG002
        """Returns what was learned."""
        return _present(scores)


@CRITERIA.register("snip")
@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class Snip(Criterion):
    """|gradient x weight| at the beginning, once (Lee 2019, SNIP, eq. 5).

    The sensitivity of the loss to a connection, taken on a batch before training: no schedule is
    needed. The paper ranks all layers together: prune(..., scope="global", criterion="snip").
    """

    source: ClassVar[str] = GIVEN

    def __call__(self, weight: Array, seed: int, scores: Array | None = None) -> Array:  # noqa: ARG002
        """Returns what was measured."""
        return _present(scores)

    def scores_from(self, products: Sequence[Array]) -> Array:
        """Returns the absolute value of the mean over the batches."""
        return np.abs(np.mean(products, axis=0))


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class Given(Criterion):
    """A function of the user's, from a kernel to scores of its shape.

    To save a model in mid-training, register the function with
    `keras.saving.register_keras_serializable`.
    """

    function: Callable[[Array], Any]

    def __call__(self, weight: Array, seed: int, scores: Array | None = None) -> Array:  # noqa: ARG002
        """Returns the function's scores.

        Raises:
            ValueError: they do not have the kernel's shape.
        """
        found = np.asarray(self.function(weight))
        if found.shape != weight.shape:
            raise ValueError(
                f"A criterion gives one score for each weight, so the shape {weight.shape}, but "
                f"{self.function!r} gave {found.shape}."
            )
        return found


def get(criterion: Any) -> Criterion:
    """Returns the criterion that a name, a config, an instance or a function of a kernel is."""
    if callable(criterion) and not isinstance(criterion, (Criterion, type)):
        return Given(criterion)
    return CRITERIA.get(criterion)


def _present(scores: Array | None) -> Array:
    if scores is None:
        raise ValueError("This criterion scores by what `prune` keeps beside the weight.")
    return scores
