"""Rewrites that make a model lighter: exactly, nearly, or to be fine-tuned."""

from tfaccel.rewriting.activations import replace_activations
from tfaccel.rewriting.factorization import factorize, plan_factorization
from tfaccel.rewriting.folding import fold_batch_norm
from tfaccel.rewriting.heads import replace_head
from tfaccel.rewriting.plans import LayerPlan
from tfaccel.rewriting.replacement import replace_layers
from tfaccel.rewriting.separation import plan_separable, separable

__all__ = [
    "LayerPlan",
    "factorize",
    "fold_batch_norm",
    "plan_factorization",
    "plan_separable",
    "replace_activations",
    "replace_head",
    "replace_layers",
    "separable",
]
