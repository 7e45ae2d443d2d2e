"""What a model weighs and how it does: parameters, MACs, size, latency, memory, accuracy."""

from tfaccel.measurement.accuracy import measure_accuracy
from tfaccel.measurement.counting import count, count_layers
from tfaccel.measurement.devices import describe_device
from tfaccel.measurement.interpreter import TensorInfo, TFLiteModel
from tfaccel.measurement.latency import measure_latency
from tfaccel.measurement.measuring import measure
from tfaccel.measurement.memory import measure_peak_memory
from tfaccel.measurement.records import Counts, Latency, LayerCounts, Measurement
from tfaccel.measurement.sizes import measure_gzip_size, measure_sparsity

__all__ = [
    "Counts",
    "Latency",
    "LayerCounts",
    "Measurement",
    "TFLiteModel",
    "TensorInfo",
    "count",
    "count_layers",
    "describe_device",
    "measure",
    "measure_accuracy",
    "measure_gzip_size",
    "measure_latency",
    "measure_peak_memory",
    "measure_sparsity",
]
