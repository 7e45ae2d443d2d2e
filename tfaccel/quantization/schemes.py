"""What is stored in how many bits: schemes as data."""

import dataclasses
import re

import keras

from tfaccel.core.checks import check_in, check_positive, check_type
from tfaccel.core.configurable import Configurable
from tfaccel.core.registry import Registry

FLOAT_BITS = 32
LOW_BITS = range(2, 9)  # of a number that is trained to be rounded


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class Scheme(Configurable):
    """How a model's numbers are stored and computed on the edge.

    Attributes:
        name: what the scheme is called.
        weight_bits: of a stored weight.
        activation_bits: of a value between layers; 32 means computed in float. Below 8 they are for
            values behind a ReLU, and all others have 8: LiteRT has no narrower type, but a ReLU on
            one side and the end of int8 on the other clip as a narrow grid does.
        trainable: whether `quantize_aware` can train a model for it.
        end_bits: of a weight of the first and of the last layer that has a kernel, which suffer
            most from few bits; by default as all others.
        symmetric_weights: whether zero is the middle of a weight's grid; else the grid spans from
            the smallest weight to the largest, and zero is one of its levels.
        symmetric_activations: likewise for values between layers.
        weight_block: how many weights that are summed up, one after the other, have a step of their
            own, in dense layers whose activations are float; by default all of an output channel
            have one.

    Raises:
        ValueError: a number is out of range.
    """

    name: str
    weight_bits: int
    activation_bits: int
    trainable: bool = False
    end_bits: int | None = None
    symmetric_weights: bool = True
    symmetric_activations: bool = False
    weight_block: int | None = None

    def __post_init__(self) -> None:
        check_in("weight_bits", self.weight_bits, (*LOW_BITS, 16, FLOAT_BITS))
        check_in("activation_bits", self.activation_bits, (*LOW_BITS, 16, FLOAT_BITS))
        if self.end_bits is not None:
            check_in("end_bits", self.end_bits, LOW_BITS)
        if self.weight_block is not None:
            check_type("weight_block", self.weight_block, int)
            check_positive("weight_block", self.weight_block)
        if self.weight_block is not None and self.integer_activations:
            raise ValueError(
                "LiteRT has blocks of weights only where activations are float: give a scheme with "
                "weight_block activation_bits=32."
            )
        if self.activation_bits == 16 and not self.symmetric_activations:
            raise ValueError(
                "LiteRT's values of 16 bits have zero in the middle: give a scheme with "
                "activation_bits=16 symmetric_activations=True."
            )

    @property
    def integer_activations(self) -> bool:
        """Whether values between layers are integers too."""
        return self.activation_bits < FLOAT_BITS

    def bits_of_weights(self, *, at_end: bool) -> int:
        """Returns the bits of a weight of a layer in the middle or at either end of the model."""
        return self.end_bits if at_end and self.end_bits is not None else self.weight_bits


SCHEMES: Registry[Scheme] = Registry("quantization scheme", Scheme)

FLOAT32 = Scheme("float32", 32, 32)
FLOAT16 = Scheme("float16", 16, 32)
DYNAMIC_INT8 = Scheme("dynamic_int8", 8, 32)
INT8 = Scheme("int8", 8, 8, trainable=True)
INT16X8 = Scheme("int16x8", 8, 16, trainable=True, symmetric_activations=True)
INT4 = Scheme("int4", 4, 8, trainable=True, end_bits=8)
INT4_WEIGHT_ONLY = Scheme("int4_weight_only", 4, 32, trainable=True)
INT4_BLOCK32 = Scheme("int4_block32", 4, 32, trainable=True, weight_block=32)

SCHEMES.register("float32")(lambda: FLOAT32)
SCHEMES.register("float16")(lambda: FLOAT16)
SCHEMES.register("dynamic_int8")(lambda: DYNAMIC_INT8)
SCHEMES.register("int8")(lambda: INT8)
SCHEMES.register("int16x8")(lambda: INT16X8)
SCHEMES.register("int4")(lambda: INT4)
SCHEMES.register("int4_weight_only")(lambda: INT4_WEIGHT_ONLY)
SCHEMES.register("int4_block32")(lambda: INT4_BLOCK32)


@SCHEMES.family("'w4a8' (weights of 2 to 8 bits, values of 2 to 8)")
def _by_bits(name: str) -> Scheme | None:
    """Reads "w4a8": all weights in 4 bits, those of the first and the last layer too."""
    found = re.fullmatch(r"w([2-8])a([2-8])", name)
    if not found:
        return None
    weight_bits, activation_bits = map(int, found.groups())
    return Scheme(name, weight_bits, activation_bits, trainable=True)
