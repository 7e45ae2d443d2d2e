"""A Keras model as a TensorFlow graph with a signature: what the converter reads best."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.cloning import recurrent_states
from tfaccel.core.graph import Graph, Tensor, flat_layers
from tfaccel.core.precision import change_policy
from tfaccel.core.walking import map_layers
from tfaccel.quantization import FakeQuantize

# What `tfaccel.export.diagnosis` knows these refusals by.
STATES = "a layer writes to its own weights"

_LOOPS = ("While", "StatelessWhile", "If", "StatelessIf")


def save_inference(model: keras.Model, folder: Path, batch_size: int | None) -> list[str]:
    """Writes a SavedModel that does what the model does in inference.

    Only a SavedModel gives the .tflite file a signature. Its weights are variables, which the
    converter freezes by itself: as constants in the graph, TensorFlow would copy them some 20
    times. Inputs, outputs and weights get numbered names.

    Args:
        model: a Functional or Sequential model in float32, of names that `name_scopes` has made.
        folder: where to write.
        batch_size: samples that the file takes at once, None for any number.

    Returns:
        Names of the graph's loops and branches, each within its layer's scope.

    Raises:
        NotImplementedError: a layer changes its own state in inference.
    """
    import tensorflow as tf

    structure = keras_private.functional_of(model).input
    specs = [
        tf.TensorSpec((batch_size, *tensor.shape[1:]), tensor.dtype, name=f"input_{number:03}")
        for number, tensor in enumerate(model.inputs)
    ]

    module = tf.Module()
    # Variables of our own, since TensorFlow refuses the names of some: as Keras has them.
    module.weights = [
        tf.Variable(variable.value, trainable=False, name=f"weight_{number:04}")
        for number, variable in enumerate(model.variables)
    ]

    @tf.function(input_signature=specs, autograph=False)
    def run(*tensors: Any) -> Any:
        # A scope of our own: TensorFlow allows no root scope that begins with an underscore.
        with tf.name_scope("model"):
            inputs = keras.tree.pack_sequence_as(structure, list(tensors))
            values = map(tf.convert_to_tensor, module.weights)
            with keras.StatelessScope(list(zip(model.variables, values, strict=True))) as scope:
                before = {id(v): scope.get_current_value(v) for v in model.variables}
                outputs = _numbered(keras.tree.flatten(model(inputs, training=False)))
            _check_stateless(model, scope, before)
            return outputs

    module.serve = run
    concrete = run.get_concrete_function()
    # Gradients of swish and the like cannot be saved, and nobody needs them here.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(module, str(folder), {"serving_default": concrete}, options)
    return [op.name for op in concrete.graph.get_operations() if op.type in _LOOPS]


def _check_stateless(
    model: keras.Model, scope: keras.StatelessScope, before: Mapping[int, Any]
) -> None:
    for layer in flat_layers(model):
        # The converter itself refuses what draws random numbers.
        seeds = {id(state) for state in keras_private.seed_states(layer)}
        for variable in (*layer.variables, *recurrent_states(layer)):
            value = scope.get_current_value(variable)
            if value is not before.get(id(variable)) and id(variable) not in seeds:
                raise NotImplementedError(f"{STATES}: ['model/{layer.name}/{variable.name}']")


def _numbered(outputs: Any) -> dict[str, Any]:
    return {f"output_{number:03}": output for number, output in enumerate(outputs)}


def end_names(model: keras.Model) -> tuple[list[str], list[str]]:
    """Returns the names of a model's inputs and outputs, for the file's signature.

    A dict's keys, else the names of the input layers and of the layers that give the outputs;
    numbered where two are equal. Rounding for quantization gives no name, so that all files made
    from one network have the same.
    """
    graph = Graph.read(model)
    functional = keras_private.functional_of(model)
    inputs = [_producer(graph, tensor) for tensor in graph.inputs]
    outputs = [_producer(graph, tensor) for tensor in graph.outputs]
    return _told_apart(functional.input, inputs), _told_apart(functional.output, outputs)


def _producer(graph: Graph, tensor: Tensor) -> str:
    node = graph.producer(tensor)
    return _producer(graph, node.inputs[0]) if isinstance(node.layer, FakeQuantize) else node.name


def _told_apart(structure: Any, producers: list[str]) -> list[str]:
    names: list[str] = []
    paths = [path for path, _ in keras.tree.flatten_with_path(structure)]
    for path, producer in zip(paths, producers, strict=True):
        keyed = any(isinstance(part, str) for part in path)
        base = candidate = "_".join(map(str, path)) if keyed else producer
        number = 0
        while candidate in names:
            number += 1
            candidate = f"{base}_{number}"
        names.append(candidate)
    return names


def name_scopes(model: keras.Model) -> dict[str, str]:
    """Renames the layers whose names TensorFlow refuses, in place.

    Args:
        model: a copy that nobody else holds.

    Returns:
        What each layer's scope in the graph stands for: the layer's own name and class.
    """
    layers = {id(layer): layer for layer in (*keras_private.sublayers(model), *flat_layers(model))}
    own_names = {id(layer): layer.name for layer in layers.values()}
    taken = set(own_names.values())
    for layer in layers.values():
        if re.fullmatch(r"[A-Za-z0-9_.>-]+", layer.name):
            continue
        base = candidate = re.sub(r"[^A-Za-z0-9_.>-]", "_", layer.name)
        number = 0
        while candidate in taken:
            number += 1
            candidate = f"{base}_{number}"
        taken.add(candidate)
        layer.name = candidate
    return {
        layer.name: f"{own_names[id(layer)]!r} ({type(layer).__name__})"
        for layer in flat_layers(model)
    }


def to_float32(model: keras.Model) -> keras.Model:
    """Returns the model with every layer computing in float32; itself if all do already.

    Half precision is a matter of training; the converter has no bfloat16 and quantizes float32
    only.
    """
    copies = {id(layer): change_policy(layer, "float32") for layer in flat_layers(model)}
    if all(copy is None for copy in copies.values()):
        return model
    return map_layers(model, lambda layer: copies.get(id(layer)))
