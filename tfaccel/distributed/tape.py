"""Horovod's gradient tape: gradients that are combined over all ranks as they are asked for."""

from collections.abc import Sequence
from typing import Any

from tfaccel.distributed import process_sets, restarts, runtime
from tfaccel.distributed.compressors import Compressor
from tfaccel.distributed.drift import WeightsCheck
from tfaccel.distributed.gathering import unique_name
from tfaccel.distributed.gradient_exchange import ExchangeOptions, GradientExchange
from tfaccel.distributed.graphs import untranslated
from tfaccel.distributed.reduction import scaled
from tfaccel.distributed.runtime import Average, ReduceOp

# A loop makes a new tape at every step; what belongs to its variables is kept from one to the next.
_exchanges: dict[Any, tuple[GradientExchange, WeightsCheck]] = {}


@untranslated
def DistributedGradientTape(  # noqa: N802 - Horovod's name
    gradtape: Any,
    device_dense: str = "",
    device_sparse: str = "",  # noqa: ARG001
    compression: Any = None,
    sparse_as_dense: bool = False,
    op: ReduceOp = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = None,
    scale_local_gradients: bool = True,
) -> Any:
    """Makes a `tf.GradientTape` average its gradients over all ranks.

    For loops of one's own whose optimizer is no `DistributedOptimizer` (use one of the two). With
    one worker the tape comes back as it is.

    Args:
        gradtape: a `tf.GradientTape`, recorded or about to be.
        device_dense: of the exchange, as TensorFlow names it; "" for its own choice.
        device_sparse: accepted for Horovod's sake.
        compression: as for `DistributedOptimizer`, and so is all that follows.
        sparse_as_dense: makes sparse gradients dense before they are sent.
        op: Average, Sum or Adasum.
        gradient_predivide_factor: with Average, how much of the division comes before the sum.
        num_groups: Horovod's old name for a number of `groups`.
        groups: into how many operations gradients are put, or lists of variables.
        process_set: the ranks that take part; None for all.
        scale_local_gradients: divides the gradients of what `register_local_source` names by the
            number of ranks, as an average would be.

    Returns:
        A tape that does all that `gradtape` does, and has `register_local_source(variable)`: its
        gradient stays on this rank.

    Raises:
        ValueError: an argument is out of range.
    """
    options = ExchangeOptions(
        op=op,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        gradient_predivide_factor=gradient_predivide_factor,
        groups=groups if num_groups == 0 else num_groups,
        process_set=process_set,
        device=device_dense,
    )
    alone = runtime.workers() == 1 and not runtime.is_elastic()
    if alone or (process_set is not None and not process_set.included()):
        return gradtape
    return _DistributedTape(gradtape, options, scale_local_gradients)


@untranslated
def PartialDistributedGradientTape(  # noqa: N802 - Horovod's name
    gradtape: Any, *args: Any, local_layers: Any = None, **kwargs: Any
) -> Any:
    """`DistributedGradientTape` with layers of which each rank has its own.

    Args:
        gradtape: a `tf.GradientTape`.
        args: as for `DistributedGradientTape`.
        local_layers: a Keras layer or several; their gradients stay where they are.
        kwargs: as for `DistributedGradientTape`.

    Returns:
        A tape.
    """
    tape = DistributedGradientTape(gradtape, *args, **kwargs)
    if isinstance(tape, _DistributedTape):
        layers = local_layers if isinstance(local_layers, list | tuple) else [local_layers]
        for layer in layers:
            for variable in layer.trainable_variables if layer is not None else ():
                tape.register_local_source(variable)
    return tape


class _DistributedTape:
    """A tape whose `gradient` is combined over all ranks; all else is the tape's own."""

    def __init__(self, tape: Any, options: ExchangeOptions, scale_local: bool) -> None:
        self._tape = tape
        self._options = options
        self._scale_local = scale_local
        self._local: set[int] = set()

    def register_local_source(self, source: Any) -> None:
        """Keeps the gradient of one variable on this rank.

        Args:
            source: a Keras or TensorFlow variable.
        """
        self._local.add(_identity(source))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tape, name)

    def __enter__(self) -> "_DistributedTape":
        self._tape.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._tape.__exit__(*error)

    @untranslated
    def gradient(self, target: Any, sources: Any, *arguments: Any, **options: Any) -> Any:
        """Returns the gradients of `target`, combined over all ranks.

        Args:
            target: as for `tf.GradientTape.gradient`, and so is all that follows.
            sources: variables or tensors, in any structure.
            arguments: such as `output_gradients`.
            options: such as `unconnected_gradients`.

        Returns:
            The structure of `sources`; None where there is no gradient.
        """
        import tensorflow as tf

        options.pop("use_generic_names", None)  # Horovod's own
        own = self._tape.gradient(target, sources, *arguments, **options)
        if runtime.workers() == 1:
            return own
        flat = tf.nest.flatten(sources)
        gradients = tf.nest.flatten(own)
        shared = [i for i, source in enumerate(flat) if _identity(source) not in self._local]
        exchange, check = _exchange_of([flat[i] for i in shared], self._options)
        found = exchange.run(
            [gradients[i] for i in shared],
            [flat[i] for i in shared],
            unique_name(None, exchange.name),
        )
        count = process_sets.members(self._options.process_set) if self._scale_local else 1
        reduced = [g if g is None else scaled(g, 1.0 / count) for g in gradients]
        for index, gradient in zip(shared, found, strict=True):
            reduced[index] = gradient
        variables = [flat[i] for i in shared if _is_variable(flat[i])]
        if variables:
            check.run(variables)
        return tf.nest.pack_sequence_as(sources, reduced)


def _exchange_of(
    sources: Sequence[Any], options: ExchangeOptions
) -> tuple[GradientExchange, WeightsCheck]:
    """Returns what was made for these variables before, or makes it."""
    shapes = tuple((id(s) if _is_variable(s) else 0, tuple(s.shape), s.dtype) for s in sources)
    # A compressor is plain data, made anew at every step perhaps; anything else is one object.
    plain = isinstance(options.compression, Compressor)
    compression = options.compression if plain else id(options.compression)
    how = (int(options.op), compression, options.sparse_as_dense, options.device)
    more = (options.gradient_predivide_factor, str(options.groups), id(options.process_set))
    key = (restarts.generation(), shapes, how, more)
    if key not in _exchanges:
        # Made in the same order on every rank, so that the names of the operations agree.
        name = f"tfaccel_tape{restarts.numbered('tape')}"
        check = WeightsCheck(f"{name}.check", options.process_set)
        _exchanges[key] = (GradientExchange(name, options), check)
    return _exchanges[key]


def _identity(source: Any) -> int:
    """A number of a variable's own, whether it is given as Keras's or as TensorFlow's."""
    import keras

    return id(source.value if isinstance(source, keras.Variable) else source)


def _is_variable(source: Any) -> bool:
    import keras
    import tensorflow as tf

    return isinstance(source, keras.Variable | tf.Variable)
