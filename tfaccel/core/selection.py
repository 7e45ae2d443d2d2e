"""Which layers a technique touches, and why."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras

from tfaccel.core.graph import flat_layers
from tfaccel.core.transforms import TransformedLayer

Selector = str | Sequence[str] | Callable[[keras.layers.Layer], bool]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Whether a layer is touched.

    Attributes:
        layer: the layer, the inner one if it is transformed already.
        chosen: whether the technique touches it.
        reason: why, or why not, in a few words.
    """

    layer: keras.layers.Layer
    chosen: bool
    reason: str


def select_layers(
    model: keras.Model, include: Selector | None = None, exclude: Selector | None = None
) -> list[Choice]:
    """Decides for each layer of a model, nested models flattened, what the user's selectors say.

    Args:
        model: a built Functional or Sequential model.
        include: layer name or pattern ("block_*"), several of them, or a predicate on the layer; by
            default all layers.
        exclude: likewise; wins over `include`.

    Raises:
        TypeError: a selector is none of these.
        ValueError: a name or pattern matches no layer.
    """
    layers = [
        layer.layer if isinstance(layer, TransformedLayer) else layer
        for layer in flat_layers(model)
    ]
    included = _matcher(include, "include", layers)
    excluded = _matcher(exclude, "exclude", layers)
    choices = []
    for layer in layers:
        if exclude is not None and excluded(layer):
            choices.append(Choice(layer, False, "excluded"))
        elif include is not None:
            chosen = bool(included(layer))
            choices.append(Choice(layer, chosen, "included" if chosen else "not included"))
        else:
            choices.append(Choice(layer, True, "default"))
    return choices


def _matcher(
    selector: Selector | None, argument: str, layers: Sequence[keras.layers.Layer]
) -> Callable[[keras.layers.Layer], bool]:
    if selector is None:
        return lambda layer: True  # noqa: ARG005
    # A layer can be called as well, but is no predicate.
    if callable(selector) and not isinstance(selector, (type, keras.layers.Layer)):
        return selector
    given: Any = selector
    lone = isinstance(given, str) or not isinstance(given, Iterable)
    patterns: list[Any] = [given] if lone else list(given)
    names = [layer.name for layer in layers]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{argument} takes layer names, patterns such as 'block_*', or a predicate such as "
                f"lambda layer: isinstance(layer, keras.layers.Dense), but got {pattern!r}."
                + (f" Give its name: {pattern.name!r}." if hasattr(pattern, "name") else "")
            )
        if pattern not in names and not fnmatch.filter(names, pattern):
            close = difflib.get_close_matches(pattern, names, n=3)
            meant = " or ".join(map(repr, close))
            hint = f"Did you mean {meant}?" if close else "See model.summary()."
            raise ValueError(f"{argument}={pattern!r} matches no layer of the model. {hint}")

    def matches(layer: keras.layers.Layer) -> bool:
        # A name is a name first: it may hold brackets, which mean something else in a pattern.
        return any(
            layer.name == pattern if pattern in names else fnmatch.fnmatchcase(layer.name, pattern)
            for pattern in patterns
        )

    return matches
