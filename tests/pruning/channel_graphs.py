"""Random models in which channels depend on each other in every way that is known.

Sums, products with gates, concatenations, grouped and depthwise convolutions, shuffles, splits and
slices, flattening, attention, recurrence, embeddings, nested and shared parts, several inputs and
outputs, and layers that channels cannot pass.
"""

import random
from typing import Any

import keras
import numpy as np
from keras import layers

from tfaccel.architectures.shuffling import channel_shuffle

_SIZE = 4
_ACTIVATIONS = ["relu", "sigmoid", "tanh", "swish", None, "softplus", "hard_swish", "gelu"]


class _Maker:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.pool: list[Any] = []
        self.shared: list[Any] = []
        self.models: list[Any] = []
        self.count = 0

    def name(self, what: str) -> str:
        self.count += 1
        return f"{what}_{self.count}"

    def pick(self) -> Any:
        return self.random.choice(self.pool[-4:])

    def width(self) -> int:
        return self.random.choice([2, 3, 4, 6, 8])

    def grow(self) -> None:
        steps = [getattr(self, name) for name in dir(self) if name.startswith("step_")]
        self.pool.append(self.random.choice(steps)())

    def like(self, x: Any, channels: int) -> Any:
        return layers.Conv2D(channels, self.random.choice([1, 3]), padding="same")(x)

    def step_convolution(self) -> Any:
        return layers.Conv2D(
            self.width(),
            self.random.choice([1, 3]),
            padding="same",
            use_bias=self.random.random() < 0.5,
            activation=self.random.choice(_ACTIVATIONS),
        )(self.pick())

    def step_grouped(self) -> Any:
        x = self.pick()
        divisors = [g for g in range(1, x.shape[-1] + 1) if x.shape[-1] % g == 0]
        groups = self.random.choice(divisors)
        filters = groups * self.random.choice([1, 2, 3])
        return layers.Conv2D(filters, 3, padding="same", groups=groups)(x)

    def step_transposed(self) -> Any:
        return layers.Conv2DTranspose(self.width(), 3, padding="same")(self.pick())

    def step_separable(self) -> Any:
        multiplier = self.random.choice([1, 2])
        layer = layers.SeparableConv2D(
            self.width(), 3, padding="same", depth_multiplier=multiplier, activation="relu"
        )
        return layer(self.pick())

    def step_depthwise(self) -> Any:
        multiplier = self.random.choice([1, 1, 2])
        x = self.pick()
        if x.shape[-1] > 12:
            multiplier = 1
        return layers.DepthwiseConv2D(3, padding="same", depth_multiplier=multiplier)(x)

    def step_norm(self) -> Any:
        return layers.BatchNormalization(scale=self.random.random() < 0.7)(self.pick())

    def step_prelu(self) -> Any:
        return layers.PReLU(shared_axes=self.random.choice([None, [1, 2]]))(self.pick())

    def step_activation(self) -> Any:
        activation = self.random.choice([a for a in _ACTIVATIONS if a])
        return layers.Activation(activation)(self.pick())

    def step_operation(self) -> Any:
        x = self.pick()
        kind = self.random.randrange(4)
        if kind == 0:
            return keras.ops.maximum(0.5 * x - 0.1, x)
        if kind == 1:
            return keras.ops.tanh(x) * keras.ops.sigmoid(x)
        if kind == 2:
            return x - keras.ops.mean(x, axis=(1, 2), keepdims=True)
        return x * np.linspace(0.5, 1.5, x.shape[-1], dtype="float32")

    def step_sum(self) -> Any:
        a, b = self.pick(), self.random.choice(self.pool)
        if a.shape[-1] != b.shape[-1]:
            b = self.like(b, a.shape[-1])
        kind = self.random.choice([layers.Add, layers.Multiply, layers.Average, layers.Maximum])
        return kind()([a, b]) if self.random.random() < 0.6 else a + b

    def step_stretched(self) -> Any:
        x = self.pick()
        return x * layers.Conv2D(1, 1, activation="sigmoid")(x)

    def step_gate(self) -> Any:
        x = self.pick()
        squeezed = layers.GlobalAveragePooling2D(keepdims=True)(x)
        squeezed = layers.Conv2D(self.width(), 1, activation="relu")(squeezed)
        return layers.Multiply()([x, layers.Conv2D(x.shape[-1], 1, activation="sigmoid")(squeezed)])

    def step_dense_gate(self) -> Any:
        x = self.pick()
        gate = layers.Dense(x.shape[-1], activation="sigmoid")(layers.GlobalMaxPooling2D()(x))
        return x * layers.Reshape((1, 1, x.shape[-1]))(gate)

    def step_concatenation(self) -> Any:
        a, b = self.pick(), self.random.choice(self.pool)
        if a.shape[-1] + b.shape[-1] > 24:
            return self.like(a, 4)
        if self.random.random() < 0.5:
            return layers.Concatenate()([a, b])
        return (
            keras.ops.concatenate([a, b, a], axis=-1)
            if a is b
            else keras.ops.concatenate([a, b], axis=-1)
        )

    def step_side_by_side(self) -> Any:
        a, b = self.pick(), self.random.choice(self.pool)
        if a.shape[-1] != b.shape[-1]:
            b = self.like(b, a.shape[-1])
        return layers.MaxPooling2D((2, 1))(layers.Concatenate(axis=1)([a, b]))

    def step_shuffle(self) -> Any:
        x = self.pick()
        divisors = [g for g in range(1, x.shape[-1] + 1) if x.shape[-1] % g == 0]
        return channel_shuffle(x, self.random.choice(divisors), name=self.name("shuffle"))

    def step_shuffle_operations(self) -> Any:
        x = self.pick()
        if x.shape[-1] % 2:
            return keras.ops.transpose(keras.ops.transpose(x, (0, 3, 1, 2)), (0, 2, 3, 1))
        y = keras.ops.reshape(x, (-1, _SIZE, _SIZE, 2, x.shape[-1] // 2))
        return keras.ops.reshape(keras.ops.transpose(y, (0, 1, 2, 4, 3)), (-1, *x.shape[1:]))

    def step_split(self) -> Any:
        x = self.pick()
        if x.shape[-1] % 2 or x.shape[-1] < 4:
            cut = max(1, x.shape[-1] // 3)
            return layers.Concatenate()([x[..., cut:], x[:, :, :, :cut]])
        a, b = keras.ops.split(x, 2, axis=-1)
        if self.random.random() < 0.5:
            return layers.Concatenate()([a, self.like(b, self.width())])
        return a * b

    def step_uneven_split(self) -> Any:
        x = self.pick()
        if x.shape[-1] < 3:
            return x
        a, b, c = keras.ops.split(x, [1, 2], axis=-1)
        return keras.ops.concatenate([c, a, b], axis=-1)

    def step_slice(self) -> Any:
        x = self.pick()
        return x[..., : max(1, x.shape[-1] // 2)]

    def step_every_other(self) -> Any:
        return self.pick()[..., ::2]

    def step_impassable(self) -> Any:
        x = self.pick()
        kind = self.random.randrange(3)
        if kind == 0:
            return layers.LayerNormalization()(x)
        return layers.Softmax()(x) if kind == 1 else layers.Activation("softmax")(x)

    def step_shared(self) -> Any:
        x = self.pick()
        for layer in self.shared:
            if layer.input_spec.axes[-1] == x.shape[-1]:
                return layer(x)
        self.shared.append(layers.Conv2D(self.width(), 3, padding="same", activation="relu"))
        return self.shared[-1](x)

    def step_nested(self) -> Any:
        x = self.pick()
        inputs = keras.Input((_SIZE, _SIZE, x.shape[-1]))
        y = layers.BatchNormalization()(inputs)
        y = layers.Conv2D(x.shape[-1], 3, padding="same", activation="relu")(y)
        inner = keras.Model(inputs, y + inputs if self.random.random() < 0.5 else y)
        self.models.append(inner)
        return inner(inner(x)) if self.random.random() < 0.3 else inner(x)

    def step_nested_chain(self) -> Any:
        x = self.pick()
        chain = [layers.Conv2D(self.width(), 1), layers.BatchNormalization(), layers.ReLU()]
        return keras.Sequential([keras.Input((_SIZE, _SIZE, x.shape[-1])), *chain])(x)

    def step_again(self) -> Any:
        for model in self.random.sample(self.models, len(self.models)):
            fitting = [x for x in self.pool if x.shape[-1] == model.input_shape[-1]]
            if fitting:
                return model(self.random.choice(fitting))
        return layers.Dropout(0.3)(self.pick())

    def step_attention(self) -> Any:
        x = self.pick()
        y = layers.Reshape((_SIZE * _SIZE, x.shape[-1]))(x)
        attention = layers.MultiHeadAttention(
            self.random.choice([1, 2, 4]), 3, use_bias=self.random.random() < 0.5
        )
        y = attention(y, y) if self.random.random() < 0.5 else attention(y, value=y, key=y)
        return layers.Reshape((_SIZE, _SIZE, x.shape[-1]))(y)

    def step_recurrent(self) -> Any:
        x = self.pick()
        y = layers.Reshape((_SIZE * _SIZE, -1))(x)
        kind = self.random.choice([layers.LSTM, layers.GRU, layers.SimpleRNN])
        if self.random.random() < 0.5:
            y = kind(self.width(), return_sequences=True)(y)
        else:
            merge = self.random.choice(["concat", "sum"])
            y = layers.Bidirectional(kind(3, return_sequences=True), merge_mode=merge)(y)
        return layers.Reshape((_SIZE, _SIZE, y.shape[-1]))(y)

    def step_states(self) -> Any:
        x = self.pick()
        y = layers.Reshape((_SIZE * _SIZE, x.shape[-1]))(x)
        units = self.width()
        y, h, c = layers.LSTM(units, return_sequences=True, return_state=True)(y)
        y = layers.LSTM(units, return_sequences=True)(y, initial_state=[h, c])
        return layers.Reshape((_SIZE, _SIZE, units))(y)

    def step_dense(self) -> Any:
        return layers.Dense(self.width(), activation="relu")(self.pick())

    def step_flat(self) -> Any:
        y = layers.Dense(_SIZE * _SIZE * 2)(layers.Flatten()(self.pick()))
        return layers.Reshape((_SIZE, _SIZE, 2))(y)

    def step_pool(self) -> Any:
        return layers.AveragePooling2D(2)(layers.ZeroPadding2D(2)(self.pick()))


def channel_graph(seed: int, size: int | None = None) -> keras.Model:
    """A model that `seed` decides, all weights and statistics away from neutral."""
    keras.utils.set_random_seed(seed)
    maker = _Maker(seed)
    inputs = [
        keras.Input((_SIZE, _SIZE, maker.random.randint(1, 4)), name=f"in_{number}")
        for number in range(maker.random.choice([1, 1, 2]))
    ]
    maker.pool.extend(layers.Conv2D(maker.width(), 3, padding="same")(x) for x in inputs)
    if maker.random.random() < 0.3:
        ids = keras.Input((_SIZE * _SIZE,), dtype="int32", name="ids")
        inputs.append(ids)
        words = layers.Embedding(5, maker.width())(ids)
        maker.pool.append(layers.Reshape((_SIZE, _SIZE, words.shape[-1]))(words))
    first = list(maker.pool)
    for _ in range(size or maker.random.randint(3, 12)):
        maker.grow()
    outputs = [layers.Conv2D(3, 1)(maker.pool[-1])]
    outputs += [layers.Dense(2)(layers.GlobalAveragePooling2D()(x)) for x in first]
    if maker.random.random() < 0.3:
        outputs.append(maker.random.choice(maker.pool))
    model = keras.Model(inputs, outputs)
    generator = np.random.default_rng(seed)
    for variable in model.variables:
        if variable.dtype == "float32" and len(variable.shape) < 2:
            variable.assign(np.abs(generator.normal(size=variable.shape)) * 0.5 + 0.2)
    return model
