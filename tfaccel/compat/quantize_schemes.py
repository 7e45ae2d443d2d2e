"""TFMOT's schemes for `quantize_apply`: how many bits."""

import dataclasses

from tfaccel.core.checks import check_in
from tfaccel.quantization.schemes import INT8, LOW_BITS, Scheme


@dataclasses.dataclass(frozen=True)
class Default8BitQuantizeScheme:
    """Weights and activations of 8 bits.

    Attributes:
        disable_per_axis: False; weights have a step for each output channel, as the runtime has.

    Raises:
        ValueError: `disable_per_axis` is True.
    """

    disable_per_axis: bool = False

    def __post_init__(self) -> None:
        if self.disable_per_axis:
            raise ValueError(
                "disable_per_axis=True cannot be had: kernels have a step for each output channel. "
                "Leave it out."
            )

    @property
    def scheme(self) -> Scheme:
        """Our scheme for it."""
        return INT8


@dataclasses.dataclass(frozen=True)
class DefaultNBitQuantizeScheme(Default8BitQuantizeScheme):
    """Weights and activations of so many bits.

    Attributes:
        num_bits_weight: of a weight, 2 to 8.
        num_bits_activation: of a value behind a ReLU, 2 to 8; all others have 8.

    Raises:
        ValueError: a number is out of range, or `disable_per_axis` is True.
    """

    num_bits_weight: int = 8
    num_bits_activation: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_in("num_bits_weight", self.num_bits_weight, LOW_BITS)
        check_in("num_bits_activation", self.num_bits_activation, LOW_BITS)

    @property
    def scheme(self) -> Scheme:
        """Our scheme for it."""
        weights, activations = self.num_bits_weight, self.num_bits_activation
        return Scheme(f"w{weights}a{activations}", weights, activations, trainable=True)
