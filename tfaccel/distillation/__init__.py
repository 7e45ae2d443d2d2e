"""Distillation: a small student learns from a large teacher, on top of `keras.distillation`."""

from tfaccel.distillation.distiller import Distiller
from tfaccel.distillation.losses import LogitDistillation

__all__ = ["Distiller", "LogitDistillation"]
