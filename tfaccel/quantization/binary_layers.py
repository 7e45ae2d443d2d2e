"""Layers that make signs of activations, and give outputs the size that the signs have lost."""

from collections.abc import Sequence
from typing import Any

import keras

from tfaccel.core.checks import check_in
from tfaccel.quantization.low_bit_weights import straight_through

Shape = tuple[int | None, ...]


@keras.saving.register_keras_serializable("tfaccel")
class Binarize(keras.layers.Layer):
    """Sign of each value, +1 for zero; the gradient passes where |x| <= 1 (hard tanh).

    In a plain model (`tfaccel.strip`) a small model of Keras operations of the same name stands for
    it, sign(sign(x) + 1/2), which gives the same to the last bit.

    References:
        Hubara et al. 2016, Binarized Neural Networks, eq. 4.

    Example:
        >>> [float(x) for x in Binarize()(keras.ops.convert_to_tensor([-0.2, 0.0, 3.0]))]
        [-1.0, 1.0, 1.0]
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self._input_shape: Shape = ()

    def build(self, input_shape: Shape) -> None:
        """Remembers the shape, for the plain model."""
        self._input_shape = tuple(input_shape)

    def call(self, inputs: Any) -> Any:
        """Returns the signs of `inputs`, of any shape."""
        inside = keras.ops.cast(keras.ops.abs(inputs) <= 1, inputs.dtype)
        # The slope is zero where this clips; an infinite input must not give inf - inf.
        source = keras.ops.clip(inputs, -2.0, 2.0)
        return straight_through(keras.ops.stop_gradient(_sign(inputs)), source, inside)

    def strip_layer(self) -> keras.Model:
        """Returns a plain model that computes the same."""
        inputs = _any_input(self._input_shape, self.compute_dtype, f"{self.name}_input")
        return keras.Model(inputs, _sign(inputs), name=self.name)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments; Keras cannot derive those that are objects."""
        return dict(super().get_config())


@keras.saving.register_keras_serializable("tfaccel")
class InputScale(keras.layers.Layer):
    """Outputs of a binary layer times K, the mean |x| of the inputs that each of them sums over.

    K = k * mean over channels of |x|, where the box k has 1 / (its size) everywhere; what is padded
    counts as zero. For a dense layer K is one number a sample.

    Args:
        kernel_size: of the convolution; () for a dense layer.
        strides: of the convolution.
        padding: "valid" or "same".
        dilation_rate: of the convolution.
        use_bias: whether a trained bias is added afterwards.
        name: of the layer.

    Raises:
        ValueError: the padding is another.

    References:
        Rastegari et al. 2016, XNOR-Net, section 3.2, eq. 11.
    """

    def __init__(
        self,
        kernel_size: Sequence[int] = (),
        strides: Sequence[int] = (),
        padding: str = "valid",
        dilation_rate: Sequence[int] = (),
        use_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        check_in("padding", padding, ("valid", "same"))
        super().__init__(**kwargs)
        self.kernel_size = tuple(kernel_size)
        self.strides = tuple(strides) or (1,) * len(self.kernel_size)
        self.padding = padding
        self.dilation_rate = tuple(dilation_rate) or (1,) * len(self.kernel_size)
        self.use_bias = use_bias
        self.bias: keras.Variable | None = None
        self._shapes: tuple[Shape, Shape] = ((), ())

    def build(self, input_shape: Sequence[Shape]) -> None:
        """Makes the bias."""
        outputs_shape, inputs_shape = input_shape
        self._shapes = tuple(outputs_shape), tuple(inputs_shape)
        if self.use_bias:
            self.bias = self.add_weight(
                shape=(outputs_shape[-1],), initializer="zeros", name="bias"
            )

    def call(self, inputs: Sequence[Any]) -> Any:
        """Returns scaled outputs.

        Args:
            inputs: what the binary layer gives, [batch, ..., channels out], without a bias; and
                what it reads, [batch, ..., channels in], before the signs were taken.
        """
        outputs, inputs = inputs
        size = keras.ops.mean(keras.ops.abs(inputs), axis=-1, keepdims=True)
        if self.kernel_size:
            box = keras.ops.cast(self._box(), size.dtype)
            size = keras.ops.conv(
                size, box, self.strides, self.padding, "channels_last", self.dilation_rate
            )
        scaled = outputs * size
        return scaled if self.bias is None else scaled + self.bias

    def _box(self) -> Any:
        count = 1
        for window in self.kernel_size:
            count *= window
        return keras.ops.ones((*self.kernel_size, 1, 1)) / count

    def strip_layer(self) -> keras.Model:
        """Returns a plain model of outputs and inputs that computes the same, the bias fixed."""
        outputs, inputs = (
            _any_input(shape, self.compute_dtype, f"{self.name}_{role}")
            for shape, role in zip(self._shapes, ("outputs", "inputs"), strict=True)
        )
        policy = self.dtype_policy
        size = keras.ops.mean(keras.ops.abs(inputs), axis=-1, keepdims=True)
        if self.kernel_size:
            kind = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
            box = kind[len(self.kernel_size) - 1](
                1,
                self.kernel_size,
                strides=self.strides,
                padding=self.padding,
                dilation_rate=self.dilation_rate,
                use_bias=False,
                trainable=False,
                dtype=policy,
                name=f"{self.name}_box",
            )
            size = box(size)
            box.set_weights([self._box()])
        scaled = outputs * size
        if self.bias is not None:
            offset = [float(value) for value in keras.ops.convert_to_numpy(self.bias)]
            layer = keras.layers.Rescaling(1.0, offset, dtype=policy, name=f"{self.name}_bias")
            scaled = layer(scaled)
        return keras.Model([outputs, inputs], scaled, name=self.name)

    def compute_output_shape(self, input_shape: Any) -> Shape:
        """Returns the shape of the outputs; their shape alone will do."""
        shape = input_shape[0] if isinstance(input_shape[0], (tuple, list)) else input_shape
        return tuple(shape)

    def compute_output_spec(self, inputs: Any) -> Any:
        """Returns the shape and type of the outputs; the outputs alone will do."""
        outputs = inputs[0] if isinstance(inputs, (tuple, list)) else inputs
        return keras.KerasTensor(outputs.shape, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
            "use_bias": self.use_bias,
        }


def _sign(inputs: Any) -> Any:
    return keras.ops.sign(keras.ops.sign(inputs) + 0.5)


def _any_input(shape: Shape, dtype: str, name: str) -> Any:
    """Returns an input of samples of one channel count, any other size."""
    return keras.Input((*(None,) * (len(shape) - 2), shape[-1]), dtype=dtype, name=name)
