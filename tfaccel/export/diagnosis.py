"""What the converter's errors mean: which layer, and what to do."""

import re
from collections.abc import Mapping

import keras

LOOPS = "loops and branches cannot be calibrated"

_REMEDIES = {
    LOOPS: (
        "Static int8 needs a graph without loops. Give recurrent layers unroll=True, or use "
        "scheme='dynamic_int8'."
    ),
    "is neither a custom op nor a flex op": (
        "LiteRT has no such operator. Replace the layer by one that it has "
        "(tfaccel.rewriting, or another activation), or cut the model before it."
    ),
    "TensorList": (
        "A recurrent layer of this form does not unroll. Give it unroll=True, or a fixed "
        "sequence length in keras.Input."
    ),
    "Quantization not yet supported": (
        "LiteRT has no integer kernel for it. Leave the layer in float (exclude=), or use "
        "scheme='float16'."
    ),
    "doesn't have a known": "Give keras.Input a fixed shape.",
    "must be static": "Give keras.Input a fixed shape.",
}
_FALLBACK = "Export with verbose=True to see all that the converter says."


def explain(
    error: Exception, model: keras.Model, scheme: str, scopes: Mapping[str, str]
) -> Exception:
    """Returns one clear error for what the converter raised.

    Args:
        error: what was raised.
        model: what was being converted.
        scheme: to what.
        scopes: what each layer's scope in TensorFlow's graph stands for.

    Returns:
        A ValueError that names operator and layer as far as they can be told, and a remedy.
    """
    text = str(error)
    operators = sorted(set(re.findall(r"'?(tf\.[A-Z]\w+)'? op", text)))
    layers = _named_layers(text, scopes)
    remedy = next((r for sign, r in _REMEDIES.items() if sign in text), _FALLBACK)
    where = f" at layer {' or '.join(layers)}" if layers else ""
    what = f" ({', '.join(operators)})" if operators else f": {_first_line(text, error)}"
    return ValueError(f"{model.name!r} does not convert to {scheme} .tflite{where}{what}. {remedy}")


def _named_layers(text: str, scopes: Mapping[str, str]) -> list[str]:
    """Returns the layers whose scope an error's locations name."""
    found = [
        layer
        for scope, layer in scopes.items()
        if re.search(rf"/{re.escape(scope)}(_\d+)?/", text)
    ]
    return found[:3]


def _first_line(text: str, error: Exception) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]
