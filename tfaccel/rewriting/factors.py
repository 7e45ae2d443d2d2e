"""The ways to write a layer as a product of smaller ones: what each costs and looks like."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from tfaccel.rewriting.calls import LayerCall, sides_of
from tfaccel.rewriting.chains import ChainBuilder
from tfaccel.rewriting.decomposition import Array, Svd, Tucker2, whitening

_UNKNOWN = 64  # stands for a size that the model leaves open, where only ratios matter


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What the cost of a layer depends on.

    Attributes:
        kernel_size: sides of the kernel; () for a dense layer.
        channels: input channels.
        filters: output channels.
        places_in: input positions of one sample, over all calls.
        places_middle: positions once the kernel has moved along the first axis only.
        places_out: output positions.
        known: whether the model says all sizes.
    """

    kernel_size: tuple[int, ...]
    channels: int
    filters: int
    places_in: int
    places_middle: int
    places_out: int
    known: bool

    @classmethod
    def of(cls, layer: Any, calls: Sequence[LayerCall], batch: int) -> "Geometry":
        """Reads the geometry of a Dense or Conv layer off its calls."""
        *taps, channels, filters = layer.kernel.shape
        places = np.zeros(3, np.int64)
        for call in calls:
            shape = (1, *(size or _UNKNOWN for size in call.inputs[1:]))
            if isinstance(layer, layers.Dense):
                places += prod(shape[:-1]) * (call.inputs[0] or 1) // batch
                continue
            sides: Any = sides_of(layer, shape)
            out: Any = sides_of(layer, layer.compute_output_shape(shape))
            counts = [prod(sides), prod((*out[:1], *sides[1:])), prod(out)]
            places += np.array(counts) * (call.inputs[0] or 1) // batch
        known = all(None not in call.inputs for call in calls)
        before, middle, after = (int(count) for count in places)
        return cls(tuple(taps), channels, filters, before, middle, after, known)

    @property
    def taps(self) -> int:
        """Positions in the kernel."""
        return prod(self.kernel_size)

    @property
    def macs(self) -> int:
        """MACs of the layer as it is."""
        return self.places_out * self.taps * self.channels * self.filters

    def counting_weights(self) -> "Geometry":
        """Returns the geometry at which each weight is used once: MACs are then weights."""
        return dataclasses.replace(self, places_in=1, places_middle=1, places_out=1)


class Method(abc.ABC):
    """One way to factorize a kernel."""

    name: str

    @abc.abstractmethod
    def takes(self, layer: Any) -> bool:
        """Whether it is for this layer."""

    @abc.abstractmethod
    def decompose(self, kernel: Array) -> Any:
        """Decomposes a kernel [*kernel size, input channels, output channels]."""

    @abc.abstractmethod
    def macs(self, geometry: Geometry) -> npt.NDArray[np.int64]:
        """Returns what each rank, or pair of ranks, costs; rank 1 first."""

    @abc.abstractmethod
    def build(self, builder: ChainBuilder, factors: Sequence[Array], bias: Array | None) -> None:
        """Adds the layers of the chain; `factors` are those of the truncated decomposition."""

    @abc.abstractmethod
    def product(self, factors: Sequence[Array], kernel_shape: tuple[int, ...]) -> Array:
        """Returns the kernel that the chain stands for."""

    @abc.abstractmethod
    def rows(self, patches: Array, kernel_size: tuple[int, ...]) -> Array:
        """Returns what the first factor multiplies: [groups, samples, inputs of the factor].

        Args:
            patches: [samples, positions in the kernel, channels].
            kernel_size: sides of the kernel.
        """

    def whiten(self, kernel: Array, root: Array) -> Array:
        """Returns the kernel with `root` applied to what the first factor multiplies."""
        return np.matmul(root, kernel)


class _TruncatedSvd(Method):
    """W [inputs, outputs] as [inputs, r] times [r, outputs], for Dense and 1x1 convolutions."""

    name = "svd"

    def takes(self, layer: Any) -> bool:
        return prod(layer.kernel.shape[:-2]) == 1

    def decompose(self, kernel: Array) -> Svd:
        return Svd.of(kernel.reshape(kernel.shape[-2:]))

    def macs(self, geometry: Geometry) -> npt.NDArray[np.int64]:
        ranks = np.arange(1, min(geometry.channels, geometry.filters) + 1)
        return ranks * geometry.places_out * (geometry.channels + geometry.filters)

    def build(self, builder: ChainBuilder, factors: Sequence[Array], bias: Array | None) -> None:
        left, right = (_pointwise(factor, builder) for factor in factors)
        builder.add("reduce", left)
        builder.end(right, bias, **({} if builder.dense else {"strides": 1, "padding": "valid"}))

    def product(self, factors: Sequence[Array], kernel_shape: tuple[int, ...]) -> Array:
        return (factors[0] @ factors[1]).reshape(kernel_shape)

    def rows(self, patches: Array, kernel_size: tuple[int, ...]) -> Array:  # noqa: ARG002
        return np.moveaxis(patches, 1, 0)


