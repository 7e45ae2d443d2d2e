"""Models loaded to be trained on by several workers."""

import os
from typing import Any

import keras

from tfaccel.distributed.optimizer import DistributedOptimizer


def load_model(
    filepath: str | os.PathLike[str],
    custom_optimizers: Any = None,
    custom_objects: dict[str, Any] | None = None,
    compression: Any = None,
    legacy_opts: bool = False,  # noqa: ARG001
) -> keras.Model:
    """Loads a Keras model whose optimizer exchanges gradients with the other ranks.

    The file is that of a plain Keras model, as `model.save` writes it on rank 0; every rank reads
    it, the state of the optimizer included.

    Args:
        filepath: a `.keras` file of a compiled model.
        custom_optimizers: classes of optimizers that are not Keras's own.
        custom_objects: what else the file names, by name, as for `keras.saving.load_model`.
        compression: as for `DistributedOptimizer`.
        legacy_opts: accepted for Horovod's sake.

    Returns:
        The model, compiled.

    Raises:
        ValueError: the model was saved without an optimizer.
    """
    known = {kind.__name__: kind for kind in custom_optimizers or ()}
    model = keras.saving.load_model(filepath, custom_objects={**known, **(custom_objects or {})})
    if getattr(model, "optimizer", None) is None:
        raise ValueError(
            f"The model in {os.fspath(filepath)!r} was not compiled. Load it with "
            "keras.saving.load_model, and compile it with a DistributedOptimizer."
        )
    DistributedOptimizer(model.optimizer, compression=compression)
    return model
