"""What a rewrite does to each layer, as records."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tfaccel.rewriting.calls import LayerCall, macs_of_calls


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer. Printed, it is one line.

    Attributes:
        name: of the layer.
        class_name: of the layer.
        method: "svd", "tucker", "spatial" or "separable"; None if the layer is left alone.
        ranks: of the factors: one for svd and spatial, input and output rank for tucker, depth
            multiplier for separable.
        energy: share of the squared norm that is kept, 0 to 1: of the layer's weights, or of its
            outputs where data were given.
        parameters_before: numbers in the weights of the layer.
        parameters_after: numbers in the weights of the layers that replace it.
        macs_before: multiply-accumulates of one sample, over all calls; None where sizes are open.
        macs_after: those of the layers that replace it.
        reason: why the layer is left alone, else "".
    """

    name: str
    class_name: str
    method: str | None
    ranks: tuple[int, ...]
    energy: float
    parameters_before: int
    parameters_after: int
    macs_before: int | None
    macs_after: int | None
    reason: str

    def __str__(self) -> str:
        if self.method is None:
            return f"{self.name}: left alone ({self.reason})"
        ranks = " x ".join(map(str, self.ranks))
        macs = (
            "MACs unknown"
            if self.macs_before is None
            else f"MACs {self.macs_before:,} -> {self.macs_after:,}"
        )
        return (
            f"{self.name}: {self.method} {ranks}, keeps {self.energy:.1%}, parameters "
            f"{self.parameters_before:,} -> {self.parameters_after:,}, {macs}"
        )


def left_alone(layer: Any, calls: Sequence[LayerCall], batch: int, reason: str) -> LayerPlan:
    """Returns the record of a layer that stays as it is."""
    macs = macs_of_calls(calls)
    of_sample = None if macs is None else macs // batch
    parameters = layer.count_params()
    return LayerPlan(
        name=layer.name,
        class_name=type(layer).__name__,
        method=None,
        ranks=(),
        energy=1.0,
        parameters_before=parameters,
        parameters_after=parameters,
        macs_before=of_sample,
        macs_after=of_sample,
        reason=reason,
    )
