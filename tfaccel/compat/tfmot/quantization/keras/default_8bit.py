"""`tfmot.quantization.keras.default_8bit`."""

from tfaccel.compat.quantize_schemes import Default8BitQuantizeScheme

__all__ = ["Default8BitQuantizeScheme"]
