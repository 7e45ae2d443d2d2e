"""What every technique must satisfy, and the rows that must satisfy it.

A new rewrite, wrapper, loss, optimizer or callback adds one row here and is then held to every
property in this folder.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

import tfaccel
from tests.core.transform_samples import Neutral, all_weights
from tfaccel import distillation
from tfaccel.compat.tfmot.sparsity import keras as sparsity
from tfaccel.core.graph import flat_layers
from tfaccel.core.transforms import transform_model
from tfaccel.distributed import callbacks
from tfaccel.quantization import XNORNet, cluster, low_bit, quantize, quantize_aware
from tfaccel.rewriting import (
    factorize,
    fold_batch_norm,
    replace_activations,
    replace_layers,
)

IMAGE = (8, 8, 3)
CLASSES = 4


# Models


def convolutional() -> keras.Model:
    """Convolution, batch norm, a residual sum, depthwise, dense: what most techniques want."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input(IMAGE, name="image")
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="_conv_stem")(inputs)
    x = layers.ReLU(name="stem_relu")(layers.BatchNormalization(name="stem_norm")(x))
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")(x)
    y = layers.ReLU(6.0, name="depthwise_relu")(layers.BatchNormalization(name="depthwise_norm")(y))
    y = layers.Conv2D(8, 1, name="project")(y)
    x = layers.ReLU(name="sum_relu")(layers.Add(name="sum")([x, y]))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="logits")(x), name="convolutional")


def sequential() -> keras.Model:
    """A plain Sequential model."""
    keras.utils.set_random_seed(2)
    return keras.Sequential(
        [
            keras.Input(IMAGE, name="image"),
            layers.Conv2D(8, 3, strides=2, activation="relu", name="conv"),
            layers.MaxPooling2D(name="pool"),
            layers.Flatten(name="flatten"),
            layers.Dense(16, activation="relu", name="hidden"),
            layers.Dropout(0.1, seed=3, name="dropout"),
            layers.Dense(CLASSES, name="logits"),
        ],
        name="sequential",
    )


def nested() -> keras.Model:
    """A model inside a model, and a layer that two paths share."""
    keras.utils.set_random_seed(3)
    body_in = keras.Input((8, 8, 6), name="body_in")
    body = layers.Conv2D(8, 3, name="body_conv")(body_in)
    body = layers.ReLU(name="body_relu")(layers.BatchNormalization(name="body_norm")(body))
    inputs = keras.Input(IMAGE, name="image")
    shared = layers.Conv2D(6, 3, padding="same", name="shared")
    x = shared(inputs) + shared(layers.ZeroPadding2D(0, name="same")(inputs))
    x = keras.Model(body_in, body, name="body")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="logits")(x), name="nested")


MODELS: dict[str, Callable[[], keras.Model]] = {
    "convolutional": convolutional,
    "sequential": sequential,
    "nested": nested,
}


