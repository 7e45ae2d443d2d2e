"""The stages of a cut model: each a Keras model of its own, with the layers' weights."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import keras

from tfaccel.core.cloning import copy_state
from tfaccel.core.graph import Graph, Node, Tensor
from tfaccel.distributed.cutting import Calls

_DIFFERENTIABLE = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of a model.

    Attributes:
        number: place in the pipeline, from 0.
        received: what the stage before sends.
        data: places of the model's inputs that it reads itself, flat.
        data_names: the names of these inputs.
        sent: what it gives to the stage behind it; of the last stage nothing.
        nodes: its calls.
        output_tree: what the stage's model gives: `sent` as a list, or the model's outputs.
    """

    number: int
    received: tuple[Tensor, ...]
    data: tuple[int, ...]
    data_names: tuple[str, ...]
    sent: tuple[Tensor, ...]
    nodes: tuple[Node, ...]
    output_tree: Any

    @property
    def layers(self) -> list[keras.layers.Layer]:
        """The layers of the whole model that are called in this stage, each once."""
        unique = {id(n.operation): n.operation for n in self.nodes if n.layer is not None}
        return list(unique.values())


def plan_stages(calls: Calls, positions: Sequence[int]) -> list[Stage]:
    """Cuts a model.

    Args:
        calls: of the model.
        positions: of the cuts, ascending.

    Returns:
        `len(positions) + 1` stages. A tensor that skips stages is passed on by those between.
    """
    graph, cuts = calls.graph, {cut.position: cut for cut in calls.cuts()}
    bounds = [0, *positions, len(calls.calls)]
    stages = []
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        received = cuts[begin].tensors if begin else ()
        last = end == len(calls.calls)
        sent = () if last else cuts[end].tensors
        output_tree = graph.output_tree if last else list(sent)
        nodes = calls.calls[begin:end]
        wanted = [tensor for node in nodes for tensor in node.inputs]
        wanted += keras.tree.flatten(output_tree)
        ids = {id(tensor) for tensor in wanted}
        data = tuple(i for i, tensor in enumerate(graph.inputs) if id(tensor) in ids)
        names = tuple(graph.producer(graph.inputs[place]).name for place in data)
        stages.append(Stage(number, received, data, names, sent, tuple(nodes), output_tree))
    return stages


def build_stage(calls: Calls, stage: Stage) -> keras.Model:
    """Makes the model of a stage: it takes a list, the received tensors and then its own data.

    Its layers are copies with the same names, weights and seeds.
    """
    graph = calls.graph
    own = [graph.inputs[place] for place in stage.data]
    entries = [_entry(graph, tensor) for tensor in stage.received]
    entries += [graph.producer(tensor) for tensor in own]
    content = Graph(
        graph.model, [*entries, *stage.nodes], [*stage.received, *own], stage.output_tree
    )
    return content.build(f"{graph.model.name}_stage{stage.number}")


def carry_back(stage: Stage, stage_model: keras.Model) -> None:
    """Copies what a stage's model has learned to the layers of the whole model."""
    for layer in stage.layers:
        copy_state(stage_model.get_layer(layer.name), layer)


def differentiable(tensors: Sequence[Tensor]) -> list[int]:
    """Returns the places of the tensors that have a gradient, which are those of float types."""
    return [i for i, tensor in enumerate(tensors) if tensor.dtype in _DIFFERENTIABLE]


def _entry(graph: Graph, tensor: Tensor) -> Node:
    """An input of a stage in place of the call that gave the tensor.

    It has that call's name, by which losses and metrics of named outputs are found.
    """
    producer = graph.producer(tensor)
    name = producer.name
    if len(producer.outputs) > 1:
        place = next(i for i, output in enumerate(producer.outputs) if output is tensor)
        name = f"{name}_{place}"
    layer = keras.layers.InputLayer(batch_shape=tensor.shape, dtype=tensor.dtype, name=name)
    return Node(layer, (), {}, (tensor,))
