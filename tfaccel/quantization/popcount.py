"""Binary layers computed in bits: 64 products are one XOR, their sum one count of ones.

With bits a and b for signs (1 for +1, 0 for -1), a dot product of n signs is
n - 2 popcount(a xor b) (Rastegari et al. 2016, section 3.3). NumPy runs it on 64-bit words: a
convolution gathers the words of the channels under its window, a dense layer has one row a sample.

A convolution pads its input, which is signs by then, with zeros, and a zero is no sign. The padded
places are computed as -1 and the sum of the weights that met them is added again, so that the
result is the exact integer that Keras gets.
"""

import concurrent.futures
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core import keras_private
from tfaccel.core.checks import check_model
from tfaccel.core.graph import Graph
from tfaccel.core.stripping import bake_layer
from tfaccel.core.transforms import TransformedLayer, transformed_layers
from tfaccel.core.walking import Visit, map_layers, read_graphs, walk
from tfaccel.quantization.binary_layers import Binarize
from tfaccel.quantization.low_bit_weights import Levels
from tfaccel.quantization.packing import levels_of

Array = npt.NDArray[Any]

WORD = 64
# Rows times outputs that are counted at once: the buffers stay in the cache of a core.
_BLOCK = 16384
_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


def pack_signs(values: Array) -> Array:
    """Packs the signs along the last axis into words, 1 for x >= 0; missing bits are 0.

    Args:
        values: [..., n] numbers.

    Returns:
        [..., ceil(n / 64)] uint64.

    >>> pack_signs(np.array([[1.0, -1.0, 0.0]]))
    array([[5]], dtype=uint64)
    """
    packed = np.packbits(np.asarray(values) >= 0, axis=-1, bitorder="little")
    missing = -packed.shape[-1] % (WORD // 8)
    padded = np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, missing)])
    return np.ascontiguousarray(padded).view("<u8").astype(np.uint64, copy=False)


def binary_matmul(rows: Array, columns: Array, length: int, threads: int = 1) -> Array:
    """Returns the products of two matrices of signs, as integers.

    Args:
        rows: [m, words] uint64 of `pack_signs`.
        columns: [words, n] uint64, the second matrix transposed, packed and transposed back.
        length: how many signs a row has.
        threads: over which the rows are divided.

    Returns:
        [m, n] int32.

    >>> a, b = np.array([[1, -1, 1]]), np.array([[1], [1], [1]])
    >>> binary_matmul(pack_signs(a), pack_signs(b.T).T, 3)
    array([[1]], dtype=int32)
    """
    result = np.empty((len(rows), columns.shape[1]), np.int32)
    step = max(1, _BLOCK // max(1, columns.shape[1]))
    starts = range(0, len(rows), step)
    columns = np.ascontiguousarray(columns)

    def count(start: int) -> None:
        block = rows[start : start + step]
        shape = len(block), columns.shape[1]
        different, ones = np.empty(shape, np.uint64), np.empty(shape, np.uint8)
        total = result[start : start + step]
        total.fill(length)
        # A sum of at most 64 ones for each word; the narrower, the faster.
        sums = np.zeros(shape, np.uint16 if WORD * len(columns) < 2**16 else np.uint32)
        for word in range(len(columns)):
            np.bitwise_xor(block[:, word, np.newaxis], columns[word], out=different)
            np.bitwise_count(different, out=ones)
            np.add(sums, ones, out=sums)
        total -= 2 * sums.astype(np.int32)

    if threads == 1 or len(starts) < 2:
        for start in starts:
            count(start)
    else:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(count, starts))
    return result


