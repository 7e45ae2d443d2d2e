"""Pruning: weights that matter little become zero while the model trains."""

from tfaccel.core.schedules import ConstantSparsity, PolynomialDecay
from tfaccel.pruning.callbacks import UpdatePruning, update_masks
from tfaccel.pruning.channels import Sensitivity, prune_channels, sensitivity
from tfaccel.pruning.dependencies import ChannelGroup, ChannelMap, read_channels
from tfaccel.pruning.kernels import selection_for
from tfaccel.pruning.masks import PruningMask
from tfaccel.pruning.metapruning import PruningNet, metaprune
from tfaccel.pruning.recalibration import penalize_batch_norm, recalibrate_batch_norm
from tfaccel.pruning.rewinding import rewind
from tfaccel.pruning.shrinking import shrink
from tfaccel.pruning.spaces import MobileNetSpace
from tfaccel.pruning.unstructured import prune

__all__ = [
    "ChannelGroup",
    "ChannelMap",
    "ConstantSparsity",
    "MobileNetSpace",
    "PolynomialDecay",
    "PruningMask",
    "PruningNet",
    "Sensitivity",
    "UpdatePruning",
    "metaprune",
    "penalize_batch_norm",
    "prune",
    "prune_channels",
    "read_channels",
    "recalibrate_batch_norm",
    "rewind",
    "selection_for",
    "sensitivity",
    "shrink",
    "update_masks",
]
