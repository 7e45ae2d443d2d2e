"""What a figure was measured on."""

import importlib.metadata
import os
import platform
from pathlib import Path

_RUNTIMES = {"LiteRT": "ai-edge-litert", "Keras": "keras", "TensorFlow": "tensorflow"}


def describe_device() -> str:
    """Returns processor, usable cores, system, and the versions of the runtimes, in one line."""
    parts = [
        processor(),
        f"{usable_cores()} cores",
        platform.system(),
        f"Python {platform.python_version()}",
    ]
    for title, package in _RUNTIMES.items():
        version = _version(package)
        if version:
            parts.append(f"{title} {version}")
    return ", ".join(parts)


def processor() -> str:
    """Returns the name of the processor, or of its architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Hardware", "cpu model") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "unknown processor"


def usable_cores() -> int:
    """Returns how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
