"""`tfmot.sparsity.keras`, name by name."""

from tfaccel.compat.pruning import (
    PrunableLayer,
    PruneLowMagnitude,
    PruningSchedule,
    prune_low_magnitude,
    prune_scope,
    strip_pruning,
)
from tfaccel.compat.pruning_callbacks import PruningSummaries, UpdatePruningStep
from tfaccel.compat.pruning_policies import PruneForLatencyOnXNNPack, PruningPolicy
from tfaccel.core.schedules import ConstantSparsity, PolynomialDecay

__all__ = [
    "ConstantSparsity",
    "PolynomialDecay",
    "PrunableLayer",
    "PruneForLatencyOnXNNPack",
    "PruneLowMagnitude",
    "PruningPolicy",
    "PruningSchedule",
    "PruningSummaries",
    "UpdatePruningStep",
    "prune_low_magnitude",
    "prune_scope",
    "strip_pruning",
]
