import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfaccel.measurement.einsum_macs import macs_of_einsum, macs_of_tensordot


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("ab,bc->ac", [(2, 3), (3, 4)], 24),
        ("ab, bc", [(2, 3), (3, 4)], 24),
        ("...x,xy->...y", [(2, 3, 5), (5, 4)], 2 * 3 * 5 * 4),
        ("a...b,b...c->a...c", [(2, 7, 3), (3, 1, 4)], 2 * 7 * 3 * 4),
        ("abcd,aecd->acbe", [(2, 5, 3, 4), (2, 6, 3, 4)], 2 * 5 * 3 * 4 * 6),
        ("ab->ba", [(2, 3)], 0),
    ],
)
def test_einsum_by_hand(equation, shapes, macs):
    assert macs_of_einsum(equation, shapes) == macs


@given(st.integers(0, 3), st.lists(st.integers(1, 4), min_size=3, max_size=3))
def test_tensordot_is_a_product_of_matrices(contracted, sizes):
    left, right = (2, *sizes), (*sizes[3 - contracted :], 5)
    output = np.tensordot(np.ones(left), np.ones(right), contracted).shape
    # NumPy multiplies [rows, inner] by [inner, columns].
    inner = int(np.prod(sizes[3 - contracted :]))
    rows = int(np.prod(left)) // inner
    assert macs_of_tensordot(contracted, left, output) == rows * inner * 5
    listed = [list(range(4 - contracted, 4)), list(range(contracted))]
    assert macs_of_tensordot(listed, left, output) == rows * inner * 5


def test_tensordot_with_one_pair_of_axes():
    assert macs_of_tensordot([1, 0], (2, 3), (2, 4)) == 24
