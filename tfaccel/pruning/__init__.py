"""Pruning: weights that matter little become zero while the model trains."""

from tfaccel.core.schedules import ConstantSparsity, PolynomialDecay
from tfaccel.pruning.callbacks import UpdatePruning, update_masks
from tfaccel.pruning.unstructured import PruningMask, prune, selection_for

__all__ = [
    "ConstantSparsity",
    "PolynomialDecay",
    "PruningMask",
    "UpdatePruning",
    "prune",
    "selection_for",
    "update_masks",
]
