"""Quantization: rounding that is trained with, for artifacts that compute in integers."""

from tfaccel.quantization.binary_layers import Binarize, InputScale
from tfaccel.quantization.fake_quantization import (
    Dequantize,
    FakeQuantize,
    FakeQuantizeWeights,
    freeze_ranges,
)
from tfaccel.quantization.low_bit import low_bit, low_bit_plan
from tfaccel.quantization.low_bit_weights import (
    LOW_BIT,
    BinaryConnect,
    BinaryNet,
    LowBitWeights,
    TernaryWeights,
    TrainedTernary,
    XNORNet,
)
from tfaccel.quantization.packing import PackedSize, load_packed, save_packed
from tfaccel.quantization.placement import Decision
from tfaccel.quantization.popcount import PackedNetwork
from tfaccel.quantization.schemes import SCHEMES, Scheme
from tfaccel.quantization.training import is_quantization_aware, plan, quantize_aware, scheme_of

__all__ = [
    "LOW_BIT",
    "SCHEMES",
    "Binarize",
    "BinaryConnect",
    "BinaryNet",
    "Decision",
    "Dequantize",
    "FakeQuantize",
    "FakeQuantizeWeights",
    "InputScale",
    "LowBitWeights",
    "PackedNetwork",
    "PackedSize",
    "Scheme",
    "TernaryWeights",
    "TrainedTernary",
    "XNORNet",
    "freeze_ranges",
    "is_quantization_aware",
    "load_packed",
    "low_bit",
    "low_bit_plan",
    "plan",
    "quantize_aware",
    "save_packed",
    "scheme_of",
]