class _TuckerFactors(Method):
    """A kernel as 1x1 reduction, smaller kernel, 1x1 expansion (Kim et al. 2016).

    Where a rank is full, its 1x1 convolution would be the identity and is left out.
    """

    name = "tucker"

    def takes(self, layer: Any) -> bool:
        return prod(layer.kernel.shape[:-2]) > 1

    def decompose(self, kernel: Array) -> Tucker2:
        return Tucker2.of(kernel.reshape(-1, *kernel.shape[-2:]))

    def macs(self, geometry: Geometry) -> npt.NDArray[np.int64]:
        g = geometry
        r, s = np.ogrid[1 : g.channels + 1, 1 : g.filters + 1]
        reduce = np.where(r < g.channels, g.places_in * g.channels * r, 0)
        expand = np.where(s < g.filters, g.places_out * s * g.filters, 0)
        return reduce + g.places_out * g.taps * r * s + expand

    def build(self, builder: ChainBuilder, factors: Sequence[Array], bias: Array | None) -> None:
        first, core, last = factors
        size = builder.kernel_size
        core = core.reshape(*size, *core.shape[1:])
        lone: dict[str, Any] = {"kernel_size": 1, "strides": 1, "dilation_rate": 1}
        lone["padding"] = "valid"
        if first.shape[0] > first.shape[1]:
            builder.add("reduce", _pointwise(first, builder), **lone)
        if last.shape[0] == last.shape[1]:
            builder.end(core, bias)
            return
        builder.add("core", core)
        builder.end(_pointwise(last, builder), bias, **lone)

    def product(self, factors: Sequence[Array], kernel_shape: tuple[int, ...]) -> Array:
        first, core, last = factors
        return (np.matmul(first, core) @ last).reshape(kernel_shape)

    def rows(self, patches: Array, kernel_size: tuple[int, ...]) -> Array:  # noqa: ARG002
        return np.moveaxis(patches, 1, 0)


class _SpatialFactors(Method):
    """A kernel k x l as k x 1, then 1 x l (Jaderberg et al. 2014, scheme 2).

    The kernel is a matrix [k * input channels, l * output channels], of which the truncated SVD is
    the nearest of a rank, in closed form (Tai et al. 2016).
    """

    name = "spatial"

    def takes(self, layer: Any) -> bool:
        return type(layer) is layers.Conv2D and min(layer.kernel_size) > 1

    def decompose(self, kernel: Array) -> Svd:
        height, width, channels, filters = kernel.shape
        return Svd.of(kernel.transpose(0, 2, 1, 3).reshape(height * channels, width * filters))

    def macs(self, geometry: Geometry) -> npt.NDArray[np.int64]:
        g = geometry
        height, width = g.kernel_size
        ranks = np.arange(1, min(height * g.channels, width * g.filters) + 1)
        down, across = height * g.channels, width * g.filters
        return ranks * (g.places_middle * down + g.places_out * across)

    def build(self, builder: ChainBuilder, factors: Sequence[Array], bias: Array | None) -> None:
        down, across = factors
        height, width = builder.kernel_size
        rank = down.shape[1]
        layer = builder.layer
        builder.add(
            "vertical",
            down.reshape(height, 1, -1, rank),
            kernel_size=(height, 1),
            strides=(layer.strides[0], 1),
            dilation_rate=(layer.dilation_rate[0], 1),
        )
        builder.end(
            across.reshape(rank, width, -1).transpose(1, 0, 2)[np.newaxis],
            bias,
            kernel_size=(1, width),
            strides=(1, layer.strides[1]),
            dilation_rate=(1, layer.dilation_rate[1]),
        )

    def product(self, factors: Sequence[Array], kernel_shape: tuple[int, ...]) -> Array:
        height, width, channels, filters = kernel_shape
        matrix = factors[0] @ factors[1]
        return matrix.reshape(height, channels, width, filters).transpose(0, 2, 1, 3)

    def rows(self, patches: Array, kernel_size: tuple[int, ...]) -> Array:
        count, _, channels = patches.shape
        height, width = kernel_size
        columns = patches.reshape(count, height, width, channels).transpose(2, 0, 1, 3)
        return columns.reshape(width, count, height * channels)

    def whiten(self, kernel: Array, root: Array) -> Array:
        height, width, channels, filters = kernel.shape
        matrix = kernel.transpose(0, 2, 1, 3).reshape(height * channels, width * filters)
        turned = (root @ matrix).reshape(height, channels, width, filters)
        return turned.transpose(0, 2, 1, 3)


