import os
from pathlib import Path

import pytest

from tfaccel.core.quiet import silence_native_output


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_written_to_the_descriptors_is_seen(capfd):
    os.write(1, b"before\n")
    with silence_native_output():
        os.write(1, b"native out\n")
        os.write(2, b"native error\n")
        with silence_native_output():
            os.write(2, b"nested\n")
        os.write(2, b"still silent\n")
    os.write(2, b"after\n")
    seen = capfd.readouterr()
    assert (seen.out, seen.err) == ("before\n", "after\n")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_descriptors_come_back_and_none_leaks_when_the_block_raises(capfd):
    before = open_descriptors()
    with pytest.raises(KeyError), silence_native_output():
        raise KeyError
    assert open_descriptors() == before
    os.write(1, b"heard\n")
    assert capfd.readouterr().out == "heard\n"
