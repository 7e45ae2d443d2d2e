"""Export: Keras models as .tflite files, verified before they are kept."""

from tfaccel.export.conversion import Artifact, to_tflite
from tfaccel.export.metadata import read_metadata
from tfaccel.export.verification import Audit, QuantizedTensor, Verification, audit, verify

__all__ = [
    "Artifact",
    "Audit",
    "QuantizedTensor",
    "Verification",
    "audit",
    "read_metadata",
    "to_tflite",
    "verify",
]