def make_data(size: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Four classes that a small network can tell apart: the brightest quadrant."""
    random = np.random.default_rng(seed)
    y = random.integers(0, CLASSES, size)
    x = random.normal(scale=0.3, size=(size, *IMAGE)).astype("float32")
    for image, label in zip(x, y, strict=True):
        row, column = divmod(int(label), 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
    return x, y


# Rows


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A `Model -> Model` function.

    Attributes:
        apply: the rewrite with arguments that suit the models above.
        callbacks: makes what `fit` needs.
        keeps_outputs: the largest difference of the outputs that the rewrite may make by itself, or
            None if it changes them.
        strips_exactly: whether `strip` gives the same outputs (fake-quantized activations do not).
        keeps_shapes: whether kernels that are let stand keep their shapes; else they lose rows.
        refuses_alike: whether a model that does not fit is refused in tfaccel's words; another
            library's names refuse as that library does.
        keeps_weights: whether kernels that are let stand keep their values.
        like: "keras", or a row with the same classes of layers, or more: how they train under XLA,
            in half precision or after loading is shown by Keras, or by that row.
    """

    apply: Callable[[keras.Model], keras.Model]
    callbacks: Callable[[], list[Any]] = list
    keeps_outputs: float | None = None
    strips_exactly: bool = True
    keeps_shapes: bool = True
    refuses_alike: bool = True
    keeps_weights: bool = True
    like: str | None = None


def prune(model: keras.Model) -> keras.Model:
    """Half of the weights, from the first step on."""
    return tfaccel.pruning.prune(model, 0.5)


def update_pruning() -> list[Any]:
    """The callback that pruning needs."""
    return [tfaccel.pruning.UpdatePruning()]


def prune_by_movement(model: keras.Model) -> keras.Model:
    """Scores are trained beside the weights, and two of four inputs kept."""
    # Turns at the beginning of executions of four steps, which one of the contracts has.
    schedule = tfaccel.pruning.ConstantSparsity(0.5, 5, frequency=4)
    return tfaccel.pruning.prune(model, schedule, pattern="2:4", criterion="movement")


def penalize_where_there_is_batch_norm(model: keras.Model) -> keras.Model:
    """What `penalize_batch_norm` refuses is given back as a copy."""
    if not any(isinstance(x, layers.BatchNormalization) for x in flat_layers(model)):
        return tfaccel.strip(model)
    return tfaccel.pruning.penalize_batch_norm(model)


REWRITES: dict[str, Rewrite] = {
    "transform_model": Rewrite(
        lambda m: transform_model(m, all_weights(Neutral)), keeps_outputs=0.0
    ),
    "strip": Rewrite(tfaccel.strip, keeps_outputs=0.0, like="keras"),
    "bake_weights": Rewrite(tfaccel.core.bake_weights, keeps_outputs=0.0, like="keras"),
    "fold_batch_norm": Rewrite(fold_batch_norm, keeps_outputs=1e-5, like="keras"),
    "factorize": Rewrite(lambda m: factorize(m, energy=0.8, exclude="logits"), like="keras"),
    "replace_activations": Rewrite(
        lambda m: replace_activations(m, {"relu": "silu"}), like="keras"
    ),
    "replace_layers": Rewrite(
        lambda m: replace_layers(
            m, layers.Dense, lambda x: layers.Dense.from_config(x.get_config())
        ),
        keeps_outputs=1e-5,
        like="keras",
    ),
    "prune_channels": Rewrite(
        lambda m: tfaccel.pruning.prune_channels(m, {"parameters": 0.6}, multiple_of=1),
        keeps_shapes=False,
        like="keras",
    ),
    "penalize_batch_norm": Rewrite(penalize_where_there_is_batch_norm, keeps_outputs=0.0),
    "prune": Rewrite(prune, update_pruning),
    "prune_by_movement_two_of_four": Rewrite(prune_by_movement, update_pruning),
    "prune_low_magnitude": Rewrite(
        lambda m: sparsity.prune_low_magnitude(m, sparsity.ConstantSparsity(0.5, 1)),
        lambda: [sparsity.UpdatePruningStep()],
        refuses_alike=False,
        like="prune",
    ),
    "cluster": Rewrite(lambda m: cluster(m, 8, seed=1)),
    "low_bit_xnor": Rewrite(lambda m: low_bit(m, XNORNet(input_scale=True), seed=1)),
    "low_bit_ttq": Rewrite(lambda m: low_bit(m, "ttq")),
    "quantize_aware": Rewrite(quantize_aware, strips_exactly=False),
    "quantize": Rewrite(
        lambda m: quantize(m, make_data()[0]),
        strips_exactly=False,
        keeps_weights=False,
        like="quantize_aware",
    ),
    "prune_then_quantize_aware": Rewrite(
        lambda m: quantize_aware(prune(m)),
        update_pruning,
        strips_exactly=False,
    ),
}


def distiller(student: keras.Model) -> keras.Model:
    """A distiller with an untrained teacher."""
    return distillation.Distiller(convolutional(), student)


@dataclasses.dataclass(frozen=True)
class Part:
    """Something replaceable that is not a rewrite, and how to make it."""

    make: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Loss(Part):
    """A distillation loss that compares the outputs of two models, and is 0 for equal ones.

    Attributes:
        options: what `compute_loss` needs besides.
    """

    options: dict[str, Any] = dataclasses.field(default_factory=dict)


# What lands in a saved model besides TransformedLayer, which the rewrites above put there.
LAYERS: dict[str, Part] = {
    "Dequantize": Part(lambda: tfaccel.quantization.Dequantize(name="end_of_integers")),
    "FakeQuantize": Part(lambda: tfaccel.quantization.FakeQuantize(name="quantize")),
}
LOSSES: dict[str, Loss] = {
    "LogitDistillation": Loss(lambda: distillation.LogitDistillation(temperature=2.0)),
    "DecoupledDistillation": Loss(
        lambda: distillation.DecoupledDistillation(beta=2.0), {"labels": np.array([0, 1, 2, 3, 0])}
    ),
    "MultiLabelDistillation": Loss(lambda: distillation.MultiLabelDistillation(temperature=2.0)),
    "RegressionDistillation": Loss(lambda: distillation.RegressionDistillation(sigma=0.5)),
    "HintLoss": Loss(lambda: distillation.HintLoss(resize="bilinear")),
    "SimilarityPreserving": Loss(distillation.SimilarityPreserving),
    "RelationalDistillation": Loss(lambda: distillation.RelationalDistillation(angle_weight=1.0)),
    "ForOutput": Loss(
        lambda: distillation.ForOutput(0, distillation.LogitDistillation(temperature=2.0))
    ),
}
SCHEDULES: dict[str, Part] = {
    "ConstantSparsity": Part(lambda: tfaccel.pruning.ConstantSparsity(0.5, 2)),
    "PolynomialDecay": Part(lambda: tfaccel.pruning.PolynomialDecay(0.1, 0.9, 3, 7)),
}
# With one worker each must be as if it were not there.
OPTIMIZERS: dict[str, Part] = {
    "DistributedOptimizer": Part(
        lambda: tfaccel.distributed.DistributedOptimizer(keras.optimizers.Adam(0.01))
    ),
}
CALLBACKS: dict[str, Part] = {
    "BroadcastGlobalVariablesCallback": Part(lambda: callbacks.BroadcastGlobalVariablesCallback(0)),
    "MetricAverageCallback": Part(callbacks.MetricAverageCallback),
}
