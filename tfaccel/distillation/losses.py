"""What a student learns from its teacher's outputs."""

import dataclasses
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.checks import check_positive
from tfaccel.core.configurable import Configurable
from tfaccel.core.graph import Graph, Node
from tfaccel.core.stripping import Strippable
from tfaccel.core.transforms import TransformedLayer

_PROBABILITIES = ("softmax", "sigmoid")
_PASSES_THROUGH = (keras.layers.Flatten, keras.layers.Identity, keras.layers.Reshape)


@dataclasses.dataclass(frozen=True)
class OutputLoss(Configurable, keras.distillation.DistillationLoss):
    """Base of losses that compare the outputs of two models, of equal shapes, output by output.

    A subclass is a frozen dataclass that defines `_terms`. What several outputs give is added.
    """

    def compute_loss(
        self,
        teacher_outputs: Any,
        student_outputs: Any,
        sample_weight: Any = None,
        labels: Any = None,
        **_: Any,
    ) -> Any:
        """Returns the loss.

        Args:
            teacher_outputs: [batch, ..., outputs], or a structure of such.
            student_outputs: likewise, of the same shapes.
            sample_weight: [batch, ...], one for all outputs or one for each.
            labels: y as `fit` got it, one for each output; few losses need them.

        Returns:
            [] float32.

        Raises:
            ValueError: weights or labels are neither one for all outputs nor one for each.
        """
        teachers = keras.tree.flatten(teacher_outputs)
        students = keras.tree.flatten(student_outputs)
        weights = _one_for_each("sample_weight", sample_weight, students)
        truths = _one_for_each("labels", labels, students)
        each = zip(teachers, students, weights, truths, strict=True)
        return sum((self._of_output(*output) for output in each), start=keras.ops.zeros(()))

    def _of_output(self, teacher: Any, student: Any, weight: Any, labels: Any) -> Any:
        teacher, student = (keras.ops.cast(side, "float32") for side in (teacher, student))
        return weighted_mean(self._terms(teacher, student, labels), weight)

    def _terms(self, teacher: Any, student: Any, labels: Any) -> Any:
        """Returns what each sample adds, [batch, ...], for outputs in float32."""
        raise NotImplementedError(f"{type(self).__name__} must define _terms().")


@keras.saving.register_keras_serializable("tfaccel")
@dataclasses.dataclass(frozen=True)
class LogitDistillation(OutputLoss):
    """How far the student's softened class probabilities are from the teacher's (Hinton 2015).

    loss = T² · mean over samples of KL(softmax(teacher / T) ‖ softmax(student / T))

    The factor T² keeps the gradient's size where it is when T changes. All is computed in float32,
    from logarithms of probabilities, so that nothing is clipped. The losses of several outputs are
    added.

    This is not what `keras.distillation.LogitsDistillation` computes by default: in Keras 3.15 its
    loss "kl_divergence" takes the logits themselves for probabilities, and has no T².

    Args:
        temperature: T; the higher, the more the teacher's unlikely classes count.

    Raises:
        ValueError: the temperature is not above 0.

    >>> loss = LogitDistillation(temperature=2.0)
    >>> same = keras.ops.array([[1.0, 2.0]])
    >>> float(loss.compute_loss(same, same))
    0.0
    """

    temperature: float = 3.0

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)

    def _terms(self, teacher: Any, student: Any, labels: Any) -> Any:  # noqa: ARG002
        ops = keras.ops
        teacher = ops.log_softmax(teacher / self.temperature, axis=-1)
        student = ops.log_softmax(student / self.temperature, axis=-1)
        divergence = ops.sum(ops.exp(teacher) * (teacher - student), axis=-1)
        return self.temperature**2 * divergence

    def validate_model_compatibility(self, teacher: keras.Model, student: keras.Model) -> None:
        """Checks that both models give logits, as far as their graphs tell.

        Raises:
            ValueError: a model ends in softmax or sigmoid, or has one output class.
        """
        check_logits(teacher, student, classes=2)


def weighted_mean(terms: Any, weight: Any) -> Any:
    """Returns the mean of weight · term.

    Args:
        terms: [batch, ...].
        weight: [batch, ...] of as many dimensions or fewer, or None for 1. More than these have to
            be of size 1.
    """
    ops = keras.ops
    if weight is not None:
        weight = ops.cast(weight, "float32")
        rank = len(terms.shape)
        shape = (*ops.shape(weight)[:rank], *([1] * (rank - len(weight.shape))))
        terms = terms * ops.reshape(weight, shape)
    return ops.mean(terms)


def _one_for_each(name: str, given: Any, outputs: list[Any]) -> list[Any]:
    flat = keras.tree.flatten(given)
    if len(flat) == 1:
        flat = flat * len(outputs)
    if len(flat) != len(outputs):
        raise ValueError(
            f"{name} must be one for all outputs or one for each, but there are {len(flat)} for "
            f"{len(outputs)} outputs."
        )
    return flat


def check_logits(teacher: keras.Model, student: keras.Model, classes: int = 1) -> None:
    """Checks that two models give logits, of enough classes, as far as their graphs tell.

    Raises:
        ValueError: a model ends in softmax or sigmoid, or has fewer output classes.
    """
    for role, model in (("teacher", teacher), ("student", student)):
        if keras_private.has_graph(model):
            _check_logits(role, model, classes)


def _check_logits(role: str, model: keras.Model, classes: int) -> None:
    graph = Graph.read(model)
    for position, output in enumerate(graph.outputs):
        if output.shape and output.shape[-1] is not None and output.shape[-1] < classes:
            raise ValueError(
                f"Logits of one class say nothing: the {role} {model.name!r} has an output of "
                f"shape {output.shape}. Logit distillation needs two classes or more "
                "(for one logit, a sigmoid's: MultiLabelDistillation)."
            )
        activation = _last_activation(graph, position)
        if activation in _PROBABILITIES:
            raise ValueError(
                f"Logit distillation needs logits, but the {role} {model.name!r} ends in "
                f"{activation}, which gives probabilities. Build its last layer with "
                "activation=None "
                f"(for a trained model: the same layers without the {activation}, weights copied), "
                "and compile with a loss that has from_logits=True."
            )


def _last_activation(graph: Graph, position: int) -> str | None:
    """Returns the name of the activation that an output of a model comes from."""
    tensor = graph.outputs[position]
    while True:
        node = graph.producer(tensor)
        if not _passes_through(node):
            break
        tensor = node.inputs[0]
    if isinstance(node.layer, keras.Model) and keras_private.has_graph(node.layer):
        inner = next(i for i, output in enumerate(node.outputs) if output is tensor)
        return _last_activation(Graph.read(node.layer), inner)
    return _activation(node)


def _passes_through(node: Node) -> bool:
    if isinstance(node.layer, Strippable) and len(node.inputs) == 1:  # fake quantization
        return True
    if isinstance(node.layer, keras.layers.Activation):  # linear, to cast to float32
        return _activation(node) == "linear"
    return isinstance(node.layer, _PASSES_THROUGH)


def _activation(node: Node) -> str | None:
    layer = node.layer
    if isinstance(layer, TransformedLayer):
        layer = layer.layer
    if layer is None or isinstance(layer, keras.layers.Softmax):
        return type(node.operation if layer is None else layer).__name__.lower()
    return getattr(getattr(layer, "activation", None), "__name__", None)
