import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfaccel.rewriting.decomposition import Svd, Tucker2, whitening

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**16)


@given(rows=sizes, columns=sizes, seed=seeds)
def test_truncated_svd_drops_what_eckart_and_young_say(rows, columns, seed):
    matrix = np.random.default_rng(seed).normal(size=(rows, columns))
    dropped = np.linalg.svd(matrix, compute_uv=False)
    found = Svd.of(matrix)
    for rank in range(1, min(rows, columns) + 1):
        left, right = found.truncate(rank)
        assert left.shape == (rows, rank)
        assert right.shape == (rank, columns)
        error = np.linalg.norm(matrix - left @ right)
        np.testing.assert_allclose(error, np.linalg.norm(dropped[rank:]), atol=1e-10)
        kept = 1 - error**2 / np.sum(matrix**2)
        np.testing.assert_allclose(found.energies()[rank - 1], kept, atol=1e-10)
        # The weight is shared out evenly.
        np.testing.assert_allclose(np.linalg.norm(left), np.linalg.norm(right))


def rebuilt(factors):
    first, core, last = factors
    return np.einsum("cr,trs,sn->tcn", first, core, last)


@settings(max_examples=50)
@given(taps=sizes, channels=sizes, filters=sizes, data=st.data(), seed=seeds)
def test_tucker_energy_is_that_of_the_truncated_kernel(taps, channels, filters, data, seed):
    kernel = np.random.default_rng(seed).normal(size=(taps, channels, filters))
    ranks = data.draw(st.integers(1, channels)), data.draw(st.integers(1, filters))
    found = Tucker2.of(kernel)

    def error(iterations):
        return np.sum((kernel - rebuilt(found.truncate(*ranks, iterations))) ** 2)

    power = np.sum(kernel**2)
    energy = found.energies()[ranks[0] - 1, ranks[1] - 1]
    np.testing.assert_allclose(error(0) / power, 1 - energy, atol=1e-10)
    # Each round of higher-order orthogonal iteration is at least as near.
    assert error(1) <= error(0) + 1e-10
    assert error(10) <= error(1) + 1e-10
    # The bound of the HOSVD (De Lathauwer et al. 2000, property 10), by numpy's own SVD.
    unfolded = kernel.transpose(1, 0, 2).reshape(channels, -1), kernel.reshape(-1, filters)
    dropped = [
        np.sum(np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2)
        for matrix, rank in zip(unfolded, ranks, strict=True)
    ]
    assert max(dropped) - 1e-10 <= error(10) <= sum(dropped) + 1e-10


def test_iteration_is_strictly_nearer_than_truncation():
    kernel = np.random.default_rng(3).normal(size=(9, 12, 12))
    found = Tucker2.of(kernel)
    errors = [np.sum((kernel - rebuilt(found.truncate(3, 3, n))) ** 2) for n in (0, 10)]
    assert errors[1] < 0.995 * errors[0]


@pytest.mark.parametrize("ranks", [(5, 7), (5, 3), (2, 7)])
def test_full_rank_leaves_the_channels_as_they_are(ranks):
    kernel = np.random.default_rng(0).normal(size=(9, 5, 7))
    first, core, last = Tucker2.of(kernel).truncate(*ranks)
    if ranks[0] == 5:
        np.testing.assert_array_equal(first, np.eye(5))
    if ranks[1] == 7:
        np.testing.assert_array_equal(last, np.eye(7))
    if ranks == (5, 7):
        np.testing.assert_allclose(core, kernel, atol=1e-12)


def test_zero_kernel_keeps_all_of_nothing():
    assert Svd.of(np.zeros((3, 4))).energies().tolist() == [1.0, 1.0, 1.0]
    assert (Tucker2.of(np.zeros((9, 3, 4))).energies() == 1.0).all()


def test_whitened_svd_has_the_least_error_on_the_data():
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 8)) @ random.normal(size=(8, 8)) * np.logspace(0, -2, 8)
    matrix = random.normal(size=(8, 6))
    root, inverse = whitening(x.T @ x / len(x))
    left, right = Svd.of(root @ matrix).truncate(2)
    error = np.linalg.norm(x @ (matrix - inverse @ left @ right))
    # The best rank-2 outputs there are, by an SVD of the outputs themselves.
    best = np.linalg.norm(np.linalg.svd(x @ matrix, compute_uv=False)[2:])
    np.testing.assert_allclose(error, best, rtol=1e-3)
    plain_left, plain_right = Svd.of(matrix).truncate(2)
    assert error < 0.8 * np.linalg.norm(x @ (matrix - plain_left @ plain_right))


def test_whitening_of_no_activations_changes_nothing():
    for matrix in whitening(np.zeros((3, 3))):
        np.testing.assert_array_equal(matrix, np.eye(3))
