"""What each technique says of each layer, in its own words."""

import dataclasses
from collections.abc import Callable, Mapping

import keras

from tfaccel.core.graph import Graph, Node, flat_layers
from tfaccel.core.stripping import bake_weights
from tfaccel.core.transforms import transformed_layers
from tfaccel.core.walking import read_graphs


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a technique would touch a layer.

    Attributes:
        touched: whether it would.
        reason: why, or why not.
    """

    touched: bool
    reason: str


Judge = Callable[[keras.Model], Mapping[str, Verdict]]


def judge_pruning(model: keras.Model) -> dict[str, Verdict]:
    """Returns what `pruning.prune` would do to each layer, by default."""
    from tfaccel.pruning import selection_for
    from tfaccel.pruning.masks import PruningMask

    verdicts = {c.layer.name: Verdict(c.chosen, c.reason) for c in selection_for(model)}
    for layer in transformed_layers(model):
        if any(isinstance(transform, PruningMask) for _, transform in layer.transforms):
            verdicts[layer.name] = Verdict(False, "pruned already")
    return verdicts


def judge_channels(model: keras.Model) -> dict[str, Verdict]:
    """Returns which layers could lose channels to `pruning.prune_channels`."""
    from tfaccel.pruning import read_channels

    if transformed_layers(model):
        masked = Verdict(False, "has masks or fake quantization: remove channels before")
        return {layer.name: masked for layer in transformed_layers(model)}
    found = read_channels(model)
    verdicts = {name: Verdict(False, reason) for name, reason in found.reasons.items()}
    for group in found.groups:
        for name in group.names:
            others = [other for other in group.names if other != name]
            shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if others[3:] else "")
            reason = f"{group.size} channels" + (f", together with {shown}" if others else "")
            verdicts[name] = Verdict(True, reason)
    return verdicts


def judge_quantization(model: keras.Model) -> dict[str, Verdict]:
    """Returns what `quantization.quantize_aware` would do to each layer, by default."""
    from tfaccel.quantization import is_quantization_aware, plan

    if is_quantization_aware(model):
        already = Verdict(False, "quantization-aware already")
        return {layer.name: already for layer in flat_layers(model)}
    verdicts: dict[str, Verdict] = {}
    for decision in plan(model):
        verdict = Verdict(decision.action != "float", decision.reason)
        # A layer that is called twice is touched if one of the calls is.
        if decision.name not in verdicts or verdict.touched:
            verdicts[decision.name] = verdict
    return verdicts


def judge_folding(model: keras.Model) -> dict[str, Verdict]:
    """Returns what `rewriting.fold_batch_norm` would do to each layer of the exported model.

    The rewrite is run and its result looked at; only why a batch normalization stays is worked out
    from the graph.
    """
    from tfaccel.quantization import is_quantization_aware
    from tfaccel.rewriting import fold_batch_norm

    try:
        plain = bake_weights(model)
    except ValueError:
        # A pruning schedule that never ran cannot be baked: what it wraps then stays as it is.
        plain = model
    backward = {layer.name for layer in flat_layers(fold_batch_norm(plain, before=False))}
    left = backward
    if not is_quantization_aware(model):  # of which export folds nothing forward
        left = {layer.name for layer in flat_layers(fold_batch_norm(plain))}
    verdicts: dict[str, Verdict] = {}
    for graph in read_graphs(plain):
        for node in graph.nodes:
            if node.is_input or node.is_model or node.layer is None:
                continue
            if not isinstance(node.layer, keras.layers.BatchNormalization):
                verdicts.setdefault(node.name, Verdict(False, "no batch normalization"))
                continue
            if node.name in left:
                source = graph.producer(node.inputs[0])
                verdicts[node.name] = Verdict(False, _why_not_folded(graph, node, source))
                continue
            step = _readers if node.name in backward else _sources
            partners = [partner.name for partner in _beyond_norms(graph, node, step)]
            verdicts[node.name] = Verdict(True, f"folded into {', '.join(map(repr, partners))}")
            for name in partners:
                verdicts[name] = Verdict(True, f"takes {node.name!r} over")
    return verdicts


def _sources(graph: Graph, node: Node) -> list[Node]:
    return [graph.producer(node.inputs[0])]


def _readers(graph: Graph, node: Node) -> list[Node]:
    return graph.consumers(node.outputs[0])


def _beyond_norms(
    graph: Graph, node: Node, step: Callable[[Graph, Node], list[Node]]
) -> list[Node]:
    """Returns the layers that take a batch normalization over, past others that they take too."""
    found = []
    for partner in step(graph, node):
        if isinstance(partner.layer, keras.layers.BatchNormalization):
            found += _beyond_norms(graph, partner, step)
        else:
            found.append(partner)
    return found


def _why_not_folded(graph: Graph, node: Node, source: Node) -> str:
    if source.is_input:
        return "reads the model's input, and no layer before it can take it over"
    if not (hasattr(source.operation, "kernel_size") or hasattr(source.operation, "units")):
        return f"follows {source.name!r}, which is no convolution or dense layer"
    if len(graph.consumers(node.inputs[0])) > 1 or graph.is_output(node.inputs[0]):
        return f"others read the output of {source.name!r} too"
    if len(graph.calls(source.operation)) > 1 or len(graph.calls(node.operation)) > 1:
        return "shared: called more than once"
    activation = getattr(source.layer, "activation", keras.activations.linear)
    if activation is not keras.activations.linear:
        return f"{source.name!r} has an activation of its own between them"
    return f"{source.name!r} ({type(source.layer).__name__}) cannot take it over"


TECHNIQUES: Mapping[str, Judge] = {
    "prune": judge_pruning,
    "prune_channels": judge_channels,
    "quantize_aware": judge_quantization,
    "fold_batch_norm": judge_folding,
}
