"""The schedule at work: masks are decided between steps of training."""

import json
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfaccel.core import schedules
from tfaccel.core.checks import check_type
from tfaccel.core.transforms import TransformedLayer, transformed_layers
from tfaccel.pruning.criteria import LEARNED
from tfaccel.pruning.layouts import layout_of
from tfaccel.pruning.masks import PruningMask

_Place = tuple[TransformedLayer, str, PruningMask]


class _Group:
    """Masks that are decided together, and the step up to which that is done."""

    def __init__(self, places: Sequence[_Place]) -> None:
        self._places = places
        mask = places[0][2]
        self.schedule, self._pattern = mask.schedule, mask.pattern
        # Scores that learn do so by the raw weight, which must then stay as it is.
        self._keeps_raw = mask.criterion.source == LEARNED
        self._layouts = [layout_of(layer.layer, key) for layer, key, _ in places]
        self.last = max(mask.last_step for _, _, mask in places)

    def settle(self, step: int) -> None:
        """Decides the masks as the schedule's last turn up to `step` wants them."""
        due = schedules.last_due(self.schedule, self.last, step)
        if due is not None:
            self.decide(float(self.schedule(due)[1]), due)

    def decide(self, sparsity: float, step: int) -> None:
        """Decides the masks of a sparsity."""
        scores = []
        for (layer, key, mask), layout in zip(self._places, self._layouts, strict=True):
            weight = keras.ops.convert_to_numpy(layer.variable(key))
            scores.append(layout.stacked(mask.scores(weight)))
        decided = self._pattern.masks(scores, sparsity)
        for kept, layout, (_, _, mask) in zip(decided, self._layouts, self._places, strict=True):
            mask.decide(layout.unstacked(kept), step)
        self.last = step
        self.zero()

    def zero(self) -> None:
        """Sets the raw weights to zero where they are pruned."""
        if self._keeps_raw:
            return
        for layer, key, transform in self._places:
            variable = layer.variable(key)
            weight = keras.ops.convert_to_numpy(variable)
            mask = keras.ops.convert_to_numpy(transform.state["mask"])
            variable.assign(np.where(mask, weight, np.zeros_like(weight)))


def update_masks(model: keras.Model, step: int) -> None:
    """Decides the masks of a pruned model as the schedule wants them at a step.

    For training loops of your own: call it before every step, with 1 before the first one (0 prunes
    before training, for a schedule that begins there). Between two turns it does nothing.
    `UpdatePruning` does this in `fit`.

    Args:
        model: what `prune` returned, or a Distiller whose student is such a model.
        step: number of the training step that comes next.

    Raises:
        ValueError: the model has no masks.
    """
    check_type("step", step, (int, np.integer))
    for group in groups_of(model, "update_masks()"):
        group.settle(int(step))


class UpdatePruning(keras.callbacks.Callback):
    """Moves the masks of a pruned model during `fit`, as its schedule says.

    A step is an update by the optimizer (`optimizer.iterations`): an accumulated batch is no step,
    and of several steps in one execution (`steps_per_execution`) the schedule's last turn counts.
    The masks remember their step, so that a model saved in mid-training goes on where it was; if a
    new optimizer counts from zero again, the schedule goes on from the last decision. In a
    `keras.distillation.Distiller` the student is pruned.

    Raises:
        ValueError: at the start of `fit`, if the model has no masks.

    Example:
        >>> import tfaccel
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
        >>> pruned = tfaccel.pruning.prune(model, 0.5)
        >>> pruned.compile("sgd", "mse")
        >>> x = np.ones((4, 8))
        >>> history = pruned.fit(x, x, callbacks=[UpdatePruning()], verbose=0)
        >>> kernel = keras.ops.convert_to_numpy(tfaccel.strip(pruned).layers[0].kernel)
        >>> int((kernel == 0).sum())
        32
    """

    def __init__(self) -> None:
        super().__init__()
        self._groups: list[_Group] = []
        self._offset = 0
        self._waits = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Finds the masks."""
        self._groups = groups_of(self.model, "UpdatePruning")
        self._waits = 0
        self._offset = 0
        self._offset = max(0, max(group.last for group in self._groups) - self._updates())

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Decides masks that are due before the coming step."""
        if self._waits:
            self._waits -= 1
            return
        step = self._updates() + 1
        for group in self._groups:
            group.settle(step)
        self._prepare(step)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Makes up for turns inside an execution of several steps."""
        if self.model.steps_per_execution > 1 and not self._waits:
            self._settle_done()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Leaves zeros in the raw weights for whoever saves them."""
        for group in self._groups:
            group.zero()

    def _settle_done(self) -> None:
        for group in self._groups:
            group.settle(self._updates())

    def _prepare(self, step: int) -> None:
        """Zeroes what is to be judged after the coming execution, and plans the next look."""
        several = self.model.steps_per_execution
        turns = []
        for group in self._groups:
            turn = schedules.next_due(group.schedule, step)
            if turn is not None:
                turns.append(turn)
                if turn <= step + several:
                    group.zero()
        # Reading the step count waits for the device, so it is left until a turn may be near.
        executions = (min(turns) - several - 1 - step) // several if turns else _NEVER
        self._waits = max(0, executions)

    def _updates(self) -> int:
        """Returns how many updates the weights have had."""
        if hasattr(
            self.model, "jax_state_sync"
        ):  # on JAX the state lives in the loop between steps
            self.model.jax_state_sync()
        done = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
        return done + self._offset


_NEVER = 2**31


def groups_of(model: keras.Model, who: str) -> list[_Group]:
    """Returns the masks of a model in groups that are decided together.

    Raises:
        ValueError: the model has none; `who` begins the error.
    """
    # The teacher of a Distiller may be a pruned model too, and is left as it is.
    trained = model.student if isinstance(model, keras.distillation.Distiller) else model
    places = [
        (layer, key, transform)
        for layer in transformed_layers(trained)
        for key, transform in layer.transforms
        if isinstance(transform, PruningMask)
    ]
    if not places:
        raise ValueError(
            f"{who} found no masks in {trained.name!r}. Train what "
            "tfaccel.pruning.prune(model, schedule) returned."
        )
    together: dict[str, list[_Place]] = {}
    for number, place in enumerate(places):
        transform = place[2]
        transform.attended = True
        together.setdefault(_ranked_with(transform, number), []).append(place)
    return [_Group(group) for group in together.values()]


def _ranked_with(mask: PruningMask, number: int) -> str:
    """Returns what masks that are ranked together have in common."""
    if mask.scope == "layer":
        return str(number)
    config = {k: v for k, v in mask.get_config().items() if k not in ("seed", "started")}
    return json.dumps(config, sort_keys=True, default=str)
