"""The one place where gradients travel between ranks: plain, or by way of a compressor."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import keras

from tfaccel.distributed.reduction import reduce_tensors
from tfaccel.distributed.runtime import Average, ReduceOp, require_agreement


@runtime_checkable
class GradientCompressor(Protocol):
    """Something that exchanges dense gradients in fewer bytes than they take.

    One object serves one optimizer. It is asked for the same variables at every update.
    """

    def build(self, variables: Sequence[keras.Variable], name: str) -> None:
        """Makes the state (residuals, momenta) for these variables.

        Called once, outside of any `tf.function`, before the first exchange.

        Args:
            variables: all that the optimizer trains, in its order.
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


class GradientExchange:
    """Combines the gradients of one optimizer, or of one tape, over all ranks.

    Args:
        name: of the operations, the same on all ranks and no other exchange's.
        op: how gradients are combined.
        compression: a `GradientCompressor`, or None to send them as they are.
        sparse_as_dense: makes `tf.IndexedSlices` dense first, instead of gathering their rows.
    """

    def __init__(
        self,
        name: str,
        op: ReduceOp = Average,
        compression: GradientCompressor | None = None,
        *,
        sparse_as_dense: bool = False,
    ) -> None:
        self.name = name
        self.op = op
        self.compression = compression
        self._sparse_as_dense = sparse_as_dense
        self._agreed = False

    def run(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Combines gradients, inside the training step.

        Args:
            gradients: tensors, `tf.IndexedSlices` or None, of this rank.
            variables: those they belong to.

        Returns:
            As many gradients, the same on all ranks but for the number of slices.

        Raises:
            ValueError: on all ranks, at the first exchange, if their gradients do not match; it
                names the first variable that differs.
        """
        import tensorflow as tf

        gradients = list(gradients)
        if self._sparse_as_dense:
            gradients = [
                tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in gradients
            ]
        if not self._agreed:
            # Outside of the graph that may be being traced: ranks that differ have to learn of it
            # before the first operation of theirs waits for one that never comes.
            with tf.init_scope():
                self._agree(gradients, variables)
                if self.compression is not None:
                    self.compression.build(list(variables), self.name)
            self._agreed = True
        if self.compression is None:
            return reduce_tensors(gradients, self.op, self.name)
        dense = [
            i
            for i, gradient in enumerate(gradients)
            if gradient is not None and not isinstance(gradient, tf.IndexedSlices)
        ]
        rest: list[Any] = [None if i in set(dense) else g for i, g in enumerate(gradients)]
        results = reduce_tensors(rest, self.op, self.name)
        reduced = self.compression.exchange(
            [gradients[i] for i in dense], [variables[i] for i in dense], self.op
        )
        for index, result in zip(dense, reduced, strict=True):
            results[index] = result
        return results

    def _agree(self, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        compression = getattr(self.compression, "__name__", type(self.compression).__name__)
        lines = [f"op={self.op.name}, compression={compression}"]
        labels = ["how gradients are exchanged"]
        for gradient, variable in zip(gradients, variables, strict=True):
            lines.append(f"{_describe(gradient)} of {_describe(variable)}")
            labels.append(str(getattr(variable, "path", getattr(variable, "name", "variable"))))
        require_agreement("the gradients to exchange", lines, labels)


def _describe(value: Any) -> str:
    import tensorflow as tf

    if value is None:
        return "no gradient"
    kind = "sparse " if isinstance(value, tf.IndexedSlices) else ""
    dtype = getattr(value.dtype, "name", value.dtype)
    return f"{kind}{dtype} {tuple(value.shape)}"
