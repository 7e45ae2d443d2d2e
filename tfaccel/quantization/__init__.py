"""Quantization: rounding that is trained with, for artifacts that compute in integers."""

from tfaccel.quantization.fake_quantization import (
    Dequantize,
    FakeQuantize,
    FakeQuantizeWeights,
    freeze_ranges,
)
from tfaccel.quantization.placement import Decision
from tfaccel.quantization.schemes import SCHEMES, Scheme
from tfaccel.quantization.training import is_quantization_aware, plan, quantize_aware, scheme_of

__all__ = [
    "SCHEMES",
    "Decision",
    "Dequantize",
    "FakeQuantize",
    "FakeQuantizeWeights",
    "Scheme",
    "freeze_ranges",
    "is_quantization_aware",
    "plan",
    "quantize_aware",
    "scheme_of",
]
