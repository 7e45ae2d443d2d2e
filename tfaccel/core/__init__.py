"""What everything stands on: weight transforms, model graphs, schedules, checks, artifacts."""

from tfaccel.core.artifacts import load_model
from tfaccel.core.graph import Graph, Node, Tensor, map_models
from tfaccel.core.matching import match, optional
from tfaccel.core.selection import Choice, Selector, select_layers
from tfaccel.core.stripping import bake_weights, strip
from tfaccel.core.transforms import (
    TransformedLayer,
    WeightTransform,
    transform_model,
    transformed_layers,
)

__all__ = [
    "Choice",
    "Graph",
    "Node",
    "Selector",
    "Tensor",
    "TransformedLayer",
    "WeightTransform",
    "bake_weights",
    "load_model",
    "map_models",
    "match",
    "optional",
    "select_layers",
    "strip",
    "transform_model",
    "transformed_layers",
]
