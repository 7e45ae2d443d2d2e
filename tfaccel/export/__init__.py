"""Export: Keras models as .tflite files, verified before they are kept."""

from tfaccel.export.agreement import OperatorAgreement
from tfaccel.export.auditing import Audit, QuantizedTensor, audit
from tfaccel.export.conversion import Artifact, to_tflite
from tfaccel.export.file_quantization import quantize_file
from tfaccel.export.layer_costs import layer_latencies
from tfaccel.export.metadata import read_metadata
from tfaccel.export.verification import Verification, verify

__all__ = [
    "Artifact",
    "Audit",
    "OperatorAgreement",
    "QuantizedTensor",
    "Verification",
    "audit",
    "layer_latencies",
    "quantize_file",
    "read_metadata",
    "to_tflite",
    "verify",
]
