"""Multiply-accumulates of the operators of a .tflite file."""

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tfaccel.measurement.flatbuffer import Operator, TFLiteFile

Shape = tuple[int, ...]


def macs_of_subgraph(file: "TFLiteFile", subgraph: int) -> int | None:
    """Returns the MACs of one run of a subgraph, None if a loop's length is unknown."""
    total = 0
    for operator in file.operators(subgraph):
        macs = _macs(file, operator, subgraph)
        if macs is None:
            return None
        total += macs
    return total


def _macs(file: "TFLiteFile", operator: "Operator", subgraph: int) -> int | None:
    if operator.name == "WHILE":
        return _loop(file, operator, subgraph)
    if operator.name == "IF":
        options = operator.options
        branches = [
            macs_of_subgraph(file, branch)
            for branch in (options.thenSubgraphIndex, options.elseSubgraphIndex)
        ]
        known = [macs for macs in branches if macs is not None]
        return max(known) if len(known) == len(branches) else None
    rule = _RULES.get(operator.name)
    if rule is None:
        return 0
    inputs = [file.shape(t, subgraph) if t >= 0 else () for t in operator.inputs]
    outputs = [file.shape(t, subgraph) for t in operator.outputs]
    return rule(operator, inputs, outputs)


def _loop(file: "TFLiteFile", operator: "Operator", subgraph: int) -> int | None:
    body = macs_of_subgraph(file, operator.options.bodySubgraphIndex)
    if body is None or body == 0:
        return body
    steps = _steps(file, operator, subgraph)
    return None if steps is None else body * steps


def _steps(file: "TFLiteFile", operator: "Operator", subgraph: int) -> int | None:
    """Returns how often a loop runs that counts between constants, as those of Keras's RNNs do."""
    condition = operator.options.condSubgraphIndex
    entries = file.inputs(condition)
    steps = []
    for test in file.operators(condition):
        if test.name != "LESS":
            continue
        counter, limit = test.inputs
        end = file.integer(limit, condition)
        if end is None or counter not in entries:
            continue
        begin = file.integer(operator.inputs[entries.index(counter)], subgraph)
        if begin is not None:
            steps.append(end - begin)
    return min(steps) if steps else None


def _conv(_: "Operator", inputs: list[Shape], outputs: list[Shape]) -> int:
    return prod(outputs[0]) * prod(inputs[1][1:])  # filter: out, height, width, in / groups


def _depthwise(_: "Operator", inputs: list[Shape], outputs: list[Shape]) -> int:
    return prod(outputs[0]) * prod(inputs[1][1:3])  # filter: 1, height, width, out


def _conv_3d(_: "Operator", inputs: list[Shape], outputs: list[Shape]) -> int:
    return prod(outputs[0]) * prod(inputs[1][:-1])  # filter: depth, height, width, in, out


def _transposed(_: "Operator", inputs: list[Shape], outputs: list[Shape]) -> int:  # noqa: ARG001
    return prod(inputs[2][:-1]) * prod(inputs[1])  # output shape, filter, input


def _dense(_: "Operator", inputs: list[Shape], outputs: list[Shape]) -> int:
    return prod(outputs[0]) * inputs[1][-1]  # filter: out, in


def _matmul(operator: "Operator", inputs: list[Shape], outputs: list[Shape]) -> int:
    left = inputs[0]
    return prod(outputs[0]) * (left[-2] if operator.options.adjX else left[-1])


def _lstm(_: "Operator", inputs: list[Shape], outputs: list[Shape]) -> int:
    return _recurrent(inputs[1:9], outputs)


def _rnn(_: "Operator", inputs: list[Shape], outputs: list[Shape]) -> int:
    return _recurrent(inputs[1:3], outputs)


def _recurrent(weights: list[Shape], outputs: list[Shape]) -> int:
    steps = prod(outputs[0][:-1])  # batch included
    return steps * sum(prod(shape) for shape in weights if len(shape) == 2)


_RULES: dict[str, Callable[["Operator", list[Shape], list[Shape]], int]] = {
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _depthwise,
    "CONV_3D": _conv_3d,
    "TRANSPOSE_CONV": _transposed,
    "CONV_3D_TRANSPOSE": _transposed,
    "FULLY_CONNECTED": _dense,
    "BATCH_MATMUL": _matmul,
    "UNIDIRECTIONAL_SEQUENCE_LSTM": _lstm,
    "UNIDIRECTIONAL_SEQUENCE_RNN": _rnn,
}
