"""Real activations of the layers of a model, sampled: what data-driven rewrites work on."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.checks import check_positive
from tfaccel.core.cloning import recurrent_states
from tfaccel.core.graph import Graph
from tfaccel.core.walking import Call, Visit, walk

Array = npt.NDArray[Any]
Batch = list[Array]  # one array for each input of the model

BATCH_SIZE = 32


def gather_batches(
    model: keras.Model, data: Any, samples: int, seed: int, verb: str
) -> list[Batch]:
    """Takes samples of what a model reads.

    Args:
        model: a model with a graph.
        data: an array [samples, ...]; for several inputs a list of such or a dict by input name; a
            tuple (x, y), whose y is not used; or an iterable of batches of one of these, such as a
            tf.data.Dataset.
        samples: at most so many are taken; of arrays a random choice, of an iterable the first.
        seed: of the choice.
        verb: the function that asks, named in errors.

    Returns:
        Batches of at most 32 samples.

    Raises:
        TypeError: the data are of another kind.
        ValueError: there are none, or they do not fit the inputs of the model.
    """
    check_positive("samples", samples)
    if isinstance(data, (list, tuple, Mapping)) or hasattr(data, "__array__"):
        flat = _flat(model, data, verb)
        count = min(len(array) for array in flat) if flat else 0
        chosen = np.sort(np.random.default_rng(seed).permutation(count)[:samples])
        batches = [[array[chosen] for array in flat]]
    elif isinstance(data, Iterable):
        batches = list(_first(model, data, samples, verb))
    else:
        raise TypeError(
            f"{verb}() needs data as an array [samples, ...] or as batches such as a "
            f"tf.data.Dataset, but got {type(data).__name__}."
        )
    split = [
        [array[start : start + BATCH_SIZE] for array in batch]
        for batch in batches
        for start in range(0, len(batch[0]), BATCH_SIZE)
    ]
    if not split:
        raise ValueError(f"{verb}() needs data, but got none. Give at least one sample.")
    return split


def _first(model: keras.Model, data: Iterable[Any], samples: int, verb: str) -> Iterator[Batch]:
    for element in data:
        batch = [array[:samples] for array in _flat(model, element, verb)]
        yield batch
        samples -= len(batch[0])
        if samples <= 0:
            return


def _flat(model: keras.Model, data: Any, verb: str) -> Batch:
    tensors = Graph.read(model).inputs
    x = data[0] if isinstance(data, tuple) else data
    if isinstance(x, Mapping) and set(x) >= {tensor.name for tensor in tensors}:
        x = [x[tensor.name] for tensor in tensors]
    arrays = [keras.ops.convert_to_numpy(leaf) for leaf in keras.tree.flatten(x)]
    shapes = [array.shape[1:] for array in arrays]
    wanted = [tensor.shape[1:] for tensor in tensors]
    fits = len(shapes) == len(wanted) and all(
        len(shape) == len(want) and all(w in (None, s) for s, w in zip(shape, want, strict=True))
        for shape, want in zip(shapes, wanted, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{verb}() needs data for the inputs of {model.name!r}, of the shapes {wanted} without "
            f"the batch dimension, but got {shapes}. Give x, (x, y), or batches of these."
        )
    return arrays


def visit(
    model: keras.Model, batch: Batch, call: Call | None = None
) -> Generator[Visit, None, Sequence[Any]]:
    """Runs a model on a batch in inference, eagerly, and yields each call with its values.

    Args:
        model: a model with a graph; not changed.
        batch: one array for each input.
        call: runs an operation; by default as the model would.

    Returns:
        The outputs of the model, flat.
    """
    tensors = Graph.read(model).inputs
    values = [
        keras.ops.convert_to_tensor(array, tensor.dtype)
        for array, tensor in zip(batch, tensors, strict=True)
    ]
    states = [(state, keras.ops.copy(state.value)) for state in recurrent_states(model)]
    try:
        return (yield from walk(model, values, call or _run))
    finally:
        for state, value in states:
            state.assign(value)


def outputs_of(model: keras.Model, batch: Batch) -> list[Array]:
    """Returns what a model gives for a batch in inference, flat, as float64."""
    ends: list[Any] = []

    def run() -> Iterator[Visit]:
        ends.extend((yield from visit(model, batch)))

    for _ in run():
        pass
    return [np.asarray(keras.ops.convert_to_numpy(end), np.float64) for end in ends]


def _run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    return operation(*args, **kwargs)


class PatchSampler:
    """Cuts what a convolution or dense layer multiplies with its kernel out of its input.

    Args:
        layer: Conv1D/2D/3D or Dense.
        seed: decides the positions; two samplers of one seed cut at the same ones.
    """

    def __init__(self, layer: Any, seed: int) -> None:
        self._layer = layer
        self._random = np.random.default_rng(seed)

    def cut(self, x: Any, count: int) -> Array:
        """Returns patches at random output positions, without repetition.

        Args:
            x: the input of the layer, batch first.
            count: at most so many.

        Returns:
            [patches, positions in the kernel, input channels], float64, zeros where the layer pads.
        """
        values = np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")))
        layer = self._layer
        if isinstance(layer, keras.layers.Dense):
            rows = values.reshape(-1, values.shape[-1])
            chosen = self._choose(len(rows), count)
            return rows[chosen, np.newaxis].astype(np.float64)
        if layer.data_format == "channels_first":
            values = np.moveaxis(values, 1, -1)
        padded, sizes = _pad(layer, values)
        chosen = self._choose(len(values) * int(np.prod(sizes)), count)
        sample, *corner = np.unravel_index(chosen, (len(values), *sizes))
        ones = [1] * len(sizes)
        index = [sample.reshape(-1, *ones)]
        for axis, place in enumerate(corner):
            taps = np.arange(layer.kernel_size[axis]) * layer.dilation_rate[axis]
            along = [*ones[:axis], -1, *ones[axis + 1 :]]
            index.append((place * layer.strides[axis]).reshape(-1, *ones) + taps.reshape(along))
        patches = padded[tuple(index)]
        return patches.reshape(len(chosen), -1, values.shape[-1]).astype(np.float64)

    def _choose(self, total: int, count: int) -> Array:
        if count >= total:
            return np.arange(total)
        return np.sort(self._random.choice(total, count, replace=False))


def _pad(layer: Any, values: Array) -> tuple[Array, Sequence[int]]:
    """Returns the padded input, and the number of output positions along each axis."""
    pads, sizes = [(0, 0)], []
    for size, kernel, stride, dilation in zip(
        values.shape[1:-1], layer.kernel_size, layer.strides, layer.dilation_rate, strict=True
    ):
        reach = (kernel - 1) * dilation + 1
        if layer.padding == "same":
            count = -(-size // stride)
            missing = max(0, (count - 1) * stride + reach - size)
            pads.append((missing // 2, missing - missing // 2))
        else:
            before = reach - 1 if layer.padding == "causal" else 0
            count = (size + before - reach) // stride + 1
            pads.append((before, 0))
        sizes.append(count)
    return np.pad(values, [*pads, (0, 0)]), sizes
