"""What losses look at inside two networks."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.distillation.batches import StoredTeacher
from tfaccel.distillation.feature_losses import check_layer_name

FINAL = "final_output"


def layer_names(losses: Sequence[Any], role: str) -> list[str]:
    """Returns the layers of the teacher or the student that losses look at, each once."""
    names = (getattr(loss, f"{role}_layer_name", None) for loss in losses)
    return list(dict.fromkeys(name for name in names if name))


def extract(model: keras.Model, losses: Sequence[Any], role: str) -> keras.Model | None:
    """Returns a model that gives what losses look at, by layer name, and the model's own output.

    Args:
        model: the teacher or the student.
        losses: distillation losses.
        role: "teacher" or "student".

    Returns:
        The model, or None if no loss looks inside.

    Raises:
        ValueError: a layer is not there.
    """
    names = layer_names(losses, role)
    if not names:
        return None
    for name in names:
        check_layer_name(role, model, name)
    # A nested model's own `output` belongs to its own graph, so that the calls are asked.
    called = {node.operation.name: node.outputs for node in keras_private.call_nodes(model)}
    outputs: dict[str, Any] = {
        name: called[name][0] if len(called[name]) == 1 else list(called[name]) for name in names
    }
    functional = keras_private.functional_of(model)
    outputs[FINAL] = functional.output
    return keras.Model(functional.input, outputs, name=f"{model.name}_features")


def pick(features: Mapping[str, Any], loss: Any, role: str) -> Any:
    """Returns what a loss looks at."""
    return features[getattr(loss, f"{role}_layer_name", None) or FINAL]


def shapes_of(model: keras.Model | StoredTeacher, extractor: keras.Model | None) -> dict[str, Any]:
    """Returns the shapes of a model's features by layer name, and of its output."""
    if not isinstance(model, keras.Model):
        return dict(model.output_shapes)
    if extractor is not None:
        outputs = extractor.output
    elif keras_private.has_graph(model):
        outputs = {FINAL: keras_private.functional_of(model).output}
    else:
        return {FINAL: getattr(model, "output_shape", None)}
    return {
        name: keras.tree.map_structure(lambda tensor: tuple(tensor.shape), output)
        for name, output in outputs.items()
    }