class PackedLayer(keras.layers.Layer):
    """A dense layer or convolution whose kernel is bits; it reads signs and has no Keras weights.

    Args:
        layer: the plain layer, for its geometry, bias and activation.
        levels: codes of its kernel (all ±1) and their scale.
        threads: see `binary_matmul`.
    """

    def __init__(self, layer: Any, levels: Levels, threads: int = 1) -> None:
        super().__init__(name=layer.name, dtype=layer.dtype_policy)
        self._threads = threads
        self._window = tuple(layer.kernel_size) if isinstance(layer, _CONVOLUTIONS) else ()
        self._strides = tuple(layer.strides) if self._window else ()
        self._dilation = tuple(layer.dilation_rate) if self._window else ()
        self._same = bool(self._window) and layer.padding == "same"
        self._activation = layer.activation
        self._bias = keras.ops.convert_to_numpy(layer.bias) if layer.use_bias else None
        codes = np.asarray(levels.codes)
        self._channels, self._outputs = codes.shape[-2:]
        words = pack_signs(np.swapaxes(codes, -1, -2))
        # [taps, outputs, words] to [taps * words, outputs]
        words = np.moveaxis(words.reshape(-1, *words.shape[-2:]), 1, 2)
        self._kernel = np.ascontiguousarray(words.reshape(-1, self._outputs))
        self._tap_sums = codes.reshape(-1, self._channels, self._outputs).sum(1, dtype=np.int32)
        self._scale = np.asarray(levels.positive).reshape(-1)
        self._corrections: dict[tuple[int, ...], Array] = {}
        self.built = True

    @property
    def kernel_bytes(self) -> int:
        """Size of the packed kernel and its scale."""
        return self._kernel.nbytes + self._scale.nbytes

    @property
    def float_kernel_bytes(self) -> int:
        """Size of the kernel in float32."""
        return 4 * len(self._tap_sums) * self._channels * self._outputs

    def call(self, inputs: Any) -> Any:
        """Returns what the plain layer gives for the signs of `inputs`, eagerly."""
        sums = self.dot(pack_signs(keras.ops.convert_to_numpy(inputs)))
        result = keras.ops.cast(sums.astype(np.float32) * self._scale, self.compute_dtype)
        if self._bias is not None:
            result = result + keras.ops.cast(self._bias, self.compute_dtype)
        return self._activation(result)

    def dot(self, words: Array) -> Array:
        """Returns the integers that the signs sum to.

        Args:
            words: [batch, ..., words] of `pack_signs`, with one axis for each of the kernel's.

        Returns:
            [batch, ..., outputs] int32.
        """
        if not self._window:
            rows = words.reshape(-1, words.shape[-1])
            sums = binary_matmul(rows, self._kernel, self._channels, self._threads)
            return sums.reshape(*words.shape[:-1], self._outputs)
        pads = self._pads(words.shape[1:-1])
        rows = self._gather(np.pad(words, [(0, 0), *pads, (0, 0)]))
        sizes = rows.shape[:-1]
        length = self._channels * len(self._tap_sums)
        flat = rows.reshape(-1, rows.shape[-1])
        sums = binary_matmul(flat, self._kernel, length, self._threads)
        sums = sums.reshape(*sizes, self._outputs)
        if any(sum(pad) for pad in pads):
            sums += self._correction(words.shape[1:-1], pads)
        return sums

    def _pads(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        if not self._same:
            return [(0, 0)] * len(sizes)
        pads = []
        for size, reach, stride in zip(sizes, self._reach(), self._strides, strict=True):
            missing = max(0, (-(-size // stride) - 1) * stride + reach - size)
            pads.append((missing // 2, missing - missing // 2))
        return pads

    def _reach(self) -> list[int]:
        return [(k - 1) * d + 1 for k, d in zip(self._window, self._dilation, strict=True)]

    def _gather(self, padded: Array) -> Array:
        """Returns [batch, ..., taps * words] of [batch, ..., words]: what lies under the window."""
        rank = len(self._window)
        axes = tuple(range(1, 1 + rank))
        views = np.lib.stride_tricks.sliding_window_view(padded, self._reach(), axis=axes)
        steps = tuple(slice(None, None, s) for s in self._strides)
        taps = tuple(slice(None, None, d) for d in self._dilation)
        index = (slice(None), *steps, slice(None), *taps)
        # [batch, ..., words, taps...]: the words of a tap belong together.
        ordered = np.moveaxis(views[index], 1 + rank, -1)
        return ordered.reshape(*ordered.shape[: 1 + rank], -1)

    def _correction(self, sizes: tuple[int, ...], pads: list[tuple[int, int]]) -> Array:
        """Returns, for each place of the output, the sum of the weights that meet padding."""
        if sizes not in self._corrections:
            outside = np.pad(np.zeros(sizes, np.int32), pads, constant_values=1)
            met = self._gather(outside[np.newaxis, ..., np.newaxis])
            self._corrections[sizes] = met @ self._tap_sums
        return self._corrections[sizes]

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns [batch, ..., outputs]."""
        if not self._window:
            return (*input_shape[:-1], self._outputs)
        sizes: list[int | None] = []
        for size, reach, stride in zip(
            input_shape[1:-1], self._reach(), self._strides, strict=True
        ):
            covered = None if size is None else size - (0 if self._same else reach - 1)
            sizes.append(None if covered is None else -(-covered // stride))
        return (input_shape[0], *sizes, self._outputs)


class PackedNetwork:
    """A low-bit model whose binary layers compute in 64-bit words on the CPU, the rest in Keras.

    A layer is packed if its weights are binary and its inputs are signs: dense layers and
    convolutions of `low_bit(model, "xnor")` or "binary_net" (channels last, without groups). Their
    integers are exact; with "binary_net" outputs equal Keras's to the last bit, with scales within
    the rounding of float32, where Keras adds scaled signs.

    Args:
        model: what `low_bit` made, trained, not stripped; not changed.
        threads: over which the rows of a product are divided.

    Raises:
        TypeError: the model is subclassed, or is no model.
        ValueError: no layer has binary weights and inputs, or `threads` is less than 1.

    Attributes:
        layers: the packed layers, by name.
    """

    def __init__(self, model: keras.Model, *, threads: int = 1) -> None:
        check_model(model, "PackedNetwork")
        if threads < 1:
            raise ValueError(f"threads must be at least 1, but got {threads!r}.")
        signed = _layers_on_signs(model)
        self.layers: dict[str, PackedLayer] = {}

        def replacement(layer: Any) -> keras.layers.Layer | None:
            if not isinstance(layer, TransformedLayer):
                return None
            plain = bake_layer(layer)
            levels = levels_of(layer) if id(layer) in signed else None
            if levels is None or not np.all(levels.codes):
                return plain
            packed = PackedLayer(plain, levels, threads)
            self.layers[layer.name] = packed
            return packed

        self._model = map_layers(model, replacement)
        if not self.layers:
            raise ValueError(
                f"PackedNetwork needs layers of binary weights that read signs, but {model.name!r} "
                f"has none ({len(transformed_layers(model))} layers are transformed). "
                "Give what low_bit(model, 'xnor') or low_bit(model, 'binary_net') returned."
            )

    @property
    def kernel_bytes(self) -> int:
        """Size of the packed kernels in memory."""
        return sum(layer.kernel_bytes for layer in self.layers.values())

    @property
    def float_kernel_bytes(self) -> int:
        """Size of the same kernels in float32."""
        return sum(layer.float_kernel_bytes for layer in self.layers.values())

    def predict(self, x: Any, batch_size: int = 32) -> Any:
        """Returns the outputs for samples, in inference.

        Args:
            x: [samples, ...] array, or a list of one for each input of the model.
            batch_size: how many samples at once.

        Returns:
            An array, or a list of one for each output.
        """
        tensors = Graph.read(self._model).inputs
        arrays = [np.asarray(part) for part in keras.tree.flatten(x)]
        batches = []
        for start in range(0, len(arrays[0]), batch_size):
            values = [
                keras.ops.convert_to_tensor(array[start : start + batch_size], tensor.dtype)
                for array, tensor in zip(arrays, tensors, strict=True)
            ]
            batches.append([keras.ops.convert_to_numpy(end) for end in self._run(values)])
        ends = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
        return ends[0] if len(ends) == 1 else ends

    def _run(self, values: list[Any]) -> list[Any]:
        ends: list[Any] = []

        def steps() -> Iterator[Visit]:
            ends.extend((yield from walk(self._model, values, _call)))

        for _ in steps():
            pass
        return ends


def _call(operation: Any, *args: Any, **kwargs: Any) -> Any:
    layer = isinstance(operation, keras.layers.Layer)
    if layer and keras_private.takes_training(operation):
        kwargs["training"] = False
    return operation(*args, **kwargs)


def _layers_on_signs(model: keras.Model) -> set[int]:
    """Returns the ids of transformed layers that can be packed, and read signs in every call."""
    found: set[int] = set()
    other: set[int] = set()
    for graph in read_graphs(model):
        for node in graph.nodes:
            if not isinstance(node.layer, TransformedLayer):
                continue
            before = graph.producer(node.inputs[0]).operation
            good = isinstance(before, Binarize) and _can_be_packed(node.layer.layer)
            (found if good else other).add(id(node.layer))
    return found - other


def _can_be_packed(layer: Any) -> bool:
    if isinstance(layer, keras.layers.Dense):
        return True
    return (
        isinstance(layer, _CONVOLUTIONS)
        and layer.data_format == "channels_last"
        and layer.groups == 1
        and layer.padding in ("valid", "same")
    )
