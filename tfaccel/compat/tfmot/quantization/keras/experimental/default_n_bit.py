"""`tfmot.quantization.keras.experimental.default_n_bit`."""

from tfaccel.compat.quantize_schemes import DefaultNBitQuantizeScheme

__all__ = ["DefaultNBitQuantizeScheme"]
