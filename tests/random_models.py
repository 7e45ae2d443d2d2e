"""Random Functional models for property tests.

Branches, sums, calls with several tensors and options, functional operations, layers and nested
models that are shared at any depth, frozen parts, and inputs and outputs in structures.
"""

import random

import keras
import numpy as np
from keras import layers

from tfaccel.core import keras_private

_SHAPE = (6, 6)


class _Maker:
    """Grows a graph of image tensors of one size, so that anything can follow anything."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.pool: list = []
        self.shared: list = []
        self.models: list = []

    def pick(self):
        return self.random.choice(self.pool[-4:])

    def grow(self) -> None:
        makers = (
            self._convolution,
            self._depthwise,
            self._norm,
            self._activation,
            self._sum_layer,
            self._sum_operation,
            self._concatenation,
            self._shared_convolution,
            self._nested,
            self._slices,
            self._arithmetic,
            self._gate,
            self._split,
            self._attention,
            self._dropout,
            self._model_again,
        )
        self.pool.append(self.random.choice(makers)())

    def _convolution(self):
        return layers.Conv2D(
            self.random.randint(1, 5),
            self.random.choice([1, 3]),
            padding="same",
            use_bias=self.random.random() < 0.5,
            activation=self.random.choice([None, "relu", "tanh"]),
        )(self.pick())

    def _depthwise(self):
        return layers.DepthwiseConv2D(3, padding="same")(self.pick())

    def _norm(self):
        return layers.BatchNormalization()(self.pick())

    def _activation(self):
        return layers.Activation(self.random.choice(["relu", "sigmoid", "swish"]))(self.pick())

    def _pair(self):
        a, b = self.pick(), self.random.choice(self.pool)
        if a.shape[-1] != b.shape[-1]:
            b = layers.Conv2D(a.shape[-1], 1)(b)
        return a, b

    def _sum_layer(self):
        return layers.Add()(list(self._pair()))

    def _sum_operation(self):
        a, b = self._pair()
        return a + b

    def _concatenation(self):
        a, b = self.pick(), self.random.choice(self.pool)
        if self.random.random() < 0.5:
            return layers.Concatenate()([a, b])
        return keras.ops.concatenate([a, b], axis=-1)

    def _shared_convolution(self):
        x = self.pick()
        for layer in self.shared:
            if layer.input_spec.axes[-1] == x.shape[-1]:
                return layer(x)
        layer = layers.Conv2D(self.random.randint(1, 4), 3, padding="same")
        self.shared.append(layer)
        return layer(x)

    def _nested(self):
        x = self.pick()
        inputs = keras.Input((*_SHAPE, x.shape[-1]))
        y = layers.Conv2D(3, 3, padding="same")(inputs)
        kind = self.random.choice(["functional", "sequential", "twice"])
        if kind == "functional":
            inner = keras.Model(inputs, layers.BatchNormalization()(y) * 2.0)
        elif kind == "sequential":
            inner = keras.Sequential(
                [keras.Input((*_SHAPE, x.shape[-1])), layers.Conv2D(2, 1), layers.ReLU()]
            )
        else:
            middle_in = keras.Input((*_SHAPE, 3))
            # Not called from outside too: Keras cannot load a model that several models share.
            middle = keras.Model(middle_in, layers.Conv2D(3, 1)(layers.ReLU()(middle_in)))
            inner = keras.Model(inputs, middle(middle(y)))
        self.models.append(inner)
        return inner(x)

    def _model_again(self):
        for model in self.random.sample(self.models, len(self.models)):
            fitting = [x for x in self.pool if x.shape[-1] == model.input_shape[-1]]
            if fitting:
                return model(self.random.choice(fitting))
        return layers.Identity()(self.pick())

    def _attention(self):
        x = self.pick()
        y = layers.Reshape((_SHAPE[0] * _SHAPE[1], x.shape[-1]))(x)
        attention = layers.MultiHeadAttention(1, 2, dropout=self.random.choice([0.0, 0.3]))
        y = attention(y, value=y, use_causal_mask=self.random.random() < 0.5)
        return layers.Reshape((*_SHAPE, x.shape[-1]))(y)

    def _dropout(self):
        return layers.Dropout(0.4)(self.pick())

    def _slices(self):
        x = self.pick()
        return x[..., : max(1, x.shape[-1] // 2)]

    def _arithmetic(self):
        x = self.pick()
        return keras.ops.maximum(0.5 * x - 0.1, x)

    def _gate(self):
        x = self.pick()
        squeezed = layers.GlobalAveragePooling2D(keepdims=True)(x)
        return x * layers.Conv2D(x.shape[-1], 1, activation="sigmoid")(squeezed)

    def _split(self):
        x = self.pick()
        if x.shape[-1] % 2:
            return keras.ops.flip(x, axis=1)
        a, b = keras.ops.split(x, 2, axis=-1)
        return layers.Subtract()([a, b])


def random_model(seed: int, size: int | None = None) -> keras.Model:
    """A model that `seed` decides: one or two inputs, up to four outputs, in any structure.

    Args:
        seed: decides everything, the weights too.
        size: how many steps to grow; by default 2 to 9.
    """
    keras.utils.set_random_seed(seed)
    maker = _Maker(seed)
    inputs = [
        keras.Input((*_SHAPE, maker.random.randint(1, 4)), name=f"in_{number}")
        for number in range(maker.random.choice([1, 1, 2]))
    ]
    maker.pool.extend(inputs)
    for _ in range(size or maker.random.randint(2, 9)):
        maker.grow()
    # Every input must lead somewhere.
    outputs = [maker.pool[-1], *[layers.GlobalMaxPooling2D()(tensor) for tensor in inputs]]
    if maker.random.random() < 0.5:
        outputs.append(maker.random.choice(maker.pool))  # given out already, an input, or inside
    model = keras.Model(_pack_inputs(inputs, maker.random), _pack_outputs(outputs, maker.random))
    _unsettle(model, seed)
    for layer in model.layers:
        layer.trainable = maker.random.random() < 0.8
    return model


def _pack_inputs(inputs: list, choice: random.Random):
    if choice.random() < 0.3:
        return {tensor.name: tensor for tensor in inputs}
    return inputs if len(inputs) > 1 else inputs[0]


def _pack_outputs(outputs: list, choice: random.Random):
    form = choice.choice(["list", "dict", "nested"])
    if form == "list":
        return outputs
    if form == "dict":
        return {f"out_{number}": tensor for number, tensor in enumerate(outputs)}
    return {"main": outputs[0], "rest": list(outputs[1:])}


def _unsettle(model: keras.Model, seed: int) -> None:
    """Gives batch norm and biases values that are not neutral."""
    generator = np.random.default_rng(seed)
    for variable in model.variables:
        if variable.dtype == "float32":
            value = np.abs(generator.normal(size=variable.shape)) * 0.5 + 0.1
            if len(variable.shape) < 2:
                variable.assign(value)


def random_inputs(model: keras.Model, seed: int, batch: int = 2):
    """Samples for a model, in the structure of its inputs."""
    generator = np.random.default_rng(seed)

    def sample(tensor):
        shape = (batch, *tensor.shape[1:])
        if tensor.dtype == "bool":
            return generator.random(shape) < 0.6
        if "int" in tensor.dtype:
            return generator.integers(0, 5, shape).astype(tensor.dtype)
        return generator.normal(size=shape).astype(tensor.dtype)

    return keras.tree.map_structure(sample, keras_private.functional_of(model).input)
