"""A transform of weights with state, to be told from the weights themselves."""

import dataclasses
from typing import ClassVar

import keras

from tfaccel.core.transforms import PRUNE, StateSpec, WeightTransform


@keras.saving.register_keras_serializable("tests_counting")
@dataclasses.dataclass(eq=False)
class Masked(WeightTransform):
    stage: ClassVar[int] = PRUNE

    def state_spec(self, shape, dtype):
        return {"mask": StateSpec(shape, dtype, "ones")}

    def __call__(self, weight, training=None):
        return weight * self.state["mask"]
