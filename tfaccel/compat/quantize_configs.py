"""TFMOT's `QuantizeConfig`, and what one comes to for a layer."""

import abc
import dataclasses
from typing import Any

import keras

from tfaccel.compat.quantizers import (
    FixedQuantizer,
    LastValueQuantizer,
    Quantizer,
    RangeQuantizer,
)
from tfaccel.core.transforms import weight_keys
from tfaccel.quantization.operators import KERNEL_AXES
from tfaccel.quantization.rounded_weights import FakeQuantizeWeights
from tfaccel.quantization.schemes import LOW_BITS, Scheme


class QuantizeConfig(abc.ABC):
    """How one layer is quantized: subclass it, as with TFMOT.

    `quantize_apply` asks which weights and which activation are rounded by which quantizers. The
    two `set_` methods are there because TFMOT demands them; they are not called, since a layer of
    Keras 3 computes with other weights without being handed them.
    """

    @abc.abstractmethod
    def get_weights_and_quantizers(self, layer: Any) -> list[tuple[Any, Quantizer]]:
        """Returns the weights of a built layer that are rounded, each with its quantizer."""

    @abc.abstractmethod
    def get_activations_and_quantizers(self, layer: Any) -> list[tuple[Any, Quantizer]]:
        """Returns the activation that is rounded, with its quantizer; an empty list for none."""

    @abc.abstractmethod
    def set_quantize_weights(self, layer: Any, quantize_weights: list[Any]) -> None:
        """Is not called here."""

    @abc.abstractmethod
    def set_quantize_activations(self, layer: Any, quantize_activations: list[Any]) -> None:
        """Is not called here."""

    @abc.abstractmethod
    def get_output_quantizers(self, layer: Any) -> list[Quantizer]:
        """Returns the quantizer of the layer's output, if it is another than the activation's."""

    @abc.abstractmethod
    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QuantizeConfig":
        """Returns the config that `get_config` described."""
        return cls(**config)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a config wants of a layer.

    Attributes:
        weights: what rounds the kernel; None leaves it as it is.
        output: what rounds the output; None leaves it as it is.
        integer: whether the integer runtime has an operator for that. Otherwise the layer rounds in
            training, and is computed in float in a .tflite file.
    """

    weights: FakeQuantizeWeights | None
    output: Quantizer | None
    integer: bool

    @property
    def scheme(self) -> Scheme:
        """The scheme of this layer."""
        output: Any = self.output
        return Scheme(
            "by config",
            self.weights.bits if self.weights else 8,
            output.num_bits,
            trainable=True,
            symmetric_weights=self.weights.symmetric if self.weights else True,
        )


def read_config(config: QuantizeConfig, layer: keras.layers.Layer) -> Reading:
    """Returns what a config wants of a built layer.

    Raises:
        ValueError: it wants what the runtime, or training for it, does not have.
    """
    whose = f"{type(config).__name__} of layer {layer.name!r}"
    try:
        weights = config.get_weights_and_quantizers(layer)
        activations = config.get_activations_and_quantizers(layer)
        outputs = config.get_output_quantizers(layer)
    except AttributeError as error:
        raise ValueError(
            f"{whose} asks for what a {type(layer).__name__} of Keras 3 does not have: {error}. "
            "The kernel of every convolution is layer.kernel there."
        ) from error
    output = _output(whose, [quantizer for _, quantizer in activations], list(outputs))
    transform = _weights(whose, layer, weights)
    kernel = type(layer) in KERNEL_AXES
    if kernel and transform is None and output is not None:
        raise ValueError(
            f"{whose} rounds the output and not the kernel, but no integer operator has a float "
            "kernel. Give the kernel a LastValueQuantizer too, or leave both in float."
        )
    builtin = type(layer).__module__.partition(".")[0] in ("keras", "tfaccel")
    return Reading(transform, output, integer=builtin and output is not None)


def _weights(whose: str, layer: keras.layers.Layer, pairs: Any) -> FakeQuantizeWeights | None:
    names = {id(variable): key for key, variable in weight_keys(layer).items()}
    found = None
    for weight, quantizer in pairs:
        key = names.get(id(weight), "what is no weight of the layer")
        if key != "kernel":
            raise ValueError(
                f"{whose} rounds {key}, but what can be rounded is the kernel: the runtime keeps "
                "biases in 32 bits, and has no integers for other weights here."
            )
        if not isinstance(quantizer, LastValueQuantizer):
            raise ValueError(  # noqa: TRY004  a kind that exists, but not for kernels
                f"{whose} rounds its kernel by a {type(quantizer).__name__}, but the runtime reads "
                "the range of a kernel off its values. Use a LastValueQuantizer, or write a "
                "tfaccel.core.WeightTransform for rounding of your own."
            )
        _check_bits(whose, quantizer)
        found = FakeQuantizeWeights(_axes(layer), quantizer.num_bits, quantizer.symmetric)
    return found


def _axes(layer: keras.layers.Layer) -> tuple[int, ...]:
    """Returns the axes of output channels, by the layer's class or that which it derives from."""
    for kind in type(layer).__mro__:
        if kind in KERNEL_AXES:
            return KERNEL_AXES[kind]
    return (-1,)


def _output(whose: str, activations: list[Any], outputs: list[Any]) -> Quantizer | None:
    given = [*activations, *outputs]
    if len(activations) > 1 or len(outputs) > 1:
        raise ValueError(
            f"{whose} has {len(activations)} activations and {len(outputs)} outputs to round, but "
            "a layer gives one value, which is rounded once."
        )
    for quantizer in given:
        if not isinstance(quantizer, (RangeQuantizer, FixedQuantizer)):
            raise ValueError(  # noqa: TRY004  TFMOT would take it
                f"{whose} rounds an activation by a {type(quantizer).__name__}, which the integer "
                "runtime does not have. Use a MovingAverageQuantizer, LastValueQuantizer, "
                "AllValuesQuantizer or FixedQuantizer."
            )
        _check_bits(whose, quantizer)
        if isinstance(quantizer, RangeQuantizer) and (quantizer.per_axis or quantizer.symmetric):
            raise ValueError(
                f"{whose} has {quantizer}, but activations have one range for the whole tensor, "
                "with any zero point. Give it per_axis=False and symmetric=False."
            )
        if quantizer.narrow_range:
            raise ValueError(
                f"{whose} has {quantizer}, but activations have all levels. Give it "
                "narrow_range=False."
            )
    if len(given) == 2 and given[0] != given[1]:
        raise ValueError(
            f"{whose} rounds its activation by {given[0]} and its output by {given[1]}, but the "
            "runtime rounds a value once. Give one of them, or the same to both."
        )
    return given[-1] if given else None


def _check_bits(whose: str, quantizer: Any) -> None:
    if quantizer.num_bits not in LOW_BITS:
        raise ValueError(
            f"{whose} has {quantizer.num_bits} bits, but a layer can be trained for "
            f"{LOW_BITS.start} to {LOW_BITS.stop - 1}."
        )
