"""Any Keras optimizer, with its gradients averaged over all workers before they are applied."""

from collections.abc import Sequence
from typing import Any

import keras

from tfaccel.core import keras_private
from tfaccel.core.checks import check_type
from tfaccel.distributed import process_sets, restarts, runtime
from tfaccel.distributed.drift import WeightsCheck
from tfaccel.distributed.gradient_exchange import ExchangeOptions, GradientExchange
from tfaccel.distributed.overflow import agree_on_overflow
from tfaccel.distributed.reduction import scaled
from tfaccel.distributed.runtime import Average, ReduceOp

_HOOK = "_tfaccel_reducer"


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",  # noqa: ARG001
    compression: Any = None,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: ReduceOp = Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = True,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = None,
    local_layers: Sequence[keras.layers.Layer] = (),
    scale_local_gradients: bool = True,
) -> keras.optimizers.Optimizer:
    """Makes an optimizer average its gradients over all workers, in `fit` and in custom loops.

    It is the same object that comes back, of the same class and with the same state: what is saved
    with a model is a plain Keras optimizer. The gradients are reduced once per update, after
    Keras's own gradient accumulation and loss scaling and before clipping and weight decay, so
    that N workers with batches of B do what one would do with batches of N·B. 16-bit gradients
    travel as float32. With one worker nothing is changed.

    At the first update the ranks compare their gradients' shapes and data types, and after the
    first updates their weights; a difference is an error that names the variable. Start with equal
    weights: `callbacks.BroadcastGlobalVariablesCallback`, or `broadcast_variables`.

    XLA cannot compile the exchange. With `jit_compile="auto"` the broadcast callback turns XLA off;
    `jit_compile=True` on a CPU is an error at the first step.

    Args:
        optimizer: any Keras optimizer, a `LossScaleOptimizer` or a `MultiOptimizer` too.
        name: that the operations' names begin with, the same on all ranks.
        device_dense: of the exchange, as TensorFlow names it; "" for its own choice.
        device_sparse: accepted for Horovod's sake; sparse gradients go where dense ones do.
        compression: None to send gradients as they are; a compressor such as `DGC()`, its name or
            its config; or one of `Compression`.
        sparse_as_dense: makes sparse gradients (`tf.IndexedSlices`) dense before they are sent.
        gradient_predivide_factor: with Average, how much of the division by the number of ranks
            comes before the sum.
        op: Average, Sum (then the learning rate has to be N times smaller), or Adasum.
        backward_passes_per_step: batches whose gradients are averaged on each worker before the
            workers exchange them, as Keras's `gradient_accumulation_steps`.
        average_aggregated_gradients: False sums over those batches instead, as Horovod does unless
            told otherwise.
        num_groups: Horovod's old name for a number of `groups`.
        groups: into how many operations gradients are put, or lists of the variables of each; None
            for one per data type.
        process_set: the ranks that take part; None for all. On any other rank the optimizer stays
            as it is.
        local_layers: layers of which each rank has its own: their gradients stay where they are.
        scale_local_gradients: divides those by the number of ranks, as an average would be.

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
    options = ExchangeOptions(
        op=op,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        gradient_predivide_factor=gradient_predivide_factor,
        groups=groups if num_groups == 0 else num_groups,
        process_set=process_set,
        device=device_dense,
    )
    inner = optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = optimizer.inner_optimizer
    for part in _parts(inner):
        _set_accumulation(part, backward_passes_per_step)
    number = restarts.numbered("optimizer")  # counted by every rank, so that names agree
    _check_momentum(_parts(inner), options.compression)
    alone = runtime.workers() == 1 and not runtime.is_elastic()
    if alone and not getattr(options.compression, "acts_alone", False):
        return optimizer
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            f"Horovod exchanges TensorFlow tensors, but KERAS_BACKEND is "
            f"{keras.backend.backend()!r}. Set it to 'tensorflow'."
        )
    if hasattr(inner, _HOOK):
        raise ValueError(f"The optimizer {inner.name!r} is distributed already. Wrap it once.")
    if process_set is not None and not process_set.included():
        setattr(inner, _HOOK, None)
        return optimizer
    reducer = _Reducer(inner, name or f"tfaccel_optimizer{number}", options)
    reducer.factor = 1 if average_aggregated_gradients else backward_passes_per_step
    reducer.local_layers = list(local_layers)
    reducer.scale_local_gradients = scale_local_gradients
    setattr(inner, _HOOK, reducer)
    if inner is not optimizer and not alone:
        agree_on_overflow(optimizer, reducer.name, process_set)
    return optimizer


def PartialDistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: keras.optimizers.Optimizer, *args: Any, **kwargs: Any
) -> keras.optimizers.Optimizer:
    """`DistributedOptimizer` under the name that Horovod gives it with `local_layers`.

    Args:
        optimizer: any Keras optimizer.
        args: as for `DistributedOptimizer`.
        kwargs: as for `DistributedOptimizer`; `local_layers` may be a single layer.

    Returns:
        `optimizer`.
    """
    local = kwargs.pop("local_layers", None) or ()
    kwargs["local_layers"] = [local] if isinstance(local, keras.layers.Layer) else list(local)
    for layer in kwargs["local_layers"]:
        check_type("local_layers", layer, keras.layers.Layer)
    return DistributedOptimizer(optimizer, *args, **kwargs)


def _parts(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """The optimizers that update variables: those inside a `MultiOptimizer`, or the one itself."""
    several = getattr(keras.optimizers, "MultiOptimizer", None)
    if several is not None and isinstance(optimizer, several):
        return list(optimizer.optimizers)
    return [optimizer]


def _check_momentum(parts: Sequence[keras.optimizers.Optimizer], compression: Any) -> None:
    """Raises ValueError if momentum would be applied twice."""
    here = getattr(compression, "momentum", 0.0)
    for part in parts:
        own = getattr(part, "momentum", 0.0) if isinstance(part, keras.optimizers.SGD) else 0.0
        if here and own:
            raise ValueError(
                f"Momentum would be applied twice: {part.name!r} has momentum={own} and "
                f"{type(compression).__name__} {here}. Give keras.optimizers.SGD(momentum=0.0)."
            )


def is_distributed(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether `DistributedOptimizer` was given it, on a rank outside of its process set as well."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return hasattr(optimizer, _HOOK)


def exchanges_of(optimizer: keras.optimizers.Optimizer) -> list[GradientExchange]:
    """Returns what exchanges the gradients of a `DistributedOptimizer`; nothing for any other."""
    inner = optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = optimizer.inner_optimizer
    reducer = getattr(inner, _HOOK, None)
    return list(reducer.exchanges) if reducer is not None else []


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
    shadowed on this one optimizer, so that neither its class nor Keras is touched. Of a
    `MultiOptimizer` it is the optimizers inside that clip.
    """

    def __init__(
        self, optimizer: keras.optimizers.Optimizer, name: str, options: ExchangeOptions
    ) -> None:
        self.name = name
        self.factor = 1
        self.local_layers: list[keras.layers.Layer] = []
        self.scale_local_gradients = True
        self._optimizer = optimizer
        self._options = options
        self.exchanges: list[GradientExchange] = []
        self._reduced: list[keras.optimizers.Optimizer] = []
        self._build = optimizer.build
        optimizer.build = self.build
        self._reduce_parts()

    def build(self, variables: Sequence[Any]) -> None:
        """Stands in for the optimizer's `build`, in order to meet a LossScaleOptimizer around it.

        `compile` puts one around the optimizer under mixed_float16 and tells nobody. It builds the
        optimizer before it asks for the first time whether gradients are finite.
        """
        outer = keras_private.loss_scale_optimizer_that_builds(self._optimizer)
        if outer is not None and (runtime.workers() > 1 or runtime.is_elastic()):
            agree_on_overflow(outer, self.name, self._options.process_set)
        self._build(variables)
        # A MultiOptimizer that is given a function meets its optimizers as it is built.
        self._reduce_parts()

    def _reduce_parts(self) -> None:
        for part in _parts(self._optimizer):
            if not any(part is other for other in self._reduced):
                self._reduce(part, f"{self.name}.{len(self._reduced)}")
                self._reduced.append(part)

    def _reduce(self, part: keras.optimizers.Optimizer, name: str) -> None:
        options, applied = self._options, list[Any]()
        check = WeightsCheck(f"{name}.check", options.process_set)
        exchange = GradientExchange(name, options)
        self.exchanges.append(exchange)

        def reduce_and_clip(grads: Sequence[Any]) -> list[Any]:
            # Asked for in each trace: an elastic job may be down to one worker, or up from it.
            alone = runtime.workers() == 1
            if keras_private.is_compiled_by_xla() and not alone:
                raise RuntimeError(
                    "XLA cannot compile the exchange of gradients between workers. Call "
                    "model.compile(..., jit_compile=False), or leave jit_compile='auto' and give "
                    "fit() the BroadcastGlobalVariablesCallback, which turns XLA off."
                )
            # Asked for here: layers that were not built have no variables before.
            own = {id(v) for layer in self.local_layers for v in layer.trainable_variables}
            shared = [i for i, variable in enumerate(applied) if id(variable) not in own]
            count = process_sets.members(options.process_set) if self.scale_local_gradients else 1
            reduced = [scaled(gradient, 1.0 / count) for gradient in grads] if own else list(grads)
            found = exchange.run([grads[i] for i in shared], [applied[i] for i in shared])
            for index, gradient in zip(shared, found, strict=True):
                reduced[index] = gradient
            if not alone:
                trained = keras_private.trained_variables(part)
                check.run([variable for variable in trained if id(variable) not in own])
            if self.factor != 1:
                reduced = [gradient * self.factor for gradient in reduced]
            return clip(reduced)

        keras_private.watch_applied_variables(part, applied)
        clip = keras_private.replace_clip_gradients(part, reduce_and_clip)
