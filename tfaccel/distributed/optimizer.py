"""Any Keras optimizer, with its gradients averaged over all workers before they are applied."""

import itertools
from collections.abc import Sequence
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.checks import check_type
from tfaccel.distributed import runtime
from tfaccel.distributed.drift import WeightsCheck
from tfaccel.distributed.gradient_exchange import GradientCompressor, GradientExchange
from tfaccel.distributed.reduction import reduce_tensors
from tfaccel.distributed.runtime import Average, Min, ReduceOp, Sum, check_op

_HOOK = "_tfaccel_reducer"
_numbers = itertools.count()


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: keras.optimizers.Optimizer,
    compression: GradientCompressor | None = None,
    op: ReduceOp = Average,
    backward_passes_per_step: int = 1,
) -> keras.optimizers.Optimizer:
    """Makes an optimizer average its gradients over all workers, in `fit` and in custom loops.

    It is the same object that comes back, of the same class and with the same state: what is saved
    with a model is a plain Keras optimizer. The gradients are reduced once per update, after
    Keras's own gradient accumulation and loss scaling and before clipping and weight decay, so
    that N workers with batches of B do what one would do with batches of N·B. 16-bit gradients
    travel as float32. With one worker nothing is changed.

    After the first updates the weights of all ranks are compared, and a difference is an error.
    Start with equal weights: `callbacks.BroadcastGlobalVariablesCallback`, or
    `broadcast_variables`.

    XLA cannot compile the exchange. With `jit_compile="auto"` the broadcast callback turns XLA off;
    `jit_compile=True` on a CPU is an error at the first step.

    Args:
        optimizer: any Keras optimizer, a `LossScaleOptimizer` too.
        compression: None to send gradients as they are, or a `GradientCompressor`, one object for
            one optimizer.
        op: Average, or Sum (then the learning rate has to be N times smaller).
        backward_passes_per_step: batches whose gradients are averaged on each worker before the
            workers exchange them, as Keras's `gradient_accumulation_steps`.

    Returns:
        `optimizer`.

    Raises:
        TypeError: `optimizer` is no Keras optimizer.
        ValueError: an argument is out of range, the optimizer is distributed already, or it was
            built without the accumulators that `backward_passes_per_step` needs.
        RuntimeError: several workers with a Keras backend other than TensorFlow.

    >>> optimizer = DistributedOptimizer(keras.optimizers.SGD(0.1), backward_passes_per_step=2)
    >>> optimizer.gradient_accumulation_steps
    2
    """
    check_type("optimizer", optimizer, keras.optimizers.Optimizer)
    if compression is not None and not isinstance(compression, GradientCompressor):
        raise ValueError(
            "compression must be None (gradients are sent whole) or a GradientCompressor, but got "
            f"{compression!r}."
        )
    op = check_op(op)
    if op not in (Average, Sum):
        raise ValueError(f"op must be Average or Sum for gradients, but got {op.name}.")
    inner = optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = optimizer.inner_optimizer
    _set_accumulation(inner, backward_passes_per_step)
    if runtime.workers() == 1:
        return optimizer
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            f"Horovod exchanges TensorFlow tensors, but KERAS_BACKEND is "
            f"{keras.backend.backend()!r}. Set it to 'tensorflow'."
        )
    if hasattr(inner, _HOOK):
        raise ValueError(f"The optimizer {inner.name!r} is distributed already. Wrap it once.")
    reducer = _Reducer(inner, op, compression)
    setattr(inner, _HOOK, reducer)
    if inner is not optimizer:
        reducer.agree_on_overflow(optimizer)
    return optimizer


def _set_accumulation(optimizer: keras.optimizers.Optimizer, passes: int) -> None:
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise ValueError(f"backward_passes_per_step must be an int from 1, but got {passes!r}.")
    own = optimizer.gradient_accumulation_steps
    if passes == 1 or passes == own:
        return
    if own:
        raise ValueError(
            f"backward_passes_per_step={passes} contradicts gradient_accumulation_steps={own} of "
            "the optimizer. Give one of them."
        )
    if optimizer.built:
        raise ValueError(
            f"backward_passes_per_step={passes} needs accumulators, which are made when the "
            f"optimizer is built, and {optimizer.name!r} is built already. Make the optimizer with "
            f"gradient_accumulation_steps={passes}."
        )
    optimizer.gradient_accumulation_steps = passes


class _Reducer:
    """What one optimizer does besides its own work.

    Keras calls `_clip_gradients` exactly once per update, and `build` before the first. Both are
    shadowed on this one optimizer, so that neither its class nor Keras is touched.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        op: ReduceOp,
        compression: GradientCompressor | None,
    ) -> None:
        self._optimizer = optimizer
        self._applied: list[Any] = []
        # Wrapped in the same order on every rank, so that the names of the operations agree.
        self._name = f"tfaccel_optimizer{next(_numbers)}"
        self._check = WeightsCheck(f"{self._name}.check")
        self._exchange = GradientExchange(self._name, op, compression)
        keras_private.watch_applied_variables(optimizer, self._applied)
        self._clip = keras_private.replace_clip_gradients(optimizer, self.reduce_and_clip)
        self._build = optimizer.build
        optimizer.build = self.build

    def reduce_and_clip(self, grads: Sequence[Any]) -> list[Any]:
        """Stands in for the optimizer's `_clip_gradients`."""
        if keras_private.is_compiled_by_xla():
            raise RuntimeError(
                "XLA cannot compile the exchange of gradients between workers. Call "
                "model.compile(..., jit_compile=False), or leave jit_compile='auto' and give fit() "
                "the BroadcastGlobalVariablesCallback, which turns XLA off."
            )
        reduced = self._exchange.run(grads, self._applied)
        self._check.run(keras_private.trained_variables(self._optimizer))
        return self._clip(reduced)

    def build(self, variables: Sequence[Any]) -> None:
        """Stands in for the optimizer's `build`, in order to meet a LossScaleOptimizer around it.

        `compile` puts one around the optimizer under mixed_float16 and tells nobody. It builds the
        optimizer before it asks for the first time whether gradients are finite.
        """
        outer = keras_private.loss_scale_optimizer_that_builds(self._optimizer)
        if outer is not None:
            self.agree_on_overflow(outer)
        self._build(variables)

    def agree_on_overflow(self, outer: keras.optimizers.LossScaleOptimizer) -> None:
        """Makes all ranks skip a step when one of them has a gradient that is not finite.

        Otherwise that rank alone would skip the exchange, and the others would wait for it for
        ever.
        """
        if hasattr(outer, _HOOK):
            return
        own_check = outer.check_finite

        def check_finite(grads: Sequence[Any]) -> Any:
            import tensorflow as tf

            finite = tf.cast(own_check(grads), tf.float32)
            return reduce_tensors([finite], Min, f"{self._name}.finite")[0] > 0.5

        outer.check_finite = check_finite
        setattr(outer, _HOOK, self)
