"""`tfmot.quantization.keras`, name by name."""

from tfaccel.compat.quantization import (
    QuantizeAnnotate,
    quantize_annotate_layer,
    quantize_annotate_model,
    quantize_apply,
    quantize_model,
    quantize_scope,
)
from tfaccel.compat.quantize_configs import QuantizeConfig
from tfaccel.compat.tfmot.quantization.keras import default_8bit, experimental, quantizers

__all__ = [
    "QuantizeAnnotate",
    "QuantizeConfig",
    "default_8bit",
    "experimental",
    "quantize_annotate_layer",
    "quantize_annotate_model",
    "quantize_apply",
    "quantize_model",
    "quantize_scope",
    "quantizers",
]
