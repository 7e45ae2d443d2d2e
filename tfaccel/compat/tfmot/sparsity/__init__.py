"""`tfmot.sparsity`: pruning. The folders are as deep as TFMOT's, so that its imports fit."""

from tfaccel.compat.tfmot.sparsity import keras

__all__ = ["keras"]
