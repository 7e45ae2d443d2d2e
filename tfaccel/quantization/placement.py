"""Where a model is quantized: so that what is trained is what the runtime computes.

TFLite computes convolution, batch norm and ReLU in one integer operator, so a value is rounded
once, behind the last of them. A sum is rounded behind its ReLU. Pooling, reshaping and the like
hand the integers on as they are. The inputs of a concatenation take its range, so they get none of
their own. What is not covered is fenced off, so that the converter leaves it in float.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import keras
from keras import layers

from tfaccel.core.graph import Graph, Node, Tensor
from tfaccel.core.names import FreeNames
from tfaccel.core.transforms import TransformedLayer, wrap_layer
from tfaccel.quantization.equivalents import Rewriter
from tfaccel.quantization.fake_quantization import Dequantize, FakeQuantize, Floor
from tfaccel.quantization.operators import (
    FIXED_RANGES,
    KERNEL_AXES,
    TRANSPOSED,
    activation_name,
    activation_of,
    converts_in_sixteen_bits,
    folds_into,
    gives_no_negatives,
    inner_layer,
    is_batch_norm,
    is_concatenation,
    is_inverse_root,
    is_relu,
    is_sum,
    kind_of,
    passes,
)
from tfaccel.quantization.ranges import Ranges
from tfaccel.quantization.rounded_weights import check_blocks
from tfaccel.quantization.schemes import Scheme
from tfaccel.rewriting.freezable_norm import FreezableBatchNormalization

QUANTIZED, FOLLOWS, FLOAT = "quantized", "follows", "float"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of one call of a layer.

    Attributes:
        name: of the layer or operation.
        action: "quantized" (rounds its output, and its kernel if it has one), "follows" (is a part
            of another's operator, or hands integers on), or "float" (is computed in float).
        reason: why.
    """

    name: str
    action: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What is wanted of a model, for all of its graphs.

    Attributes:
        scheme: bits of weights and activations.
        ranges: makes what rounds.
        skipped: for each layer that the user leaves in float, by identity, the reason.
        schemes: for layers that have a scheme of their own, by name.
        ends: names of the layers with kernels that no other is in front of, or behind.
        masked: whether layers hand masks on.
    """

    scheme: Scheme
    ranges: Ranges
    skipped: Mapping[int, str] = dataclasses.field(default_factory=dict)
    schemes: Mapping[str, Scheme] = dataclasses.field(default_factory=dict)
    ends: Collection[str] = ()
    masked: bool = False


class Placer:
    """Puts fake quantization into one graph.

    Args:
        graph: edited by `place`.
        wishes: what is wanted.
        outermost: whether the graph's inputs come from outside, not from a surrounding model.
    """

    def __init__(self, graph: Graph, wishes: Wishes, *, outermost: bool) -> None:
        self._graph = graph
        self._wishes = wishes
        self._skipped = wishes.skipped
        self._outermost = outermost
        self._integer: set[int] = set()  # tensors that are on a grid
        self._absorbed: dict[int, str] = {}  # nodes that are parts of another's operator
        self._float: list[Node] = []  # nodes that are computed in float
        self._free_name = FreeNames(node.name for node in graph.nodes)
        self._rewriter = Rewriter(
            graph,
            set(wishes.skipped),
            self._free_name,
            masked=wishes.masked,
            wide=wishes.scheme.activation_bits == 16,
        )
        self.decisions: list[Decision] = []

    def place(self) -> list[Decision]:
        """Edits the graph; returns what was decided for each call."""
        if not self._wishes.scheme.integer_activations:
            return self._place_weights_only()
        self._rewriter.rewrite()
        kernels: dict[int, keras.layers.Layer] = {}
        for node in list(self._graph.nodes):
            action, reason = self._place_node(node)
            if action == FLOAT:
                self._float.append(node)
            if not node.is_input and not node.is_model:
                self.decisions.append(Decision(node.name, action, reason))
            if action == QUANTIZED and type(inner_layer(node)) in KERNEL_AXES:
                kernels[id(node.layer)] = node.layer
        for node in self._float:
            self._fence(node)
        for layer in kernels.values():
            if id(layer) not in self._rewriter.exact:
                self._quantize_kernel(layer)
        return self.decisions

    def _place_weights_only(self) -> list[Decision]:
        """Rounds kernels, and nothing between layers."""
        kernels: dict[int, keras.layers.Layer] = {}
        for node in self._graph.nodes:
            if node.is_input or node.is_model:
                continue
            reason = self._why_kernel_stays(node)
            action = FLOAT if reason else QUANTIZED
            self.decisions.append(Decision(node.name, action, reason or "kernel"))
            if not reason and node.layer is not None:
                kernels[id(node.layer)] = node.layer
        for layer in kernels.values():
            self._quantize_kernel(layer)
        return self.decisions

    def _why_kernel_stays(self, node: Node) -> str:
        layer: Any = inner_layer(node)
        if id(layer) in self._skipped:
            return self._skipped[id(layer)]
        if type(layer) not in KERNEL_AXES:
            return "the scheme rounds kernels of convolutions and dense layers only"
        if _is_changed_by_keras(layer):
            return _CHANGED
        block = self._scheme_of(node.name).weight_block
        if block is None:
            return ""
        if not isinstance(layer, layers.Dense):
            return f"{type(layer).__name__}, but blocks of weights are for Dense"
        try:
            check_blocks(layer.kernel.shape, block)
        except ValueError:
            return f"its {layer.kernel.shape[0]} inputs are no multiple of blocks of {block}"
        return ""

    def _place_node(self, node: Node) -> tuple[str, str]:
        if id(node) in self._absorbed:
            return FOLLOWS, self._absorbed[id(node)]
        if node.is_input:
            if not self._outermost:
                self._mark(*node.outputs)
            return FOLLOWS, "input"
        if node.is_model:
            for tensor in node.inputs:
                self._need(tensor)
            given = zip(node.outputs, _gives_integers(node.operation), strict=True)
            self._mark(*(tensor for tensor, on_grid in given if on_grid))
            return FOLLOWS, "a model of its own"
        refusal = self._refusal(node)
        if refusal:
            return FLOAT, refusal
        if passes(node):
            if any(map(self._is_integer, node.inputs)):
                for tensor in node.inputs:
                    self._need(tensor)
                self._mark(*node.outputs)
            return FOLLOWS, "hands on what it gets"
        return self._quantize_output(node)

    def _refusal(self, node: Node) -> str:
        """Says why a call stays in float; empty if it does not."""
        layer = inner_layer(node)
        if id(layer) in self._skipped:
            return self._skipped[id(layer)]
        before = self._graph.producer(node.inputs[0]) if node.inputs else None
        if before in self._float and (is_relu(node) or self._folds(node, before)):
            return f"computed in one with {before.name!r}, which stays in float"
        if _is_changed_by_keras(layer):
            return _CHANGED
        if id(layer) in self._rewriter.refusals:
            return f"{self._rewriter.refusals[id(layer)]} is not covered"
        if passes(node) or is_concatenation(node) or kind_of(node):
            wide = self._wishes.scheme.activation_bits == 16
            if wide and not converts_in_sixteen_bits(node):
                return f"{_name_of(node)} in 16 bits is not covered"
            return ""
        return _why_uncovered(node)

    def _folds(self, node: Node, before: Node) -> bool:
        return is_batch_norm(node) and folds_into(self._graph, node, before)

    def _quantize_output(self, node: Node) -> tuple[str, str]:
        if not is_concatenation(node):  # the inputs of a concatenation take its range
            for tensor in node.inputs:
                self._need(tensor)
        if is_inverse_root(node):
            bits = 16 if self._wishes.scheme.activation_bits == 16 else 8
            floor = Floor(bits, name=self._free_name(f"{node.name}_floor"))
            self._mark(self._graph.insert_before(node, node.inputs[0], floor))
        last = self._operator_end(node)
        output = last.outputs[0]
        if self._takes_range_of_reader(node, output):
            return QUANTIZED, "takes the range of the concatenation that reads it"
        self._quantize(output, FIXED_RANGES.get(activation_of(node)), scheme_of=node)
        return QUANTIZED, kind_of(node) or "concatenation"

    def _takes_range_of_reader(self, node: Node, output: Tensor) -> bool:
        """Whether the converter makes an operator write to the range of the next, a concatenation.

        It does so for a value that is read once, and drops the value's own range if it has one. An
        operator that cannot choose its range is followed by another that converts.
        """
        if is_concatenation(node) or activation_of(node) in FIXED_RANGES:
            return False
        readers = self._graph.consumers(output)
        if len(readers) != 1 or self._graph.is_output(output):
            return False
        return is_concatenation(readers[0]) and not self._refusal(readers[0])

    def _operator_end(self, node: Node) -> Node:
        """Returns the last call that the runtime computes in one operator with `node`."""
        last = node
        if kind_of(node) == "kernel":
            last = self._absorb(node, last, is_batch_norm, "folded into")
        layer = inner_layer(node)
        plain = activation_name(layer) in ("", "linear") and not isinstance(layer, TRANSPOSED)
        if kind_of(node) in ("kernel", "sum") and plain:
            last = self._absorb(node, last, is_relu, "computed in one with")
        return last

    def _absorb(self, node: Node, last: Node, fits: Callable[[Node], bool], how: str) -> Node:
        graph = self._graph
        readers = graph.consumers(last.outputs[0])
        if len(readers) != 1 or graph.is_output(last.outputs[0]) or not fits(readers[0]):
            return last
        if id(inner_layer(readers[0])) in self._skipped:
            return last
        if is_batch_norm(readers[0]) and not folds_into(graph, readers[0], node):
            return last
        self._absorbed[id(readers[0])] = f"{how} {node.name}"
        norm = readers[0].layer
        if type(norm) is layers.BatchNormalization and not getattr(norm, "renorm", False):
            self._graph.replace_layer(norm, FreezableBatchNormalization.like(norm))
        return readers[0]

    def _is_integer(self, tensor: Tensor) -> bool:
        if id(tensor) in self._integer:
            return True
        producer = self._graph.producer(tensor)
        return self._hands_on(producer) and any(map(self._is_integer, producer.inputs))

    def _hands_on(self, node: Node) -> bool:
        return (
            not (node.is_input or node.is_model)
            and passes(node)
            and id(inner_layer(node)) not in self._skipped
        )

    def _need(self, tensor: Tensor) -> None:
        """Makes sure that a value is on a grid before an integer operator reads it."""
        if id(tensor) in self._integer or not _is_float(tensor):
            return
        producer = self._graph.producer(tensor)
        if self._hands_on(producer):
            for before in producer.inputs:
                self._need(before)
            self._mark(*producer.outputs)
        else:
            self._quantize(tensor)

    def _quantize(
        self,
        tensor: Tensor,
        fixed_range: tuple[float, float] | None = None,
        *,
        scheme_of: Node | None = None,
    ) -> None:
        """Puts a value on a grid, by the scheme of the call that begins its operator."""
        producer = self._graph.producer(tensor)
        scheme = self._scheme_of((scheme_of or producer).name)
        no_negatives = gives_no_negatives(producer)
        bits = scheme.activation_bits
        layer = self._wishes.ranges.round_values(
            # A narrow grid is clipped by a ReLU at one end and by int8 at the other.
            bits if no_negatives or bits > 8 else 8,
            fixed_range=fixed_range,
            symmetric=scheme.symmetric_activations,
            nonnegative=no_negatives,
            name=self._free_name(f"{producer.name}_quantize"),
        )
        self._mark(tensor, self._graph.insert_after(tensor, layer))

    def _scheme_of(self, name: str) -> Scheme:
        """Returns the scheme of a layer, or of that which it is a part of."""
        return self._wishes.schemes.get(self._origin(name), self._wishes.scheme)

    def _origin(self, name: str) -> str:
        return self._rewriter.origins.get(name, name)

    def _fence(self, node: Node) -> None:
        """Ends the integers before a call that is computed in float."""
        for tensor in dict.fromkeys(node.inputs):
            if _is_float(tensor) and self._is_integer(tensor):
                layer = Dequantize(name=self._free_name(f"{node.name}_dequantize"))
                self._graph.insert_before(node, tensor, layer)

    def _mark(self, *tensors: Tensor) -> None:
        self._integer.update(map(id, tensors))

    def _quantize_kernel(self, layer: keras.layers.Layer) -> None:
        inner = layer.layer if isinstance(layer, TransformedLayer) else layer
        scheme = self._scheme_of(layer.name)
        transform = self._wishes.ranges.round_weights(
            KERNEL_AXES[type(inner)],
            scheme.bits_of_weights(at_end=self._origin(layer.name) in self._wishes.ends),
            symmetric=scheme.symmetric_weights,
            block=scheme.weight_block if isinstance(inner, layers.Dense) else None,
        )
        self._graph.replace_layer(layer, wrap_layer(layer, {"kernel": transform}))


_CHANGED = "has weights that Keras has quantized or adapted (LoRA)"


def _is_changed_by_keras(layer: Any) -> bool:
    return bool(getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False))


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype.startswith(("float", "bfloat"))


def _gives_integers(model: keras.Model) -> list[bool]:
    """Says for each output of a nested model, placed already, whether it is on a grid."""
    graph = Graph.read(model)

    def on_grid(tensor: Tensor) -> bool:
        node = graph.producer(tensor)
        if node.is_model:
            places = [output is tensor for output in node.outputs]
            return _gives_integers(node.operation)[places.index(True)]
        if node.is_input or isinstance(node.layer, FakeQuantize):
            return True
        return passes(node) and any(map(on_grid, node.inputs))

    return [on_grid(tensor) for tensor in graph.outputs]


def _name_of(node: Node) -> str:
    layer = inner_layer(node)
    return type(node.operation if layer is None else layer).__name__


def _why_uncovered(node: Node) -> str:
    layer = inner_layer(node)
    name = _name_of(node)
    if isinstance(layer, layers.BatchNormalization):
        return "batch normalization that cannot be folded or made a convolution"
    if is_sum(node):
        return f"{name} of an array of constants or of more than two values is not covered yet"
    if isinstance(layer, layers.Activation):
        return f"activation {getattr(layer.activation, '__name__', name)} is not covered yet"
    if isinstance(node.layer, TransformedLayer) and name.startswith("Separable"):
        return f"{name} that is pruned already; prune after quantize_aware()"
    covered = (layers.ReLU, layers.Softmax, layers.UpSampling2D)
    with_arguments = " with these arguments" if isinstance(layer, covered) else ""
    return f"{name}{with_arguments} is not covered yet"
