"""Rewrites that make a model lighter and leave its outputs (nearly) as they are."""

from tfaccel.rewriting.folding import fold_batch_norm

__all__ = ["fold_batch_norm"]
