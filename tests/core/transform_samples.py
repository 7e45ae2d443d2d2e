"""Two small transforms whose effect is known without running them."""

import dataclasses
from typing import ClassVar

import keras

from tfaccel.core.transforms import PRUNE, QUANTIZE, StateSpec, WeightTransform


@keras.saving.register_keras_serializable("tfaccel_tests")
@dataclasses.dataclass(eq=False)
class Neutral(WeightTransform):
    """Uses the weight as it is."""

    stage: ClassVar[int] = PRUNE

    def __call__(self, weight, training=None):
        return weight


@keras.saving.register_keras_serializable("tfaccel_tests")
@dataclasses.dataclass(eq=False)
class Scaled(WeightTransform):
    """Multiplies the weight by a number, and by a saved mask of ones."""

    factor: float = 0.5
    stage: ClassVar[int] = PRUNE

    def state_spec(self, shape, dtype):
        return {"mask": StateSpec(shape, initializer="ones")}

    def __call__(self, weight, training=None):
        return weight * self.factor * keras.ops.cast(self.state["mask"], weight.dtype)


@keras.saving.register_keras_serializable("tfaccel_tests")
@dataclasses.dataclass(eq=False)
class Shifted(WeightTransform):
    """Adds a number; does not commute with `Scaled`, so the order shows."""

    amount: float = 1.0
    stage: ClassVar[int] = QUANTIZE

    def __call__(self, weight, training=None):
        return weight + self.amount


@keras.saving.register_keras_serializable("tfaccel_tests")
class Affine(keras.layers.Layer):
    """A user's layer with a sublayer of no given name and a weight of its own."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.inner = keras.layers.Dense(units)

    def build(self, input_shape):
        self.inner.build(input_shape)
        self.gain = self.add_weight(shape=(self.units,), initializer="ones", name="gain")

    def call(self, inputs):
        return self.inner(inputs) * self.gain

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def all_weights(make):
    """A rule that gives every float weight of every layer a transform."""

    def rule(layer):
        from tfaccel.core.transforms import weight_keys

        return {
            key: make()
            for key, variable in weight_keys(layer).items()
            if variable.trainable and variable.dtype.startswith("float")
        }

    return rule


def only_kernels(make):
    """A rule that gives every layer's weight named "kernel" a transform."""
    everywhere = all_weights(make)

    def rule(layer):
        return {key: value for key, value in everywhere(layer).items() if key == "kernel"}

    return rule
