"""Training samples in seeded batches, changed a little each time, shared out to workers."""

import math
from typing import Any

import keras
import numpy as np

from tfaccel.recipes.data import FloatArray, IntArray, Split
from tfaccel.recipes.schema import AugmentSettings


class Batches(keras.utils.PyDataset):
    """Endless variety from a split: every epoch in another order, samples shifted and mirrored.

    All batches are full, the last of an epoch filled up from its beginning. With several workers
    each batch is dealt out in turn, so that together they see what one process would see.

    Args:
        split: the samples.
        batch_size: samples of one step, of all workers together.
        seed: of order and changes.
        augment: how samples are changed.
        rank: which worker this is.
        size: number of workers; must divide `batch_size`.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        augment: AugmentSettings,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        super().__init__()
        self._split = split
        self._batch_size = batch_size
        self._seed = seed
        self._augment = augment
        self._rank = rank
        self._size = size
        self._epoch = 0
        self._order = self._shuffled()

    def __len__(self) -> int:
        return math.ceil(len(self._split) / self._batch_size)

    def __getitem__(self, index: int) -> tuple[FloatArray, IntArray]:
        start = index * self._batch_size
        chosen = self._order.take(range(start, start + self._batch_size), mode="wrap")
        rng = np.random.default_rng([self._seed, self._epoch, index])
        x = augmented(self._split.x[chosen], self._augment, rng)
        mine = slice(self._rank, None, self._size)
        return x[mine], self._split.y[chosen][mine]

    def on_epoch_end(self) -> None:
        """Draws another order."""
        self._epoch += 1
        self._order = self._shuffled()

    def _shuffled(self) -> IntArray:
        rng = np.random.default_rng([self._seed, self._epoch])
        return rng.permutation(len(self._split))


def augmented(x: FloatArray, how: AugmentSettings, rng: np.random.Generator) -> Any:
    """Returns images moved by up to `how.shift` pixels, zeros coming in, half of them mirrored.

    Args:
        x: [batch, height, width, channels].
        how: shift in pixels and whether to mirror.
        rng: decides for each image.
    """
    if how.shift:
        batch, height, width, _ = x.shape
        padded = np.pad(x, ((0, 0), (how.shift, how.shift), (how.shift, how.shift), (0, 0)))
        down, right = rng.integers(0, 2 * how.shift + 1, (2, batch, 1, 1))
        rows = down + np.arange(height)[:, np.newaxis]
        columns = right + np.arange(width)
        x = padded[np.arange(batch)[:, np.newaxis, np.newaxis], rows, columns]
    if how.mirror:
        mirrored = rng.random(len(x)) < 0.5
        x = np.where(mirrored[:, np.newaxis, np.newaxis, np.newaxis], x[:, :, ::-1], x)
    return x
