"""Silence for native libraries, which write past Python's own streams."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

_LOCK = threading.RLock()


@contextlib.contextmanager
def silence_native_output() -> Iterator[None]:
    """Sends what C and C++ code writes to standard output and error to nowhere, inside the block.

    File descriptors 1 and 2 are redirected, so everything that the process prints meanwhile is
    lost, other threads' lines too: keep the block short. Errors pass as usual. Blocks may nest.
    """
    with _LOCK, contextlib.ExitStack() as stack:
        # What Python has buffered is not native output and must not get lost.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError, OSError):
                stream.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, nowhere)
        for descriptor in (1, 2):
            try:
                kept = os.dup(descriptor)
            except OSError:  # a daemon may have closed it
                continue
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, descriptor)
            os.dup2(nowhere, descriptor)
        yield
