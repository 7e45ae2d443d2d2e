"""The terminal of the tfaccel command. Nothing heavy is imported here: it comes before all else."""

import faulthandler
import logging
import os
import sys


def silence_tensorflow() -> None:
    """Keeps the terminal to this program; set TF_CPP_MIN_LOG_LEVEL yourself to hear TensorFlow.

    Its libraries write to file descriptor 2 while they are loaded, whatever the environment says.
    So that descriptor leads nowhere, and Python's stderr goes on under another number.
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    try:
        kept = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        sys.stderr = os.fdopen(kept, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
        os.dup2(nowhere, 2)
        os.close(nowhere)
    except OSError:  # stderr is closed: there is nothing to keep quiet
        return
    faulthandler.enable(sys.stderr)
