"""`tfmot.clustering`: weight clustering. The folders are as deep as TFMOT's, for its imports."""

from tfaccel.compat.tfmot.clustering import keras

__all__ = ["keras"]
