"""What compressors keep between steps, stored beside a checkpoint: a file of every rank.

The model's own file stays plain Keras: residuals differ from rank to rank and are nobody's weights.
"""

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfaccel.core.artifacts import write_aside
from tfaccel.core.checks import check_type
from tfaccel.distributed import runtime
from tfaccel.distributed.compressed_exchange import CompressedExchange
from tfaccel.distributed.optimizer import exchanges_of

Array = np.ndarray[Any, Any]
_UPDATES = "updates"


class CompressionCheckpoint(keras.callbacks.Callback):
    """Saves the compressors' state of every rank at the end of each epoch.

    Give it to `fit` on all ranks, with the path of the checkpoint that rank 0 saves.

    Args:
        filepath: of the checkpoint, with the fields of `keras.callbacks.ModelCheckpoint`, such as
            "model-{epoch:02d}.keras".
    """

    def __init__(self, filepath: str | Path) -> None:
        super().__init__()
        check_type("filepath", filepath, (str, Path))
        self.filepath = str(filepath)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves this rank's state."""
        path = self.filepath.format(epoch=epoch + 1, **(logs or {}))
        save_compression_state(self.model.optimizer, path)


def save_compression_state(optimizer: keras.optimizers.Optimizer, path: str | Path) -> Path | None:
    """Saves what this rank's compressors keep, beside a checkpoint; call it on every rank.

    The file appears whole or not at all.

    Args:
        optimizer: a `DistributedOptimizer` with a compression.
        path: of the checkpoint; the file is <its stem>.compression-<rank>-of-<ranks>.npz.

    Returns:
        The file; None for an optimizer that keeps nothing.
    """
    exchanges = _compressed(optimizer)
    if not exchanges:
        return None
    rank, size = (runtime.rank(), runtime.size()) if runtime.workers() > 1 else (0, 1)
    target = _file_of(Path(path), rank, size)
    arrays = {
        f"{number}/{name}": array
        for number, exchange in enumerate(exchanges)
        for name, array in exchange.get_state().items()
    }
    with write_aside(target) as aside, aside.open("wb") as file:
        updates = np.array(_updates(optimizer))
        np.savez(file, **{_UPDATES: updates, **arrays})  # type: ignore[arg-type]
    return target


def restore_compression_state(optimizer: keras.optimizers.Optimizer, path: str | Path) -> None:
    """Gives every rank's compressors the state that was saved with a checkpoint.

    Call it on every rank, after the model and its optimizer were restored and before training. If
    there are more or fewer ranks than there were, each begins with the mean of all residuals, so
    that none of the gradients that were kept is lost; then every rank needs to see all files.

    Args:
        optimizer: a `DistributedOptimizer` with the compression that was saved.
        path: of the checkpoint.

    Raises:
        FileNotFoundError: there is no file of this rank, and no whole set of another job.
        ValueError: the state was saved at another update than the optimizer is at, or for another
            compressor or model.
    """
    exchanges = _compressed(optimizer)
    if not exchanges:
        return
    arrays = _read(Path(path))
    saved_at, now = int(arrays.pop(_UPDATES)), _updates(optimizer)
    if saved_at != now:
        raise ValueError(
            f"The compression state beside {str(path)!r} was saved after {saved_at} updates, but "
            f"the optimizer has made {now}. Restore the checkpoint that it was saved with first."
        )
    for number, exchange in enumerate(exchanges):
        prefix = f"{number}/"
        exchange.set_state(
            {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        )


def _read(checkpoint: Path) -> dict[str, Array]:
    rank, size = (runtime.rank(), runtime.size()) if runtime.workers() > 1 else (0, 1)
    own = _file_of(checkpoint, rank, size)
    if own.exists():
        return _load(own)
    sets: dict[int, list[Path]] = {}
    pattern = re.compile(re.escape(checkpoint.stem) + r"\.compression-\d+-of-(\d+)\.npz")
    for file in sorted(own.parent.glob("*.npz")):
        match = pattern.fullmatch(file.name)
        if match:
            sets.setdefault(int(match[1]), []).append(file)
    whole = [files for count, files in sets.items() if len(files) == count != size]
    if not whole:
        raise FileNotFoundError(
            f"There is no compression state {own.name!r} beside {str(checkpoint)!r}, and no whole "
            "set of another number of ranks. Save it on every rank with save_compression_state() "
            "or the callback CompressionCheckpoint, on a disk that all ranks see."
        )
    states = [_load(file) for file in max(whole, key=lambda files: files[0].stat().st_mtime)]
    return {
        # Counters are the same on all ranks; what is kept counts by its mean.
        name: np.mean([state[name] for state in states], axis=0, dtype=array.dtype)
        if array.dtype.kind == "f"
        else array
        for name, array in states[0].items()
    }


def _load(file: Path) -> dict[str, Array]:
    with np.load(file) as stored:
        return {name: stored[name] for name in stored.files}


def _file_of(checkpoint: Path, rank: int, size: int) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}.compression-{rank}-of-{size}.npz")


def _compressed(optimizer: keras.optimizers.Optimizer) -> list[CompressedExchange]:
    check_type("optimizer", optimizer, keras.optimizers.Optimizer)
    found = [exchange.compressor for exchange in exchanges_of(optimizer)]
    return [compressor for compressor in found if isinstance(compressor, CompressedExchange)]


def _updates(optimizer: keras.optimizers.Optimizer) -> int:
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return int(inner.iterations)
