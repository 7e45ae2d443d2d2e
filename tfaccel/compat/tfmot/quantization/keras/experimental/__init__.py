"""`tfmot.quantization.keras.experimental`."""

from tfaccel.compat.tfmot.quantization.keras.experimental import default_n_bit

__all__ = ["default_n_bit"]
