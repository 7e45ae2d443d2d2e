"""Quiet while TensorFlow converts."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

from tfaccel.core.quiet import silence_native_output


@contextlib.contextmanager
def quiet_tensorflow(*, verbose: bool) -> Iterator[None]:
    """Keeps what TensorFlow and its converter print from the terminal, unless `verbose`."""
    if verbose:
        yield
        return
    loggers = [logging.getLogger(name) for name in ("tensorflow", "absl")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), silence_native_output():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
