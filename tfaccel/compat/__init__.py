"""Other libraries' names on tfaccel's mechanisms, for code that is moved to Keras 3."""

from tfaccel.compat import tfmot

__all__ = ["tfmot"]
