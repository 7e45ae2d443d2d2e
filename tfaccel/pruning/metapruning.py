"""MetaPruning: a network that makes the weights of all thinner networks, and a search among them.

Liu et al. 2019, MetaPruning: Meta Learning for Automatic Neural Network Channel Pruning. A
`PruningNet` is trained once, with other channel counts in every step; then any counts can be judged
without training, and the best within a budget are trained from scratch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tfaccel.core.checks import check_positive, check_type
from tfaccel.pruning.evolution import Evolution, evolve
from tfaccel.pruning.spaces import MobileNetSpace, check_channels

Cost = Callable[[keras.Model], float]


@keras.saving.register_keras_serializable("tfaccel")
class GeneratedConvolution(keras.layers.Layer):
    """A convolution whose kernel two dense layers make of the channel counts.

    The kernel is always made whole. Channels that a thinner network lacks are zero in what comes
    in and masked in what goes out, which is the same as cropping it and needs no new graph.

    Args:
        filters: most output channels; of a depthwise convolution ignored.
        size: of the window.
        strides: of the window.
        depthwise: whether each channel is convolved alone.
        hidden: units between the two dense layers.
    """

    def __init__(
        self,
        filters: int,
        size: int,
        strides: int = 1,
        depthwise: bool = False,
        hidden: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.filters, self.size, self.strides = filters, size, strides
        self.depthwise, self.hidden = depthwise, hidden
        self.encode = keras.layers.Dense(hidden, activation="relu", name="encode")
        self.norm = keras.layers.BatchNormalization(
            momentum=0.0, center=False, scale=False, name="norm"
        )

    def build(self, x_shape: tuple[int, ...], *_: Any) -> None:
        """Makes the dense layers; the second gives all numbers of the kernel."""
        channels = x_shape[-1]
        outputs = 1 if self.depthwise else self.filters
        self.kernel_shape = (self.size, self.size, channels, outputs)
        fan_in = self.size**2 * (1 if self.depthwise else channels)
        # He's spread of the kernel, from hidden units of which about half are at work.
        spread = keras.initializers.RandomNormal(stddev=float(np.sqrt(4 / fan_in / self.hidden)))
        self.decode = keras.layers.Dense(
            int(np.prod(self.kernel_shape)), kernel_initializer=spread, name="decode"
        )
        self.encode.build((None, 2))
        self.decode.build((None, self.hidden))
        self.norm.build((None, None, None, channels if self.depthwise else self.filters))

    def kernel(self, encoding: Any) -> Any:
        """Returns the whole kernel, [size, size, inputs, outputs], for an encoding [2]."""
        flat = self.decode(self.encode(ops.expand_dims(encoding, 0)))
        return ops.reshape(flat, self.kernel_shape)

    def call(self, x: Any, encoding: Any, mask: Any, training: bool | None = None) -> Any:
        """Convolves, normalizes, applies ReLU.

        Args:
            x: [batch, height, width, channels], zero in channels that are not there.
            encoding: [2], shares of the channels that come in and go out.
            mask: [filters], 1 for channels that go out, 0 for the rest.
            training: whether statistics are the batch's; they are kept for what follows.
        """
        kernel = ops.cast(self.kernel(encoding), x.dtype)
        convolve = ops.depthwise_conv if self.depthwise else ops.conv
        y = convolve(x, kernel, strides=self.strides, padding="same")
        y = self.norm(y * ops.cast(mask, y.dtype), training=training)
        return ops.relu(y)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        names = ("filters", "size", "strides", "depthwise", "hidden")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable("tfaccel")
class PruningNet(keras.Model):
    """Makes the weights of every network of a space; trained by plain `compile` and `fit`.

    In training, each batch runs with channel counts drawn at random, so that the generated weights
    serve all of them. Statistics of the batch norms are those of the last batch that ran in
    training: `score` and `materialize` run calibration images first (the paper, section 3.3, takes
    them anew for each candidate as well). `evaluate` alone means nothing.

    Args:
        space: the networks.
        hidden: units of the dense layers that make a kernel.
        seed: of the channel counts drawn.

    Example:
        >>> space = MobileNetSpace((8, 8, 1), classes=2, stem=4, blocks=((8, 2),))
        >>> PruningNet(space)(np.zeros((1, 8, 8, 1))).shape
        TensorShape([1, 2])
    """

    def __init__(
        self, space: MobileNetSpace, hidden: int = 32, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_type("space", space, MobileNetSpace)
        check_positive("hidden", hidden)
        self.space, self.hidden, self.seed = space, hidden, seed
        self.draws = keras.random.SeedGenerator(seed)
        whole = space.whole
        self.stem = GeneratedConvolution(whole[0], 3, space.stem_stride, hidden=hidden, name="stem")
        self.depthwise = [
            GeneratedConvolution(0, 3, stride, True, hidden, name=f"block{i}_depthwise")
            for i, (_, stride) in enumerate(space.blocks, start=1)
        ]
        self.pointwise = [
            GeneratedConvolution(count, 1, hidden=hidden, name=f"block{i}_pointwise")
            for i, count in enumerate(whole[1:], start=1)
        ]
        self.logits = keras.layers.Dense(space.classes, name="logits")
        self._run: Any = None

    def call(self, x: Any, training: bool | None = None, channels: Any = None) -> Any:
        """Returns logits, [batch, classes].

        Args:
            x: images, [batch, height, width, channels].
            training: whether batch norms take the batch's statistics.
            channels: [stem and blocks] int, counts; drawn in training, else whole by default.
        """
        if channels is None:
            channels = self._draw() if training else ops.convert_to_tensor(self.space.whole)
        shares = ops.cast(channels, "float32") / np.array(self.space.whole, "float32")
        masks = [
            ops.cast(ops.arange(count) < channels[i], "float32")
            for i, count in enumerate(self.space.whole)
        ]
        x = self.stem(x, ops.stack([ops.ones(()), shares[0]]), masks[0], training=training)
        for i, (depthwise, pointwise) in enumerate(
            zip(self.depthwise, self.pointwise, strict=True)
        ):
            encoding = ops.stack([shares[i], shares[i + 1]])
            x = depthwise(x, encoding, masks[i], training=training)
            x = pointwise(x, encoding, masks[i + 1], training=training)
        return self.logits(ops.mean(x, axis=(1, 2)))

    def score(self, channels: Sequence[int], calibration: Any, data: tuple[Any, Any]) -> float:
        """Returns the accuracy of the network with these counts and generated weights.

        Args:
            channels: counts of stem and blocks.
            calibration: images that batch norms take their statistics from, in one batch.
            data: (x, y), held-out images and labels.
        """
        check_channels(self.space, channels)
        counts = np.array(channels, "int32")
        self._call(calibration, True, counts)
        x, y = data
        right = 0
        for start in range(0, len(x), _BATCH):
            logits = self._call(x[start : start + _BATCH], False, counts)
            found = ops.convert_to_numpy(logits).argmax(axis=-1)
            right += int((found == y[start : start + _BATCH]).sum())
        return right / len(x)

    def materialize(self, channels: Sequence[int], calibration: Any) -> keras.Model:
        """Returns a plain model with these counts and the weights that are generated for them.

        Args:
            channels: counts of stem and blocks.
            calibration: images that batch norms take their statistics from, in one batch.
        """
        plain = self.space.build(channels)
        self._call(calibration, True, np.array(channels, "int32"))
        counts = [self.space.input_shape[-1], *channels]
        shares = [1.0, *np.divide(channels, self.space.whole)]
        made = [(self.stem, 0, counts[0], counts[1])]
        for i, (depthwise, pointwise) in enumerate(
            zip(self.depthwise, self.pointwise, strict=True), start=1
        ):
            made += [(depthwise, i, counts[i], 1), (pointwise, i, counts[i], counts[i + 1])]
        for layer, i, inputs, outputs in made:
            encoding = np.array(shares[i : i + 2], "float32")
            kernel = ops.convert_to_numpy(layer.kernel(encoding))[:, :, :inputs, :outputs]
            plain.get_layer(layer.name).set_weights([kernel])
            kept = inputs if layer.depthwise else outputs
            norm = plain.get_layer(f"{layer.name}_norm")
            norm.moving_mean.assign(layer.norm.moving_mean[:kept])
            norm.moving_variance.assign(layer.norm.moving_variance[:kept])
        kernel, bias = self.logits.get_weights()
        plain.get_layer("logits").set_weights([kernel[: channels[-1]], bias])
        return plain

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        space = keras.saving.serialize_keras_object(self.space)
        return {**super().get_config(), "space": space, "hidden": self.hidden, "seed": self.seed}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "PruningNet":
        """Returns an untrained net as `get_config` described it."""
        space = keras.saving.deserialize_keras_object(config["space"], custom_objects)
        return cls(**{**config, "space": space})

    def _draw(self) -> Any:
        step = self.space.multiple_of
        drawn = [
            keras.random.randint((), choices[0] // step, choices[-1] // step + 1, seed=self.draws)
            for choices in self.space.choices
        ]
        return step * ops.stack(drawn)

    def _call(self, x: Any, training: bool, channels: Any) -> Any:
        """Calls the model, on TensorFlow as one graph for all channel counts."""
        if self._run is None:

            def run(x: Any, training: bool, channels: Any) -> Any:
                return self(x, training=training, channels=channels)

            if keras.backend.backend() == "tensorflow":
                import tensorflow as tf

                run = tf.function(run, reduce_retracing=True)
            self._run = run
        return self._run(
            ops.convert_to_tensor(x, self.compute_dtype), training, ops.convert_to_tensor(channels)
        )


def metaprune(
    net: PruningNet,
    budget: float,
    calibration: Any,
    data: tuple[Any, Any],
    *,
    cost: Cost | None = None,
    population: int = 50,
    parents: int = 10,
    generations: int = 20,
    mutation: float = 0.1,
    seed: int = 0,
    report: Callable[[int, float], Any] | None = None,
) -> Evolution:
    """Searches the channel counts that are most accurate within a budget.

    Train what `net.space.build(result.genes)` gives from scratch, as the paper does: the generated
    weights only rank.

    Args:
        net: a trained PruningNet.
        budget: the highest cost allowed, in multiply-accumulates unless `cost` is given.
        calibration: images for the batch norms' statistics, of the training set.
        data: (x, y), images and labels to choose by. Not the test set.
        cost: what a plain model costs, such as its measured latency in milliseconds. It is called
            for every candidate that is drawn; by default the multiply-accumulates, counted from the
            counts alone.
        population: candidates in a generation.
        parents: best candidates that the next generation comes from.
        generations: after the first population.
        mutation: probability for each count to be drawn anew.
        seed: of all draws.
        report: `report(generation, best accuracy)`, called after each generation.

    Returns:
        The search's result; `genes` are the channel counts, `score` the accuracy on `data`.

    Raises:
        TypeError: `net` is no PruningNet.
        ValueError: an argument is out of range, or nothing fits the budget.
    """
    check_type("net", net, PruningNet)
    check_positive("budget", budget)
    space = net.space

    def cost_of(channels: tuple[int, ...]) -> float:
        return float(space.macs(channels) if cost is None else cost(space.build(channels)))

    return evolve(
        space.choices,
        lambda channels: net.score(channels, calibration, data),
        cost_of,
        budget,
        population=population,
        parents=parents,
        generations=generations,
        mutation=mutation,
        seed=seed,
        report=report,
    )


_BATCH = 500
