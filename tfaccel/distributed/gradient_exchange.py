"""The one place where gradients travel between ranks: plain, or by way of a compressor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import keras

from tfaccel.distributed import process_sets, restarts
from tfaccel.distributed.compressed_exchange import CompressedExchange
from tfaccel.distributed.compressors import Compressor, resolve_compression
from tfaccel.distributed.drift import path_of
from tfaccel.distributed.half_precision import sent_in_16_bits
from tfaccel.distributed.reduction import reduce_tensors
from tfaccel.distributed.runtime import (
    Adasum,
    Average,
    ReduceOp,
    Sum,
    check_op,
    require_agreement,
    workers,
)


@runtime_checkable
class GradientCompressor(Protocol):
    """Something that exchanges dense gradients in fewer bytes than they take.

    One object serves one optimizer. It is asked for the same variables at every update.
    """

    def build(self, variables: Sequence[keras.Variable], name: str) -> None:
        """Makes the state (residuals, momenta) for these variables.

        Called outside of any `tf.function`, before the first exchange; in an elastic job again
        after each change of workers.

        Args:
            variables: all that gradients are exchanged for, in the optimizer's order.
            name: that every operation's name begins with.
        """

    def exchange(
        self, gradients: Sequence[Any], variables: Sequence[keras.Variable], op: ReduceOp
    ) -> list[Any]:
        """Returns what is applied on every rank in place of this rank's gradients.

        Called inside the training step, in a graph or eagerly. Operations of Horovod need names of
        their own and data dependencies (they are not stateful).

        Args:
            gradients: dense tensors of this rank, none of them None.
            variables: those they belong to; the same on all ranks.
            op: Average or Sum.
        """


@dataclass(frozen=True)
class ExchangeOptions:
    """How gradients are combined, as Horovod's arguments say it.

    Args:
        op: Average, Sum or Adasum.
        compression: a compressor, its name or its config; one of `Compression`; a
            `GradientCompressor`; or None to send them as they are.
        sparse_as_dense: makes `tf.IndexedSlices` dense first, instead of gathering their rows.
        gradient_predivide_factor: with Average, how much of the division by the number of ranks
            comes before the sum.
        groups: into how many operations gradients are put, or lists of the variables of each; None
            for one per data type.
        process_set: the ranks that take part; None for all.
        device: for the operations, as TensorFlow names it; "" for its own choice.

    Raises:
        ValueError: an argument is out of range, or two do not go together.
    """

    op: ReduceOp = Average
    compression: Any = None
    sparse_as_dense: bool = False
    gradient_predivide_factor: float = 1.0
    groups: Any = None
    process_set: Any = None
    device: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "op", check_op(self.op))
        object.__setattr__(self, "compression", resolve_compression(self.compression))
        if self.op not in (Average, Sum, Adasum):
            raise ValueError(
                f"op must be Average or Sum for gradients, or Adasum, but got {self.op.name}."
            )
        if self.gradient_predivide_factor != 1.0 and self.op != Average:
            raise ValueError(
                f"gradient_predivide_factor={self.gradient_predivide_factor} divides an average, "
                f"but op is {self.op.name}."
            )
        whole = isinstance(self.groups, int) and not isinstance(self.groups, bool)
        if not (
            self.groups is None
            or isinstance(self.groups, list | tuple)
            or (whole and self.groups >= 1)
        ):
            raise ValueError(
                f"groups must be a number from 1 or lists of variables, but got {self.groups!r}."
            )
        if not isinstance(self.compression, Compressor | GradientCompressor):
            sent_in_16_bits(self.compression)
        elif self.op == Adasum or self.gradient_predivide_factor != 1.0:
            raise ValueError(
                f"compression={self.compression!r} averages or sums: it goes with neither Adasum "
                "nor a gradient_predivide_factor."
            )

    def make_compressor(self) -> GradientCompressor | None:
        """Returns what stands in for the plain exchange of one optimizer, if anything does."""
        if isinstance(self.compression, Compressor):
            return CompressedExchange(self.compression, self.process_set)
        return self.compression if isinstance(self.compression, GradientCompressor) else None


class GradientExchange:
    """Combines the gradients of one optimizer, or of one tape, over all ranks.

    Args:
        name: of the operations, the same on all ranks and no other exchange's.
        options: how they are combined.
    """

    def __init__(self, name: str, options: ExchangeOptions) -> None:
        self.name = name
        self.options = options
        self.compressor = options.make_compressor()
        self._agreed_in: int | None = None

    def run(
        self, gradients: Sequence[Any], variables: Sequence[Any], name: str | None = None
    ) -> list[Any]:
        """Combines gradients, inside the training step.

        Args:
            gradients: tensors, `tf.IndexedSlices` or None, of this rank.
            variables: those they belong to.
            name: of the operations, if it is not the exchange's.

        Returns:
            As many gradients, the same on all ranks but for the number of slices.

        Raises:
            ValueError: on all ranks, at the first exchange, if their gradients do not match; it
                names the first variable that differs.
        """
        import tensorflow as tf

        options = self.options
        gradients = list(gradients)
        if options.sparse_as_dense or getattr(self.compressor, "needs_dense", False):
            gradients = [
                tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in gradients
            ]
        if self._agreed_in != restarts.generation():
            # Outside of the graph that may be being traced: ranks that differ have to learn of it
            # before the first operation of theirs waits for one that never comes.
            with tf.init_scope():
                if workers() > 1:
                    self._agree(gradients, variables)
                if self.compressor is not None:
                    self.compressor.build(list(variables), self.name)
            self._agreed_in = restarts.generation()
        with tf.device(options.device or None):
            return self._combine(gradients, variables, name or self.name)

    def _combine(self, gradients: list[Any], variables: Sequence[Any], name: str) -> list[Any]:
        import tensorflow as tf

        options = self.options
        results: list[Any] = [None] * len(gradients)
        remaining = [i for i, gradient in enumerate(gradients) if gradient is not None]
        if self.compressor is not None:
            dense = [i for i in remaining if not isinstance(gradients[i], tf.IndexedSlices)]
            remaining = [i for i in remaining if i not in set(dense)]
            reduced = self.compressor.exchange(
                [gradients[i] for i in dense], [variables[i] for i in dense], options.op
            )
            for index, result in zip(dense, reduced, strict=True):
                results[index] = result
        # Horovod divides an average by the number of ranks after the sum.
        factor = options.gradient_predivide_factor
        for number, group in enumerate(_split(remaining, options.groups, variables)):
            reduced = reduce_tensors(
                [gradients[i] for i in group],
                options.op,
                f"{name}.{number}" if options.groups is not None else name,
                prescale_factor=1.0 / factor,
                postscale_factor=factor,
                compression=None if self.compressor is not None else options.compression,
                process_set=options.process_set,
            )
            for index, result in zip(group, reduced, strict=True):
                results[index] = result
        return results

    def _agree(self, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        options = self.options
        given = options.compression
        compression = "none" if given is None else getattr(given, "__name__", type(given).__name__)
        if isinstance(given, Compressor):
            compression = repr(given)
        # Optimizers made in another order on some rank would wait for other names than they send.
        lines = [f"op={options.op.name}, compression={compression}, named {self.name}"]
        labels = ["how gradients are exchanged"]
        for gradient, variable in zip(gradients, variables, strict=True):
            lines.append(f"{_describe(gradient)} of {_describe(variable)}")
            labels.append(path_of(variable))
        native = process_sets.native_process_set(options.process_set)
        require_agreement("the gradients to exchange", lines, labels, native)


def _split(indices: list[int], groups: Any, variables: Sequence[Any]) -> list[list[int]]:
    """Puts the indices of gradients into groups, each of which travels at once."""
    if not indices:
        return []
    if groups is None:
        return [indices]
    if isinstance(groups, int):
        count = min(groups, len(indices))
        return [
            indices[len(indices) * i // count : len(indices) * (i + 1) // count]
            for i in range(count)
        ]
    # Variables by identity: their names need not be their own.
    place = {id(v): number for number, group in enumerate(groups) for v in group}
    found: dict[Any, list[int]] = {}
    for index in indices:
        # One that no list names travels by itself.
        found.setdefault(place.get(id(variables[index]), f"alone {index}"), []).append(index)
    return list(found.values())


def _describe(value: Any) -> str:
    import tensorflow as tf

    if value is None:
        return "no gradient"
    kind = "sparse " if isinstance(value, tf.IndexedSlices) else ""
    dtype = getattr(value.dtype, "name", value.dtype)
    return f"{kind}{dtype} {tuple(value.shape)}"
