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


def call_options(layer: keras.layers.Layer, training: bool | None, mask: Any) -> dict[str, Any]:
    """Returns the keyword arguments of a layer's call: the mask only where it is used."""
    takes_mask = layer.supports_masking and "mask" in inspect.signature(layer.call).parameters
    return {"training": training, **({"mask": mask} if mask is not None and takes_mask else {})}


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
        self._options = call_options(layer, training, mask)
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
        # What follows from the decisions alone must wait for `x`, too. Else it is computed early
        # for all layers, or a compiler finds that the first run had it, and keeps it from there. A
        # condition that is never met says so in a way that XLA, too, heeds.
        never = ops.isnan(ops.reshape(x, (-1,))[0])
        waiting = [ops.where(never, ops.zeros_like(d), d) for d in self._decisions]
        with repeating(waiting):
            return self._run(x, weights)[0]

    def gradients(
        self, x: Any, weights: Sequence[Any], upstream: Any
    ) -> tuple[Any, Any, list[Any]]:
        """Runs the layer as the first time, and backwards.

        Args:
            x: its input.
            weights: values of the trainable variables.
            upstream: gradient with respect to its output.

        Returns:
            The output, the gradient with respect to `x`, those with respect to `weights`.
        """
        y, (gradient, *others) = pull_back(
            lambda x, *weights: self.again(x, weights), [x, *weights], upstream
        )
        return y, gradient, others

    def _run(self, x: Any, weights: Sequence[Any]) -> tuple[Any, keras.StatelessScope]:
        mapping = [
            *zip(self.trainable, weights, strict=True),
            *zip(self.states, self._start, strict=True),
        ]
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            y = ops.cast(self.layer(x, **self._options), x.dtype)
        return y, scope


def pull_back(
    function: Callable[..., Any], inputs: Sequence[Any], upstream: Any
) -> tuple[Any, list[Any]]:
    """Runs a function forwards and backwards, on TensorFlow or JAX.

    Args:
        function: of as many tensors as there are `inputs`, to one tensor.
        inputs: tensors.
        upstream: gradient with respect to what the function returns.

    Returns:
        What the function returns, and the gradient with respect to each input.
    """
    if keras.backend.backend() == "jax":
        import jax

        y, pull = jax.vjp(function, *inputs)
        return y, list(pull(upstream))
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(inputs)
        y = function(*inputs)
    gradients = tape.gradient(
        y, inputs, upstream, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    # Those of embeddings come as the rows that were used.
    return y, [tf.convert_to_tensor(gradient) for gradient in gradients]


def in_turn(values: Sequence[Any], after: Sequence[Any], *, compiled: bool = False) -> list[Any]:
    """Returns `values`, which are then not used before `after` is computed.

    What does not depend on each other would run as early as it can, and hold its memory from then
    on.

    Args:
        values: float tensors.
        after: tensors, the first of them float.
        compiled: whether XLA, too, has to keep the order. It knows none but that of the data, so
            that a little arithmetic is added. Worth it for chunks, which are alike and depend on
            nothing; blocks in their natural order take less memory without (measured).
    """
    if compiled:
        one = ops.reshape(ops.stop_gradient(after[0]), (-1,))[0]
        # Zero, but no compiler can know it; and a NaN goes on being one.
        nothing = ops.where(ops.isnan(one), one, ops.zeros_like(one))
        values = [value + ops.cast(nothing, value.dtype) for value in values]
    if keras.backend.backend() != "tensorflow":
        return list(values)
    import tensorflow as tf

    with tf.control_dependencies(list(after)):
        return [tf.identity(value) for value in values]