METHODS: Mapping[str, Method] = {
    method.name: method for method in (_TruncatedSvd(), _TuckerFactors(), _SpatialFactors())
}


class Moments:
    """Means and second moments of what a layer reads, gathered batch by batch.

    Args:
        layer: a Dense or Conv layer.
        methods: for which of them.
    """

    def __init__(self, layer: Any, methods: Sequence[Method]) -> None:
        self._size = tuple(layer.kernel.shape[:-2])
        self._centred = bool(layer.use_bias)
        self._count = 0
        self._sum: Any = 0.0
        self._sums: dict[str, Any] = {method.name: 0.0 for method in methods}
        self._first: dict[str, Any] = {method.name: 0.0 for method in methods}

    def add(self, patches: Array) -> None:
        """Adds patches [samples, positions in the kernel, channels]."""
        self._count += len(patches)
        self._sum += patches.sum(axis=0)
        for name in self._sums:
            rows = METHODS[name].rows(patches, self._size)
            self._sums[name] += np.tensordot(rows, rows, axes=((0, 1), (0, 1)))
            self._first[name] += rows.sum(axis=1)

    def second(self, name: str) -> Array:
        """Returns the second moments for a method, about the mean if the layer has a bias.

        A bias makes up for any change of the mean; without one the mean is an error like others.
        """
        moments = self._sums[name] / max(1, self._count)
        if self._centred and self._count:
            means = self._first[name] / self._count
            moments = moments - means.T @ means
        return np.asarray(moments)

    def bias_change(self, kernel_change: Array) -> Array:
        """Returns what to add to the bias so that the mean output stays: [output channels].

        Args:
            kernel_change: the old kernel less the new one.
        """
        mean = np.asarray(self._sum) / max(1, self._count)
        change = kernel_change.reshape(-1, *kernel_change.shape[-2:])
        return np.tensordot(mean, change, axes=((0, 1), (0, 1)))


class Factorable:
    """A layer that can be factorized, its decompositions made once and kept.

    Args:
        layer: a built Dense or Conv layer.
        geometry: of it.
        methods: the ways to try.
        moments: of its inputs, where the error on data counts and not that of the weights.
    """

    def __init__(
        self,
        layer: Any,
        geometry: Geometry,
        methods: Sequence[Method],
        moments: Moments | None = None,
    ) -> None:
        self.layer = layer
        self.geometry = geometry
        self._moments = moments
        self._kernel = np.asarray(keras.ops.convert_to_numpy(layer.kernel), np.float64)
        self._inverses: dict[str, Array] = {}
        self.decompositions: dict[str, Any] = {}
        for method in methods:
            kernel = self._kernel
            if moments is not None:
                root, self._inverses[method.name] = whitening(moments.second(method.name))
                kernel = method.whiten(kernel, root)
            self.decompositions[method.name] = method.decompose(kernel)

    def chain(
        self, name: str, ranks: Sequence[int], input_shape: Any, taken: set[str]
    ) -> list[keras.layers.Layer]:
        """Returns the layers that stand for this one, built and with weights.

        Args:
            name: of the method.
            ranks: of the factors.
            input_shape: of the layer's input, batch dimension included.
            taken: names that the new layers must not use; their names are added.
        """
        method = METHODS[name]
        first, *others = self.decompositions[name].truncate(*ranks)
        full_tucker = name == "tucker" and ranks[0] == self.geometry.channels
        if name in self._inverses:
            if full_tucker:
                # Nothing is reduced: the core itself goes back to the channels of the kernel.
                others[0] = np.matmul(self._inverses[name], others[0])
            else:
                first = self._inverses[name] @ first
        factors = [first, *others]
        bias = None
        if self.layer.use_bias:
            bias = np.asarray(keras.ops.convert_to_numpy(self.layer.bias), np.float64)
            if self._moments is not None:
                product = method.product(factors, self._kernel.shape)
                bias = bias + self._moments.bias_change(self._kernel - product)
        builder = ChainBuilder(self.layer, input_shape, taken)
        method.build(builder, factors, bias)
        return builder.chain


def _pointwise(matrix: Array, builder: ChainBuilder) -> Array:
    return matrix.reshape(*(1 for _ in builder.kernel_size), *matrix.shape)
