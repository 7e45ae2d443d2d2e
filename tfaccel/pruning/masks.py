"""The mask on one weight: what it does in training, and how it is baked in.

While a weight is pruned, the layer sees zero, and the raw weight receives the gradient at zero (a
straight-through mask). The raw weight is set back to zero one update before a mask is decided, so
that only this update can bring a weight back. TFMOT zeroes it at every step, to the same effect:
masks over a whole training run are TFMOT's.
"""

import dataclasses
import warnings
from typing import Any, ClassVar

import keras
import numpy.typing as npt

from tfaccel.core import schedules
from tfaccel.core.transforms import PRUNE, StateSpec, WeightTransform
from tfaccel.pruning.criteria import COMPUTED, LEARNED, Criterion
from tfaccel.pruning.patterns import Mask, Pattern

Array = npt.NDArray[Any]


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(eq=False)
class PruningMask(WeightTransform):
    """A mask on one weight, and the step at which the schedule last decided it.

    Args:
        schedule: see `tfaccel.core.schedules.get`.
        pattern: which weights stand or fall together.
        scope: "layer" ranks this weight's entries alone, "global" with all masks of like settings.
        criterion: what a weight is worth. One that learns or is given scores keeps them here.
        seed: for a criterion that draws lots; a number of this weight alone.
        started: whether the mask was ever decided.
    """

    stage: ClassVar[int] = PRUNE

    schedule: schedules.SparsitySchedule
    pattern: Pattern
    scope: str
    criterion: Criterion
    seed: int = 0
    started: bool = False

    def __post_init__(self) -> None:
        # Set by whoever calls `update_masks`; known in this process only.
        self.attended = False
        # What `initialize` puts into the state, for a criterion that is given scores.
        self.given: Any = None

    def state_spec(self, shape: tuple[int, ...], dtype: str) -> dict[str, StateSpec]:
        """Returns the mask, all ones at first, the step of the last decision, -1, and scores."""
        never = keras.initializers.Constant(-1)
        specs = {
            "mask": StateSpec(shape, "bool", "ones"),
            "step": StateSpec((), "int32", never),
        }
        if self.criterion.source != COMPUTED:
            learned = self.criterion.source == LEARNED
            specs["scores"] = StateSpec(shape, dtype, "zeros", trainable=learned)
        return specs

    def initialize(self, weight: Any) -> None:  # noqa: ARG002
        """Sets the scores of a criterion that is given them."""
        if self.given is not None:
            self.state["scores"].assign(self.given)
            self.given = None

    def __call__(self, weight: Any, training: bool | None = None) -> Any:
        """Returns the weight, zero where it is pruned.

        The gradient passes to a pruned weight as if it were not, except by a criterion that learns:
        there it passes to the scores.
        """
        if training is True and not (self.started or self.attended):
            warnings.warn(
                "A pruned model is being trained, but nothing moves its masks: it stays dense. "
                "Pass tfaccel.pruning.UpdatePruning() to fit(callbacks=[...]), or call "
                "tfaccel.pruning.update_masks(model, step) in a training loop of your own.",
                stacklevel=2,
            )
        if self.criterion.source == LEARNED:
            # Sanh 2020, eq. 3: the gradient of a score is the gradient of the masked weight times
            # the weight, kept or not. The value of the second term is zero.
            scores = keras.ops.convert_to_tensor(self.state["scores"])
            zero = scores - keras.ops.stop_gradient(scores)
            return self._masked(weight) + keras.ops.stop_gradient(weight) * zero
        # Exact: weight + (weight - weight) where the mask is on, weight + (0 - weight) where not.
        return weight + keras.ops.stop_gradient(self._masked(weight) - weight)

    def scores(self, weight: Array) -> Array:
        """Returns what each weight is worth now, in the kernel's shape."""
        kept = self.state.get("scores")
        values = None if kept is None else keras.ops.convert_to_numpy(kept)
        return self.criterion(weight, self.seed, values)

    def finalize(self, weight: Any) -> Any:
        """Returns the weight with zeros where it is pruned.

        Raises:
            ValueError: the schedule never ran.
        """
        if self.last_step < 0:
            name = self.state["step"].path.split("/")[-2]
            raise ValueError(
                f"Layer {name!r} was to be pruned, but its schedule never ran: it is still dense. "
                "Train with fit(callbacks=[tfaccel.pruning.UpdatePruning()]), at least up to the "
                f"schedule's first step ({self.schedule!r}), or prune at once with "
                "tfaccel.pruning.update_masks(model, step)."
            )
        self._warn_if_unfinished()
        return self._masked(weight)

    def _warn_if_unfinished(self) -> None:
        turn, reached = self.last_step, float(self.schedule(self.last_step)[1])
        wanted = reached
        # A schedule without an end has no turn that it still owes.
        while isinstance(self.schedule, schedules.PolynomialDecay):
            following = schedules.next_due(self.schedule, turn)
            if following is None:
                break
            turn, wanted = following, float(self.schedule(following)[1])
        if wanted > reached:
            name = self.state["step"].path.split("/")[-2]
            warnings.warn(
                f"Layer {name!r} was pruned to {reached:.1%} at step {self.last_step} of a "
                f"schedule that goes to {wanted:.1%} at step {turn}: training ended early, went on "
                "without UpdatePruning, or an older state was restored. Train on with "
                "fit(callbacks=[tfaccel.pruning.UpdatePruning()]) to reach it.",
                stacklevel=2,
            )

    @property
    def last_step(self) -> int:
        """The step at which the mask was last decided; -1 if it never was."""
        return int(keras.ops.convert_to_numpy(self.state["step"]))

    def decide(self, mask: Mask, step: int) -> None:
        """Sets the mask, decided at `step`."""
        self.state["mask"].assign(mask)
        self.state["step"].assign(step)
        self.started = True

    def _masked(self, weight: Any) -> Any:
        mask = keras.ops.convert_to_tensor(self.state["mask"])
        return keras.ops.where(mask, weight, keras.ops.zeros_like(weight))
