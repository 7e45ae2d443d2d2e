"""Masks on weights that train: `prune` adds them, `UpdatePruning` moves them, `strip` bakes them.

While a weight is pruned, the layer sees zero, and the raw weight receives the gradient at zero (a
straight-through mask). The raw weight is set back to zero one update before a mask is decided, so
that only this update can bring a weight back. TFMOT zeroes it at every step, to the same effect:
masks over a whole training run are TFMOT's.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import numpy as np

from tfaccel.core import schedules
from tfaccel.core.checks import check_in, check_model, check_type
from tfaccel.core.selection import Choice, Selector, select_layers
from tfaccel.core.transforms import (
    PRUNE,
    StateSpec,
    WeightTransform,
    transform_model,
    weight_keys,
)
from tfaccel.pruning.criteria import CRITERIA, Criterion
from tfaccel.pruning.patterns import PATTERNS, Mask, Pattern

SCOPES = ("layer", "global")
SMALLEST = 64

_PRUNABLE = ("kernel", "recurrent_kernel", "pointwise_kernel", "embeddings")
_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(eq=False)
class PruningMask(WeightTransform):
    """A mask on one weight, and the step at which the schedule last decided it.

    Args:
        schedule: see `tfaccel.core.schedules.get`.
        pattern: which weights stand or fall together.
        scope: "layer" ranks this weight's entries alone, "global" with all masks of like settings.
        criterion: what a weight is worth.
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

    def state_spec(self, shape: tuple[int, ...], dtype: str) -> dict[str, StateSpec]:  # noqa: ARG002
        """Returns the mask, all ones at first, and the step of the last decision, -1 at first."""
        never = keras.initializers.Constant(-1)
        return {
            "mask": StateSpec(shape, "bool", "ones"),
            "step": StateSpec((), "int32", never),
        }

    def __call__(self, weight: Any, training: bool | None = None) -> Any:
        """Returns the weight, zero where it is pruned; the gradient passes as if it were not."""
        if training is True and not (self.started or self.attended):
            warnings.warn(
                "A pruned model is being trained, but nothing moves its masks: it stays dense. "
                "Pass tfaccel.pruning.UpdatePruning() to fit(callbacks=[...]), or call "
                "tfaccel.pruning.update_masks(model, step) in a training loop of your own.",
                stacklevel=2,
            )
        # Exact: weight + (weight - weight) where the mask is on, weight + (0 - weight) where not.
        return weight + keras.ops.stop_gradient(self._masked(weight) - weight)

    def finalize(self, weight: Any) -> Any:
        """Returns the weight with zeros where it is pruned.

        Raises:
            ValueError: the schedule never ran.
        """
        if self.last_step < 0:
            name = self.state["step"].path.split("/")[0]
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
            name = self.state["step"].path.split("/")[0]
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


def prune(
    model: keras.Model,
    schedule: Any,
    *,
    pattern: str | Pattern = "element",
    scope: str = "layer",
    criterion: str | Criterion = "magnitude",
    include: Selector | None = None,
    exclude: Selector | None = None,
    seed: int | None = None,
) -> keras.Model:
    """Returns a model that loses its least important weights while it trains.

    Compile and fit the result with the callback `UpdatePruning`, then take `tfaccel.strip(result)`.

    Args:
        model: a built Functional or Sequential model; not changed.
        schedule: how sparse at which step: a `PolynomialDecay`, a `ConstantSparsity`, their TFMOT
            namesakes, or a share of zeros such as 0.8, held from the first step on.
        pattern: which weights stand or fall together: "element".
        scope: "layer" gives every kernel the schedule's sparsity; "global" ranks all of them
            together, so that some layers lose more than others.
        criterion: what a weight is worth: "magnitude" or "random".
        include: layers to prune (names, patterns, predicate). By default the kernels of
            convolutions, dense, recurrent, attention and embedding layers, without the first
            convolution, depthwise kernels and layers of fewer than 64 weights; `selection_for` says
            which and why. What is included by name is pruned whatever it is.
        exclude: layers to leave alone.
        seed: for criteria that draw lots.

    Returns:
        The rewritten model, weights carried over, masks all ones until the schedule begins.

    Raises:
        TypeError: the model is subclassed, or the schedule is none.
        ValueError: the model is not built, an argument is not known, a selector matches nothing, or
            there is nothing to prune.

    References:
        Zhu & Gupta 2017, To prune, or not to prune.
    """
    check_model(model, "prune")
    check_in("scope", scope, SCOPES)
    schedule, pattern = schedules.get(schedule), PATTERNS.get(pattern)
    criterion = CRITERIA.get(criterion)
    chosen = _chosen_keys(model, include, exclude)
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    check_type("seed", seed, (int, np.integer))
    numbers = iter(np.random.SeedSequence(int(seed)).generate_state(sum(map(len, chosen.values()))))
    masks = {
        layer: {
            key: PruningMask(schedule, pattern, scope, criterion, seed=int(next(numbers)))
            for key in keys
        }
        for layer, keys in chosen.items()
    }

    def rules(layer: keras.layers.Layer) -> Mapping[str, WeightTransform] | None:
        return masks.get(id(layer))

    return transform_model(model, rules)


