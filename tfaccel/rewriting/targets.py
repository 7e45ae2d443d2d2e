"""How far a factorization is to go."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras

from tfaccel.core.checks import check_fraction, check_number

Cost = Callable[[keras.Model], float]


@dataclasses.dataclass(frozen=True)
class Target:
    """How far `factorize` is to go: exactly one of energy, macs and max_error.

    Attributes:
        verb: the function that was called, named in errors.
        energy: share of each layer's squared norm to keep.
        macs: share of the model's MACs to come down to.
        max_error: how far the outputs, or the metric, may move.
        metric: the error of a model.
        cost: the MACs of a model.
    """

    verb: str
    energy: float | None
    macs: float | None
    max_error: float | None
    metric: Cost | None
    cost: Cost | None

    def check(self, data: Any) -> None:
        """Raises unless there is exactly one target, with all that it takes."""
        targets = {"energy": self.energy, "macs": self.macs, "max_error": self.max_error}
        given = {name: value for name, value in targets.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"{self.verb}() needs exactly one of energy, macs and max_error, "
                f"but got {given or 'none of them'}."
            )
        for name, value in given.items():
            if name == "max_error":
                check_number(name, value)
            else:
                check_fraction(name, value, closed_right=True)
        if self.max_error is not None and self.metric is None and data is None:
            raise ValueError(
                "max_error= needs data to measure the change of the outputs on, or a metric. "
                "Give data=x, or metric=lambda model: ..., the error of a model."
            )
        for name, argument, wanted in (
            ("metric", self.metric, "max_error"),
            ("cost", self.cost, "macs"),
        ):
            if argument is not None and wanted not in given:
                raise ValueError(f"{name}= goes with {wanted}=, but got {given}. Leave it out.")

    @property
    def why_not(self) -> str:
        """Why a layer that has cheaper forms is left alone all the same."""
        if self.energy is not None:
            return f"no rank that saves MACs keeps {self.energy:.1%} of the energy"
        if self.macs is not None:
            return "other layers lose less for the same MACs"
        return f"every rank that saves MACs goes beyond an error of {self.max_error:g}"
