"""Quantization: rounding that is trained with, for artifacts that compute in integers."""

from tfaccel.quantization.allocation import Allocation, LayerBits, allocate_bits
from tfaccel.quantization.binary_layers import Binarize, InputScale
from tfaccel.quantization.clustering import NearestCentroids, cluster
from tfaccel.quantization.compression import (
    CompressedSize,
    WeightSize,
    huffman_size,
    load_compressed,
    save_compressed,
)
from tfaccel.quantization.debugging import DebugReport, LayerNoise, debug
from tfaccel.quantization.equalization import equalize
from tfaccel.quantization.fake_quantization import (
    Dequantize,
    FakeQuantize,
    FakeQuantizeWeights,
    Floor,
)
from tfaccel.quantization.freezing import FreezeRanges, freeze_ranges
from tfaccel.quantization.learned_ranges import (
    LearnedClipping,
    LearnedStep,
    LearnedStepWeights,
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
from tfaccel.quantization.policies import mixed_precision
from tfaccel.quantization.popcount import PackedNetwork
from tfaccel.quantization.post_training import quantize
from tfaccel.quantization.ranges import LSQ, PACT, RANGES, MovingExtremes
from tfaccel.quantization.rounding import AdaRound
from tfaccel.quantization.schemes import SCHEMES, Scheme
from tfaccel.quantization.second_order import GPTQ
from tfaccel.quantization.training import is_quantization_aware, plan, quantize_aware, scheme_of

__all__ = [
    "GPTQ",
    "LOW_BIT",
    "LSQ",
    "PACT",
    "RANGES",
    "SCHEMES",
    "AdaRound",
    "Allocation",
    "Binarize",
    "BinaryConnect",
    "BinaryNet",
    "CompressedSize",
    "DebugReport",
    "Decision",
    "Dequantize",
    "FakeQuantize",
    "FakeQuantizeWeights",
    "Floor",
    "FreezeRanges",
    "InputScale",
    "LayerBits",
    "LayerNoise",
    "LearnedClipping",
    "LearnedStep",
    "LearnedStepWeights",
    "LowBitWeights",
    "MovingExtremes",
    "NearestCentroids",
    "PackedNetwork",
    "PackedSize",
    "Scheme",
    "TernaryWeights",
    "TrainedTernary",
    "WeightSize",
    "XNORNet",
    "allocate_bits",
    "cluster",
    "debug",
    "equalize",
    "freeze_ranges",
    "huffman_size",
    "is_quantization_aware",
    "load_compressed",
    "load_packed",
    "low_bit",
    "low_bit_plan",
    "mixed_precision",
    "plan",
    "quantize",
    "quantize_aware",
    "save_compressed",
    "save_packed",
    "scheme_of",
]
