"""How sparse the weights are at which training step, with TFMOT's names, arguments and numbers.

Steps are TFMOT's: step 1 is the forward pass before the first update of the weights. Step 0 lies
before training; TFMOT never asks for it, `UpdatePruning` does, so that a schedule that begins at 0
begins there.
"""

import dataclasses
from typing import Any, Protocol

import keras
import numpy as np

from tfaccel.core.checks import check_fraction, check_positive, check_type
from tfaccel.core.configurable import Configurable

_FOREVER = -1
_FAR = 10_000


class SparsitySchedule(Protocol):
    """Whatever says, for a step, whether to prune there and to what share of zeros."""

    def __call__(self, step: Any) -> tuple[Any, Any]:
        """Returns (prune at this step?, share of zeros in [0, 1))."""


class Schedule(Configurable):
    """Base of the schedules here: prune every `frequency` steps from `begin_step` to `end_step`."""

    begin_step: int
    end_step: int
    frequency: int

    def __call__(self, step: Any) -> tuple[bool, float]:
        """Returns whether to prune at a step, and the share of zeros there.

        Args:
            step: [] int, number of the training step.
        """
        return self.should_prune(int(step)), self.sparsity(int(step))

    def sparsity(self, step: int) -> float:
        """Returns the share of zeros at a step, in [0, 1)."""
        raise NotImplementedError(f"{type(self).__name__} must define sparsity(step).")

    def should_prune(self, step: int) -> bool:
        """Returns whether the masks change at a step."""
        ended = self.end_step != _FOREVER and step > self.end_step
        return step >= self.begin_step and not ended and self._turn(step) == step

    def last_due(self, after: int, upto: int) -> int | None:
        """Returns the last step in (after, upto] at which to prune, if there is one."""
        last = upto if self.end_step == _FOREVER else min(upto, self.end_step)
        if last < self.begin_step:
            return None
        turn = self._turn(last)
        return turn if turn > after else None

    def next_due(self, after: int) -> int | None:
        """Returns the first step past `after` at which to prune, if there is one."""
        following = max(self.begin_step, self._turn(after) + self.frequency)
        return following if self.should_prune(following) else None

    def _turn(self, step: int) -> int:
        return step - (step - self.begin_step) % self.frequency

    def _check(self, *, may_run_forever: bool) -> None:
        for name in ("begin_step", "end_step", "frequency"):
            value = getattr(self, name)
            check_type(name, value, (int, np.integer))
            # Steps are often computed with numpy, whose integers JSON cannot hold.
            object.__setattr__(self, name, int(value))
        if self.begin_step < 0:
            raise ValueError(f"begin_step must be 0 or above, but got {self.begin_step}.")
        check_positive("frequency", self.frequency)
        if self.end_step == _FOREVER and may_run_forever:
            return
        if self.end_step < self.begin_step:
            forever = ", or -1 to go on until training ends" if may_run_forever else ""
            raise ValueError(
                f"end_step must not be before begin_step={self.begin_step}{forever}, "
                f"but got {self.end_step}."
            )


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class ConstantSparsity(Schedule):
    """The same share of zeros at every pruning step.

    Args:
        target_sparsity: share of zeros, in [0, 1).
        begin_step: first training step at which to prune.
        end_step: last one; -1 for all of training.
        frequency: steps from one pruning to the next.

    Raises:
        ValueError: a share outside [0, 1), or steps out of order.

    >>> ConstantSparsity(0.5, begin_step=200)(300)
    (True, 0.5)
    """

    target_sparsity: float
    begin_step: int
    end_step: int = _FOREVER
    frequency: int = 100

    def __post_init__(self) -> None:
        check_fraction("target_sparsity", self.target_sparsity)
        self._check(may_run_forever=True)

    def sparsity(self, step: int) -> float:  # noqa: ARG002
        """Returns the target, as float32 holds it."""
        return float(np.float32(self.target_sparsity))


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class PolynomialDecay(Schedule):
    """A share of zeros that grows fast at first and levels off (Zhu & Gupta 2017, eq. 1).

    s(t) = final + (initial - final) · (1 - (t - begin) / (end - begin))^power

    Args:
        initial_sparsity: share of zeros at `begin_step`, in [0, 1).
        final_sparsity: share of zeros at `end_step`, in [0, 1).
        begin_step: first training step at which to prune.
        end_step: last one. The final share is reached only if `frequency` divides the span.
        power: exponent; the paper has 3.
        frequency: steps from one pruning to the next.

    Raises:
        ValueError: a share outside [0, 1), or steps out of order.

    >>> should_prune, sparsity = PolynomialDecay(0.0, 0.8, 0, 100, frequency=50)(50)
    >>> should_prune, round(sparsity, 4)  # 0.8 - 0.8 / 2**3
    (True, 0.7)
    """

    initial_sparsity: float
    final_sparsity: float
    begin_step: int
    end_step: int
    power: float = 3
    frequency: int = 100

    def __post_init__(self) -> None:
        check_fraction("initial_sparsity", self.initial_sparsity)
        check_fraction("final_sparsity", self.final_sparsity)
        check_positive("power", self.power)
        self._check(may_run_forever=False)

    def sparsity(self, step: int) -> float:
        """Returns the share of zeros, rounded to float32 where TFMOT rounds."""
        if step >= self.end_step:
            return float(np.float32(self.final_sparsity))
        span = np.float32(self.end_step - self.begin_step)
        progress = np.clip(np.float32(step - self.begin_step) / span, 0, 1)
        remaining = np.float32(float(np.float32(1) - progress) ** self.power)
        change = np.float32(self.initial_sparsity - self.final_sparsity)
        return float(change * remaining + np.float32(self.final_sparsity))


