"""How much memory a .tflite file needs while it runs."""

import os

from tfaccel.measurement.flatbuffer import TFLiteFile
from tfaccel.measurement.interpreter import TFLiteModel


def measure_peak_memory(path: str | os.PathLike[str]) -> int:
    """Returns the bytes that the activations and the kernels' scratch space take at their peak.

    TFLite lays these tensors into an arena in which tensors that never live at the same time share
    their place; the model's inputs live all the time. LiteRT does not tell the arena's size, so it
    is read from the addresses of the tensors: the number of bytes that any of them covers. The file
    runs on LiteRT's built-in kernels for it, because XNNPACK hides the tensors between its
    operators. Weights are not included, since they stay in the mapped file (but float16 weights
    are: these kernels widen them to float32 in the arena), nor are tensors in the body of a loop.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole .tflite file.
    """
    model = TFLiteModel(path, delegates=False)
    constants = TFLiteFile.read(path).constant_tensors()
    spans = []
    for details in model.tensor_details():
        if details["index"] in constants:
            continue
        view = model.view_tensor(details["index"])
        if view is not None and view.nbytes:
            begin = view.__array_interface__["data"][0]
            spans.append((begin, begin + view.nbytes))
    return covered(spans)


def covered(spans: list[tuple[int, int]]) -> int:
    """Returns how many places the half-open intervals cover together.

    >>> covered([(0, 4), (2, 6), (10, 11)])
    7
    """
    total = reached = 0
    for begin, end in sorted(spans):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total