def selection_for(
    model: keras.Model, include: Selector | None = None, exclude: Selector | None = None
) -> list[Choice]:
    """Returns for each layer whether `prune` would touch it, and why.

    Args:
        model: a built Functional or Sequential model.
        include: as in `prune`.
        exclude: as in `prune`.
    """
    first = True
    choices = []
    for choice in select_layers(model, include, exclude):
        leading = first and isinstance(choice.layer, _CONVOLUTIONS)
        first = first and not leading
        choices.append(_default_choice(choice, leading) if choice.chosen else choice)
    return choices


def _default_choice(choice: Choice, first_convolution: bool) -> Choice:
    layer, by_name = choice.layer, choice.reason == "included"
    keys = _prunable_keys(layer, by_name)
    sizes = {key: _size(variable) for key, variable in keys.items()}
    if not keys:
        return Choice(layer, False, _why_no_kernel(layer))
    if not by_name:
        if first_convolution:
            return Choice(layer, False, "first convolution: few weights, all else rests on them")
        if isinstance(layer, _DEPTHWISE):
            return Choice(layer, False, "depthwise kernel: a handful of weights per channel")
        if not any(variable.trainable for variable in keys.values()):
            return Choice(layer, False, "frozen: its weights do not train")
        if max(sizes.values()) < SMALLEST:
            return Choice(
                layer, False, f"too small: {max(sizes.values())} weights, fewer than {SMALLEST}"
            )
    return Choice(layer, True, ", ".join(f"{key}: {size} weights" for key, size in sizes.items()))


def _why_no_kernel(layer: keras.layers.Layer) -> str:
    if isinstance(layer, keras.layers.BatchNormalization):
        return "batch normalization: each weight scales a whole channel"
    return "no kernel" if layer.weights else "no weights"


def _prunable_keys(layer: keras.layers.Layer, by_name: bool) -> dict[str, keras.Variable]:
    names = (*_PRUNABLE, "depthwise_kernel") if by_name else _PRUNABLE
    return {
        key: variable
        for key, variable in weight_keys(layer).items()
        if key.rsplit("/", 1)[-1].split("#")[0] in names
    }


def _chosen_keys(
    model: keras.Model, include: Selector | None, exclude: Selector | None
) -> dict[int, list[str]]:
    choices = selection_for(model, include, exclude)
    chosen = {
        id(choice.layer): list(_prunable_keys(choice.layer, include is not None))
        for choice in choices
        if choice.chosen
    }
    if not chosen:
        reasons = "; ".join(f"{c.layer.name}: {c.reason}" for c in choices if c.layer.weights)
        raise ValueError(
            f"prune() found nothing to prune in {model.name!r} "
            f"({reasons or 'no layer has weights'}). Name the layers to prune with include=."
        )
    return chosen


def _size(variable: keras.Variable) -> int:
    return int(np.prod(variable.shape))
