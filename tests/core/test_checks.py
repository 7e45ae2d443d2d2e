"""One wording for every argument error."""

import pytest

from tfaccel.core import checks


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: checks.check_type("size", "3", int), TypeError, "size must be int, but got '3'"),
        (lambda: checks.check_type("x", 1, (str, list)), TypeError, "x must be str or list"),
        (lambda: checks.check_in("mode", "c", ("a", "b")), ValueError, "one of 'a', 'b', but got"),
        (lambda: checks.check_positive("n", 0), ValueError, "n must be above 0, but got 0"),
        (lambda: checks.check_positive("n", True), TypeError, "n must be a number, but got True"),
        (lambda: checks.check_positive("n", float("nan")), ValueError, "n must be above 0"),
        (lambda: checks.check_fraction("f", 1), ValueError, r"fraction in \[0, 1\), but got 1"),
        (lambda: checks.check_fraction("f", -0.1, closed_right=True), ValueError, r"\[0, 1\]"),
        (lambda: checks.check_fraction("f", "half"), TypeError, "f must be a number"),
    ],
)
def test_errors_say_given_and_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_fits_passes(tmp_path):
    checks.check_type("size", 3, int)
    checks.check_in("mode", "a", ("a", "b"))
    checks.check_positive("n", 0.1)
    checks.check_fraction("f", 0)
    checks.check_fraction("f", 1, closed_right=True)
    (tmp_path / "a.txt").write_text("x")
    assert checks.check_file(tmp_path / "a.txt", "read", (".txt",)) == tmp_path / "a.txt"
