"""What the converter's errors mean: which layer, and what to do."""

import re
from collections.abc import Iterator, Mapping

import keras

from tfaccel.core import keras_private
from tfaccel.core.graph import Graph
from tfaccel.export.freezing import STATES, end_names

LOOPS = "loops and branches cannot be calibrated"

_STATEFUL = (
    "The layer changes its own state when it is called, which a file cannot. Let it do so in "
    "training only, use stateful=False, or take it out."
)

# The first sign that an error's text holds decides.
_REMEDIES = {
    LOOPS: (
        "Static int8 needs a graph without loops. Give recurrent layers unroll=True, or use "
        "scheme='dynamic_int8'."
    ),
    "Random": (
        "LiteRT draws no random numbers. Let the layer draw them in training only "
        "(`if training:` in its call), or take it out."
    ),
    STATES: _STATEFUL,
    "AssignVariableOp": _STATEFUL,  # to a variable that Keras does not know
    "TensorList": (
        "A recurrent layer converts for a fixed batch size only. Leave batch_size at 1, or give it "
        "unroll=True and keras.Input a fixed sequence length."
    ),
    "is neither a custom op nor a flex op": (
        "LiteRT has no such operator. Replace the layer by one that it has "
        "(tfaccel.rewriting, or another activation), or cut the model before it."
    ),
    "Quantization not yet supported": (
        "LiteRT has no integer kernel for it. Leave the layer in float (exclude=), or use "
        "scheme='float16'."
    ),
}
_FALLBACK = "Export with verbose=True to see all that the converter says."


def explain(
    error: Exception, model: keras.Model, scheme: str, scopes: Mapping[str, str]
) -> ValueError:
    """Returns one clear error for what the converter raised.

    Args:
        error: what was raised.
        model: what was being converted.
        scheme: to what.
        scopes: what each layer's scope in TensorFlow's graph stands for.

    Returns:
        An error that names operators and layers as far as they can be told, and a remedy.
    """
    text = str(error)
    operators = sorted(set(re.findall(r"'?(tfl?\.[A-Za-z]\w+)'? op", text)))
    what = f" ({', '.join(operators)})" if operators else f": {_first_line(text, error)}"
    remedy = next((r for sign, r in _REMEDIES.items() if sign in text), _FALLBACK)
    where = _where(text, model, scopes)
    return ValueError(f"{model.name!r} does not convert to {scheme} .tflite{where}{what}. {remedy}")


def explain_refusal(error: Exception, model: keras.Model, scheme: str) -> ValueError:
    """Returns one clear error for a file that was converted but does not run."""
    reason = re.sub(r"^LiteRT cannot run '.*?': |\. The file may be cut off.*$", "", str(error))
    names = zip(end_names(model)[0], model.inputs, strict=True)
    free = [name for name, tensor in names if None in tensor.shape[1:]]
    remedy = (
        f"Input {free[0]!r} has free sizes; give it fixed ones: x = keras.Input(shape=...); "
        "keras.Model(x, model(x))."
        if free
        else "Replace the layer that this comes from, or cut the model before it."
    )
    return ValueError(
        f"{model.name!r} converts to {scheme} .tflite, but LiteRT cannot run it: {reason}. {remedy}"
    )


def _where(text: str, model: keras.Model, scopes: Mapping[str, str]) -> str:
    """Says which layers an error's locations name, in words that go into a sentence."""
    layers = [
        layer for scope, layer in scopes.items() if re.search(rf"/{re.escape(scope)}(_\d+)?/", text)
    ]
    if layers:
        return f" at layer {' or '.join(layers[:3])}"
    # What is no layer leaves no trace in a location.
    operations = list(_operations(model)) if "op" in text else []
    return f" at one of the operations {', '.join(operations[:8])}" if operations else ""


def _operations(model: keras.Model) -> Iterator[str]:
    for node in Graph.read(model).nodes:
        if node.is_model and keras_private.has_graph(node.operation):
            yield from _operations(node.operation)
        elif node.layer is None:
            yield repr(node.name)


def _first_line(text: str, error: Exception) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = re.sub(r"^.*error: (loc\(.*\): )?", "", lines[0]) if lines else type(error).__name__
    return line.rstrip(".")[:300]
