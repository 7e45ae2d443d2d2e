"""Measurements made up for tests."""

from tfaccel.measurement import Measurement

WHOLE = {
    "name": "teacher",
    "format": "tflite",
    "parameters": 1_149_514,
    "macs": 14_300_000,
    "sparsity": 0.0,
    "size_bytes": 4_600_000,
    "gzip_bytes": 4_200_000,
    "latency_ms": 1.5,
    "latency_p95_ms": 1.75,
    "latency_threads_ms": 0.9,
    "threads": 2,
    "peak_memory_bytes": 262_144,
    "accuracy": 0.99,
    "samples": 359,
    "device": "a processor",
}


def record(**changes):
    return Measurement(**{**WHOLE, **changes})


TEACHER = record()
STUDENT = record(
    name="student",
    size_bytes=230_000,
    gzip_bytes=210_000,
    latency_ms=0.3,
    accuracy=0.98,
)
