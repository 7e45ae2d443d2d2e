"""`tfmot.quantization`: quantization-aware training. Folders are as deep as TFMOT's."""

from tfaccel.compat.tfmot.quantization import keras

__all__ = ["keras"]
