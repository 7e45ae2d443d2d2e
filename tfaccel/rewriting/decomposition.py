"""Low-rank decompositions of kernels: plain linear algebra in float64.

Each holds what a truncation at any rank needs, so that all ranks can be weighed before one is
taken. Energy is the share of the squared Frobenius norm that is kept, 0 to 1.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_SMALLEST_VARIANCE = 1e-6  # of the largest: directions that the data hardly show still count
_SETTLED = 1e-7


@dataclasses.dataclass(frozen=True)
class Svd:
    """The singular value decomposition of a matrix [inputs, outputs].

    Attributes:
        left: [inputs, full rank], orthonormal columns.
        values: [full rank], the singular values, largest first.
        right: [full rank, outputs], orthonormal rows.
    """

    left: Array
    values: Array
    right: Array

    @classmethod
    def of(cls, matrix: Array) -> "Svd":
        """Decomposes a matrix."""
        return cls(*np.linalg.svd(matrix, full_matrices=False))

    def energies(self) -> Array:
        """Returns the energy that each rank keeps, rank 1 first: [full rank]."""
        return _shares(np.cumsum(self.values**2))

    def truncate(self, rank: int) -> tuple[Array, Array]:
        """Returns the two factors of the nearest matrix of a rank (Eckart & Young 1936).

        The singular values are split evenly, so that both factors have the same norm.

        Returns:
            [inputs, rank] and [rank, outputs].
        """
        roots = np.sqrt(self.values[:rank])
        return self.left[:, :rank] * roots, roots[:, np.newaxis] * self.right[:rank]


@dataclasses.dataclass(frozen=True)
class Tucker2:
    """A convolution kernel in the bases of its input and of its output channels.

    The higher-order singular value decomposition of the last two modes (Tucker 1966; Kim et al.
    2016, Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
    Applications, eq. 6).

    Attributes:
        kernel: [positions, input channels, output channels].
        inputs: [input channels, input channels], orthonormal columns, most important first.
        outputs: [output channels, output channels], likewise.
    """

    kernel: Array
    inputs: Array
    outputs: Array

    @classmethod
    def of(cls, kernel: Array) -> "Tucker2":
        """Decomposes a kernel [positions, input channels, output channels]."""
        return cls(kernel, _input_basis(kernel), _output_basis(kernel))

    def energies(self) -> Array:
        """Returns the energy that each pair of ranks keeps: [input channels, output channels].

        The entry at [r - 1, s - 1] is of ranks r and s. `truncate` may keep more.
        """
        core = _rotated(self.kernel, self.inputs, self.outputs)
        return _shares(np.sum(core**2, axis=0).cumsum(axis=0).cumsum(axis=1))

    def truncate(
        self, input_rank: int, output_rank: int, iterations: int = 10
    ) -> tuple[Array, Array, Array]:
        """Returns the three factors at a pair of ranks.

        Args:
            input_rank: channels in front of the core.
            output_rank: channels behind the core.
            iterations: rounds of higher-order orthogonal iteration (De Lathauwer et al. 2000), each
                of which improves one basis given the other; 0 gives the truncated HOSVD.

        Returns:
            [input channels, r], [positions, r, s] and [s, output channels]. A rank that is full has
            the identity: the core is then in the channels of the kernel itself.
        """
        inputs, outputs = self.inputs[:, :input_rank], self.outputs[:, :output_rank]
        kept = -1.0
        for _ in range(iterations if self._reduces_both(input_rank, output_rank) else 0):
            inputs = _input_basis(self.kernel @ outputs)[:, :input_rank]
            outputs = _output_basis(_reduced(self.kernel, inputs))[:, :output_rank]
            now = float(np.sum(_rotated(self.kernel, inputs, outputs) ** 2))
            if now <= kept * (1 + _SETTLED):
                break
            kept = now
        if input_rank == len(self.inputs):
            inputs = np.eye(input_rank)
        if output_rank == len(self.outputs):
            outputs = np.eye(output_rank)
        return inputs, _rotated(self.kernel, inputs, outputs), outputs.T

    def _reduces_both(self, input_rank: int, output_rank: int) -> bool:
        # With one basis full, the other one is the best there is already.
        return input_rank < len(self.inputs) and output_rank < len(self.outputs)


def whitening(moments: Array) -> tuple[Array, Array]:
    """Returns the root of a matrix of second moments, and the inverse of the root.

    The squared error of a layer's outputs on its data is |root (W - W')|², so a decomposition of
    root W, with the inverse applied to its first factor, is the one of least output error (compare
    Zhang et al. 2015, Accelerating Very Deep Convolutional Networks, section 3.2).

    Args:
        moments: [inputs, inputs], the mean of x xᵀ, symmetric.

    Returns:
        Two symmetric matrices [inputs, inputs].
    """
    variances, basis = np.linalg.eigh(moments)
    largest = variances[-1]
    if not largest > 0:  # the data never reach this layer: all directions count the same
        return np.eye(len(moments)), np.eye(len(moments))
    roots = np.sqrt(np.maximum(variances, _SMALLEST_VARIANCE * largest))
    return (basis * roots) @ basis.T, (basis / roots) @ basis.T


def _input_basis(kernel: Array) -> Array:
    return _basis(np.tensordot(kernel, kernel, axes=((0, 2), (0, 2))))


def _output_basis(kernel: Array) -> Array:
    return _basis(np.tensordot(kernel, kernel, axes=((0, 1), (0, 1))))


def _basis(gram: Array) -> Array:
    # Singular vectors of an unfolding are eigenvectors of its small Gram matrix.
    return np.linalg.eigh(gram)[1][:, ::-1]


def _reduced(kernel: Array, inputs: Array) -> Array:
    return np.matmul(inputs.T, kernel)


def _rotated(kernel: Array, inputs: Array, outputs: Array) -> Array:
    return _reduced(kernel @ outputs, inputs)


def _shares(sums: Array) -> Array:
    total = sums.flat[-1]
    return sums / total if total > 0 else np.ones_like(sums)
