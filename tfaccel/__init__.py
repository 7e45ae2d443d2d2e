"""Makes Keras 3 models small and fast, trains them on many machines, measures the result.

Rooms and functions load on first use, so that ``import tfaccel`` costs nothing:

>>> import tfaccel
>>> "pruning" in dir(tfaccel)
True
"""

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

_ROOMS = (
    "architectures",
    "compat",
    "core",
    "distillation",
    "distributed",
    "export",
    "measurement",
    "pruning",
    "quantization",
    "recipes",
    "reporting",
    "rewriting",
)
_FUNCTIONS = {
    "diff": "tfaccel.reporting",
    "inspect": "tfaccel.reporting",
    "load_model": "tfaccel.core",
    "measure": "tfaccel.measurement",
    "strip": "tfaccel.core",
}

__all__ = [
    "__version__",
    "architectures",
    "compat",
    "core",
    "diff",
    "distillation",
    "distributed",
    "export",
    "inspect",
    "load_model",
    "measure",
    "measurement",
    "pruning",
    "quantization",
    "recipes",
    "reporting",
    "rewriting",
    "strip",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"tfaccel.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'tfaccel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
