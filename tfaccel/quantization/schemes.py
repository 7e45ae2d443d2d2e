"""What is stored in how many bits: schemes as data."""

import dataclasses

from tfaccel.core.configurable import Configurable
from tfaccel.core.registry import Registry


@dataclasses.dataclass(frozen=True)
class Scheme(Configurable):
    """How a model's numbers are stored and computed on the edge.

    Attributes:
        name: what the scheme is called.
        weight_bits: of a stored weight.
        activation_bits: of a value between layers; 32 means computed in float.
        trainable: whether `quantize_aware` can train a model for it.
        end_bits: of a weight of the first and of the last layer that has a kernel, which suffer
            most from few bits; by default as all others.
    """

    name: str
    weight_bits: int
    activation_bits: int
    trainable: bool = False
    end_bits: int | None = None

    def bits_of_weights(self, *, at_end: bool) -> int:
        """Returns the bits of a weight of a layer in the middle or at either end of the model."""
        return self.end_bits if at_end and self.end_bits is not None else self.weight_bits


SCHEMES: Registry[Scheme] = Registry("quantization scheme", Scheme)

FLOAT32 = Scheme("float32", 32, 32)
FLOAT16 = Scheme("float16", 16, 32)
DYNAMIC_INT8 = Scheme("dynamic_int8", 8, 32)
INT8 = Scheme("int8", 8, 8, trainable=True)
INT4 = Scheme("int4", 4, 8, trainable=True, end_bits=8)

SCHEMES.register("float32")(lambda: FLOAT32)
SCHEMES.register("float16")(lambda: FLOAT16)
SCHEMES.register("dynamic_int8")(lambda: DYNAMIC_INT8)
SCHEMES.register("int8")(lambda: INT8)
SCHEMES.register("int4")(lambda: INT4)
