"""Named data and .npz files as seeded train, validation and test splits."""

import contextlib
import dataclasses
import hashlib
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfaccel.recipes.schema import DATA_NAMES, DataSettings, hint_for

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


class DataError(ValueError):
    """Data that cannot be trained on; the message says what was found and what is expected."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Samples and their labels.

    Attributes:
        x: [samples, height, width, channels] (or any [samples, ...]) float32.
        y: [samples] int64, classes from 0.
    """

    x: FloatArray
    y: IntArray

    def __len__(self) -> int:
        return len(self.x)

    @property
    def arrays(self) -> tuple[FloatArray, IntArray]:
        """The pair (x, y)."""
        return self.x, self.y


@dataclasses.dataclass(frozen=True)
class Splits:
    """One data set in three parts that share no sample.

    Attributes:
        train: what weights are fitted on.
        validation: held out of training, to choose settings by.
        test: held out of everything, to measure on.
        classes: number of classes.
        digest: SHA-256 of all three parts.
    """

    train: Split
    validation: Split
    test: Split
    classes: int
    digest: str

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.train.x.shape[1:]


def load_data(settings: DataSettings | str, seed: int = 0) -> Splits:
    """Loads a data set and splits it, stratified by class.

    Args:
        settings: the `data` part of a recipe, or only the name of the data.
        seed: decides which samples are held out.

    Returns:
        The three splits; integer pixels are scaled from 0..255 to 0..1.

    Raises:
        DataError: the data cannot be read, is empty, or its labels do not fit its samples.
        FileNotFoundError: there is no such .npz file.
    """
    if isinstance(settings, str):
        if settings not in DATA_NAMES and not settings.endswith(".npz"):
            raise DataError(
                f"There is no data set {settings!r}.{hint_for(settings, DATA_NAMES)} "
                f"Give {', '.join(DATA_NAMES)}, or the path of an .npz file."
            )
        settings = DataSettings(name=settings)
    parts = _READERS.get(settings.name, _read_npz)(settings.name)
    known = Split(*_checked(parts["x_train"], parts["y_train"], settings.name, "train"))
    if "x_test" in parts:
        test = Split(*_checked(parts["x_test"], parts["y_test"], settings.name, "test"))
        if test.x.shape[1:] != known.x.shape[1:]:
            raise DataError(
                f"{settings.name}: x_test holds samples of shape {test.x.shape[1:]}, but x_train "
                f"of shape {known.x.shape[1:]}. Both must be of one shape."
            )
    else:
        known, test = _hold_out(known, settings.test, seed, "test", settings.name)
    train, validation = _hold_out(known, settings.validation, seed + 1, "validation", settings.name)
    classes = int(max(train.y.max(), validation.y.max(), test.y.max())) + 1
    if classes < 2:
        raise DataError(f"{settings.name}: all labels are 0. A classifier needs two classes.")
    if settings.limit is not None:
        train, validation, test = (
            _limited(split, settings.limit, seed) for split in (train, validation, test)
        )
    return Splits(train, validation, test, classes, _digest(train, validation, test))


