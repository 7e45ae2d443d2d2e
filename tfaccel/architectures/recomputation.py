"""Running a layer a second time, for its gradients, exactly as it ran the first time."""

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

# What is being remembered (a list that grows) or repeated (an iterator), if anything is.
_remembered: contextvars.ContextVar[list[Any] | None]
_remembered = contextvars.ContextVar("remembered", default=None)
_repeated: contextvars.ContextVar[Iterator[Any] | None]
_repeated = contextvars.ContextVar("repeated", default=None)


def decide(make: Callable[[], Any]) -> Any:
    """Returns what `make` computes, or in a recomputation what it computed the first time.

    For decisions that a rounding error could tip over, such as the bucket that a vector falls into:
    made anew from inputs that are off in the last digit, a few would come out differently, and the
    gradients with them.

    Args:
        make: computes a small tensor that no gradient flows through.
    """
    repeated = _repeated.get()
    if repeated is not None:
        return next(repeated)
    decision = make()
    remembered = _remembered.get()
    if remembered is not None:
        remembered.append(decision)
    return decision


@contextlib.contextmanager
def remembering() -> Iterator[list[Any]]:
    """A scope whose decisions are gathered in the list that it gives."""
    decisions: list[Any] = []
    token = _remembered.set(decisions)
    other = _repeated.set(None)
    try:
        yield decisions
    finally:
        _repeated.reset(other)
        _remembered.reset(token)


@contextlib.contextmanager
def repeating(decisions: list[Any]) -> Iterator[None]:
    """A scope in which the decisions are those that were remembered, in the same order."""
    token = _repeated.set(iter(decisions))
    other = _remembered.set(None)
    try:
        yield
    finally:
        _remembered.reset(other)
        _repeated.reset(token)


class Repeatable:
    """One call of a layer, as a function of tensors that can be repeated for its gradients.

    The layer runs on the values of its variables that it is given. What it changes (seeds, running
    statistics) comes out as values and changes no variable, and a repetition starts from the
    states of the first time: dropout drops the same.

    Args:
        layer: a built layer.
        training: whether it runs in training.
        mask: Keras mask of its input, or None.

    Attributes:
        trainable: the variables that gradients flow to.
        states: the others, in which states may be.
    """

    def __init__(self, layer: keras.layers.Layer, training: bool, mask: Any) -> None:
        self.layer = layer
        self.trainable = layer.trainable_variables
        known = {id(variable) for variable in self.trainable}
        self.states = [variable for variable in layer.variables if id(variable) not in known]
        self.options: dict[str, Any] = {"training": training}
        if mask is not None and "mask" in inspect.signature(layer.call).parameters:
            self.options["mask"] = mask
        self._start: list[Any] = []
        self._decisions: list[Any] = []

    def first(self, x: Any, weights: Sequence[Any], states: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Runs the layer.

        Args:
            x: its input.
            weights: values of the trainable variables.
            states: values of the others.

        Returns:
            The output, and the states after the call.

        Raises:
            ValueError: the layer adds a loss of its own, which would get no gradient.
        """
        self._start = list(states)
        with remembering() as decisions:
            y, scope = self._run(x, weights)
        if scope.losses:
            raise ValueError(
                f"{self.layer.name!r} adds a loss (add_loss or an activity regularizer) where its "
                "activations are not kept. Take it out, or use recompute=False."
            )
        self._decisions = decisions
        return y, [scope.get_current_value(variable) for variable in self.states]

    def again(self, x: Any, weights: Sequence[Any]) -> Any:
        """Runs the layer as the first time and returns its output."""
        with repeating(self._decisions):
            return self._run(x, weights)[0]

    def gradients(self, x: Any, weights: Sequence[Any], upstream: Any) -> tuple[Any, Any, list[Any]]:
        """Runs the layer as the first time, and backwards.

        Args:
            x: its input.
            weights: values of the trainable variables.
            upstream: gradient with respect to its output.

        Returns:
            The output, the gradient with respect to `x`, those with respect to `weights`.
        """
        if keras.backend.backend() == "jax":
            import jax

            y, pull_back = jax.vjp(lambda x, *weights: self.again(x, weights), x, *weights)
            gradient, *others = pull_back(upstream)
            return y, gradient, others
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([x, *weights])
            y = self.again(x, weights)
        gradient, *others = tape.gradient(
            y, [x, *weights], upstream, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return y, gradient, [tf.convert_to_tensor(other) for other in others]

    def _run(self, x: Any, weights: Sequence[Any]) -> tuple[Any, keras.StatelessScope]:
        mapping = [
            *zip(self.trainable, weights, strict=True),
            *zip(self.states, self._start, strict=True),
        ]
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            y = ops.cast(self.layer(x, **self.options), x.dtype)
        return y, scope


def in_turn(values: Sequence[Any], after: Sequence[Any]) -> list[Any]:
    """Returns `values`, which TensorFlow then does not use before it has computed `after`.

    What does not depend on each other would run as early as it can, and hold its memory from then
    on. JAX and XLA find an order by themselves.
    """
    if keras.backend.backend() != "tensorflow":
        return list(values)
    import tensorflow as tf

    with tf.control_dependencies(list(after)):
        return [tf.identity(value) for value in values]
