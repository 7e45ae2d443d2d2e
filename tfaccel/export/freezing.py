"""A Keras model as a frozen TensorFlow graph with a signature: what the converter reads best."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.cloning import copy_state
from tfaccel.core.graph import Graph, map_models
from tfaccel.core.quiet import silence_native_output


def save_frozen(model: keras.Model, folder: Path, batch_size: int | None) -> None:
    """Writes a SavedModel whose weights are constants.

    Fake-quantization ranges fold only as constants, and only a SavedModel gives the .tflite file a
    signature.

    Args:
        model: a Functional or Sequential model in float32.
        folder: where to write.
        batch_size: samples that the file takes at once, None for any number.
    """
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import (  # no public path
        convert_variables_to_constants_v2,
    )

    structure = keras_private.functional_of(model).input
    specs = [
        tf.TensorSpec((batch_size, *tensor.shape[1:]), tensor.dtype, name=name)
        for name, tensor in zip(input_names(model), model.inputs, strict=True)
    ]
    names = output_names(model)

    @tf.function(input_signature=specs, autograph=False)
    def run(*tensors: Any) -> Any:
        # A scope of our own: TensorFlow allows no root scope that begins with an underscore.
        with tf.name_scope("model"):
            inputs = keras.tree.pack_sequence_as(structure, list(tensors))
            outputs = keras.tree.flatten(model(inputs, training=False))
        return dict(zip(names, outputs, strict=True))

    concrete = run.get_concrete_function()
    # A dict comes out of a graph in the order of its sorted keys.
    order = sorted(names)
    frozen = convert_variables_to_constants_v2(concrete)

    @tf.function(input_signature=specs, autograph=False)
    def serve(*tensors: Any) -> Any:
        return dict(zip(order, frozen(*map(tf.convert_to_tensor, tensors)), strict=True))

    module = tf.Module()
    module.serve = serve
    tf.saved_model.save(
        module, str(folder), signatures={"serving_default": serve.get_concrete_function()}
    )


def input_names(model: keras.Model) -> list[str]:
    """Returns the names of the signature's inputs: those of the model's, fit for TensorFlow."""
    return _plain_names([tensor.name for tensor in model.inputs])


def output_names(model: keras.Model) -> list[str]:
    """Returns the names of the signature's outputs, in the order of the model's outputs."""
    return _plain_names(keras_private.functional_of(model).output_names)


def _plain_names(names: list[str]) -> list[str]:
    plain: list[str] = []
    for name in names:
        base = candidate = re.sub(r"\W", "_", name, flags=re.ASCII).lstrip("_") or "tensor"
        number = 0
        while candidate in plain:
            number += 1
            candidate = f"{base}_{number}"
        plain.append(candidate)
    return plain


def to_float32(model: keras.Model) -> keras.Model:
    """Returns the model with every mixed-precision layer computing in float32.

    Half precision is a matter of training; the converter has no bfloat16 and quantizes float32
    only.
    """

    def edit(graph: Graph) -> None:
        for layer in graph.layers():
            config = layer.get_config()
            plain = _in_float32(config)
            if plain == config or keras_private.has_graph(layer):
                continue
            copy = type(layer).from_config(plain)
            build_config = layer.get_build_config()
            if build_config and not copy.built:
                copy.build_from_config(build_config)
            copy.built = True
            copy_state(layer, copy)
            graph.replace_layer(layer, copy)

    return map_models(model, edit)


def _in_float32(config: Any) -> Any:
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            name = config["config"]["name"]
            float_like = name.startswith(("mixed_", "float", "bfloat"))
            return {**config, "config": {"name": "float32"}} if float_like else config
        return {key: _in_float32(value) for key, value in config.items()}
    if isinstance(config, list):
        return [_in_float32(value) for value in config]
    return config


@contextlib.contextmanager
def quiet_tensorflow(*, verbose: bool) -> Iterator[None]:
    """Keeps what TensorFlow and its converter print from the terminal, unless `verbose`."""
    if verbose:
        yield
        return
    loggers = [logging.getLogger(name) for name in ("tensorflow", "absl")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), silence_native_output():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