def get(schedule: Any) -> SparsitySchedule:
    """Returns the schedule that the argument is, describes or stands for.

    Args:
        schedule: a share of zeros (held from step 0 on), a schedule of ours, its Keras config, a
            TFMOT schedule, or any callable `step -> (should_prune, sparsity)`.

    Raises:
        TypeError: it is none of these.

    >>> get(0.5)
    ConstantSparsity(target_sparsity=0.5, begin_step=0, end_step=-1, frequency=100)
    """
    if isinstance(schedule, (int, float)) and not isinstance(schedule, bool):
        return ConstantSparsity(float(schedule), begin_step=0)
    if isinstance(schedule, dict):
        schedule = keras.saving.deserialize_keras_object(schedule)
    if isinstance(schedule, type) or not callable(schedule):
        raise TypeError(
            "A schedule is a share of zeros such as 0.8, a ConstantSparsity, a PolynomialDecay, a "
            "TFMOT schedule or a callable step -> (should_prune, sparsity); got "
            f"{schedule!r}."
        )
    return _ours(schedule)


def _ours(schedule: Any) -> SparsitySchedule:
    """Returns our twin of a TFMOT schedule, which Keras can save; anything else as it is."""
    kind = type(schedule)
    twins = {twin.__name__: twin for twin in (ConstantSparsity, PolynomialDecay)}
    if kind.__module__.startswith("tensorflow_model_optimization.") and kind.__name__ in twins:
        twin = twins[kind.__name__]
        names = [field.name for field in dataclasses.fields(twin)]
        return twin(**{name: getattr(schedule, name) for name in names})
    return schedule


def last_due(schedule: SparsitySchedule, after: int, upto: int) -> int | None:
    """Returns the last step in (after, upto] at which a schedule prunes, if there is one."""
    if isinstance(schedule, Schedule):
        return schedule.last_due(after, upto)
    return next((s for s in range(upto, max(after, -1), -1) if bool(schedule(s)[0])), None)


def next_due(schedule: SparsitySchedule, after: int) -> int | None:
    """Returns the first step past `after` at which a schedule prunes.

    Of a schedule that can only be asked step by step, the answer may come early, never late: after
    10,000 steps of No it is the next one, at which to ask again.
    """
    if isinstance(schedule, Schedule):
        return schedule.next_due(after)
    return next((s for s in range(after + 1, after + _FAR) if bool(schedule(s)[0])), after + _FAR)