def _read_digits(_: str) -> dict[str, npt.NDArray[Any]]:
    """Returns 1,797 digits of 8 x 8 pixels, 0..16 scaled to 0..1 (UCI, Alpaydin & Kaynak 1998)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return {
        "x_train": (digits.images[..., np.newaxis] / 16).astype(np.float32),
        "y_train": digits.target,
    }


def _read_keras(name: str) -> dict[str, npt.NDArray[Any]]:
    import keras

    try:
        # Keras prints its download bar on stdout, which belongs to the caller.
        with contextlib.redirect_stdout(sys.stderr):
            (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    except Exception as error:
        # Keras raises a bare Exception where a download fails.
        raise DataError(
            f"{name} could not be loaded: {error}. Keras downloads it once; check the network, or "
            "put the files below $KERAS_HOME/datasets."
        ) from error
    parts = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    if x_train.ndim == 3:
        parts.update(x_train=x_train[..., np.newaxis], x_test=x_test[..., np.newaxis])
    return parts


def _read_npz(name: str) -> dict[str, npt.NDArray[Any]]:
    file = Path(name)
    if not file.exists():
        raise FileNotFoundError(f"There is no data file {name!r}. Check the path.")
    try:
        # Opened here, because numpy leaves a damaged file open.
        with file.open("rb") as content, np.load(content, allow_pickle=False) as archive:
            missing = {"x_train", "y_train"} - set(archive.files)
            if missing:
                raise DataError(
                    f"{name}: {' and '.join(sorted(missing))} missing; it holds "
                    f"{', '.join(archive.files) or 'nothing'}. Save it with "
                    "numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)."
                )
            if ("x_test" in archive.files) != ("y_test" in archive.files):
                raise DataError(f"{name}: x_test and y_test belong together; one is missing.")
            wanted = ("x_train", "y_train", "x_test", "y_test")
            return {key: archive[key] for key in wanted if key in archive.files}
    except DataError:
        raise
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{name} is not a whole .npz file of plain arrays ({error}). Write it again with "
            "numpy.savez."
        ) from error


_READERS = {
    "digits": _read_digits,
    "fashion_mnist": _read_keras,
    "cifar10": _read_keras,
}


def _checked(
    x: npt.NDArray[Any], y: npt.NDArray[Any], name: str, part: str
) -> tuple[FloatArray, IntArray]:
    where = f"{name}: the {part} part"
    if x.ndim < 2 or 0 in x.shape:
        what = "is empty" if 0 in x.shape else "holds no samples"
        raise DataError(
            f"{where} {what} (x of shape {x.shape}). Expected [samples, ...] with values in each."
        )
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or len(y) != len(x):
        raise DataError(
            f"{where} has labels of shape {y.shape} for {len(x)} samples. Expected [{len(x)}], one "
            "class number per sample" + (" (one-hot: use y.argmax(1))." if y.ndim == 2 else ".")
        )
    if x.dtype.kind not in "fiub" or y.dtype.kind not in "iu":
        raise DataError(
            f"{where} has samples of {x.dtype} and labels of {y.dtype}. "
            "Expected numbers, and integers from 0."
        )
    if y.min() < 0:
        raise DataError(f"{where} has the label {y.min()}. Classes count from 0.")
    scale = 1 / 255 if x.dtype.kind in "iu" else 1.0
    scaled = (x * np.float32(scale)).astype(np.float32)
    if not np.isfinite(scaled).all():
        raise DataError(f"{where} holds values that are not finite. Take those samples out.")
    return scaled, y.astype(np.int64)


def _hold_out(split: Split, share: float, seed: int, part: str, name: str) -> tuple[Split, Split]:
    """Returns (rest, held out): `share` of all, and of every class to within one sample."""
    rng = np.random.default_rng(seed)
    count = max(1, round(share * len(split)))
    if count >= len(split):
        raise DataError(
            f"{name}: {len(split)} samples are too few to hold {share:.0%} out for {part}. "
            "Give more samples, or another share."
        )
    # Each class is spread evenly over 0..1, from a random start; what lies lowest is held out.
    place = np.empty(len(split))
    for label in np.unique(split.y):
        members = rng.permutation(np.flatnonzero(split.y == label))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    held = np.zeros(len(split), bool)
    held[np.argsort(place, kind="stable")[:count]] = True
    return Split(split.x[~held], split.y[~held]), Split(split.x[held], split.y[held])


def _limited(split: Split, limit: int, seed: int) -> Split:
    chosen = np.sort(np.random.default_rng(seed).permutation(len(split))[:limit])
    return Split(split.x[chosen], split.y[chosen])


def _digest(*splits: Split) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for array in split.arrays:
            digest.update(f"{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
