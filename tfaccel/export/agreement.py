"""Whether each operator of a file computes what the Keras model does, fed with the file's inputs.

In a deep network one rounding that falls the other way is many steps further on, so that outputs
alone do not tell a wrong operator from bad luck. Here the Keras model runs call by call, and
whatever it rounds is compared with the file's own value, which then takes its place: each operator
is judged by what it makes of the very integers that the runtime had.
"""

import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfaccel.core.graph import flat_layers
from tfaccel.core.walking import walk
from tfaccel.export.packing import pack, unpack
from tfaccel.export.samples import Array
from tfaccel.measurement.interpreter import TensorInfo, TFLiteModel
from tfaccel.quantization import Dequantize, FakeQuantize

_SAME_SCALE = 1e-4  # relative
_BEYOND = 1e-2  # of a step, for sums in float32
_SAMPLES = 4


@dataclasses.dataclass(frozen=True)
class OperatorAgreement:
    """How far an operator of a file is from Keras, given the file's own inputs.

    Attributes:
        name: of the Keras layer or operation whose output is rounded here.
        tensor: of the file.
        values: how many were compared.
        max_steps: the largest difference, in steps of the tensor's grid.
        share_beyond: share of values that are more than one step apart.
        from_float: whether a layer that stays in float made it. The converter may round inside
            such a layer, for which nothing was trained.
    """

    name: str
    tensor: str
    values: int
    max_steps: float
    share_beyond: float
    from_float: bool = False


def compare_operators(
    path: str | os.PathLike[str], model: keras.Model, samples: Sequence[Array] | None
) -> tuple[list[OperatorAgreement], list[str]]:
    """Compares what a file computes inside with what Keras makes of the same integers.

    Args:
        path: the file.
        model: as it was converted: in float32, with fixed ranges and weights baked.
        samples: one array per input, of which a few are used; by default some are drawn from the
            range that is trained.

    Returns:
        A row for each value that is rounded, and the names of those that the file does not hold,
        because the converter computes them in float or has left them out.
    """
    # A model of a fixed batch size takes no fewer.
    count = model.inputs[0].shape[0] or _SAMPLES
    given = draw_samples(model) if samples is None else [array[:count] for array in samples]
    found = _Comparison(_Probe(Path(path), given))
    for _ in walk(model, [keras.ops.convert_to_tensor(array) for array in given], found.call):
        pass
    return found.rows, found.missing


def draw_samples(model: keras.Model, seed: int = 0) -> list[Array]:
    """Returns random inputs that a model can take, floats within the first range that is known."""
    random = np.random.default_rng(seed)
    ranges = [layer.fixed_range for layer in flat_layers(model) if isinstance(layer, FakeQuantize)]
    low, high = next((r for r in ranges if r is not None), (-1.0, 1.0))
    samples = []
    for tensor in model.inputs:
        count = tensor.shape[0] or _SAMPLES
        shape = (count, *(n or 1 for n in tensor.shape[1:]))
        if "float" in tensor.dtype:
            samples.append(random.uniform(low, high, shape).astype("float32"))
        else:
            samples.append(np.zeros(shape, tensor.dtype))
    return samples


class _Probe:
    """A copy of a file that gives all of its integers out."""

    def __init__(self, path: Path, samples: Sequence[Array]) -> None:
        model = unpack(path.read_bytes())
        graph = model.subgraphs[0]
        computed = {int(t) for operator in graph.operators for t in operator.outputs}
        computed |= {int(t) for t in graph.inputs}
        shown = [t for t in sorted(computed) if _is_rounded(graph.tensors[t])]
        names = [graph.tensors[t].name.decode("utf-8", "replace") for t in shown]
        graph.outputs = np.asarray(shown, np.int32)
        model.signatureDefs = []
        with tempfile.TemporaryDirectory(prefix="tfaccel-") as folder:
            copy = Path(folder) / "probe.tflite"
            copy.write_bytes(pack(model))
            file = TFLiteModel(copy)
            values = _run(file, samples)
        self.tensors: list[tuple[str, TensorInfo, Array]] = list(
            zip(names, file.outputs, values, strict=True)
        )
        self.taken: set[int] = set()

    def find(self, layer: FakeQuantize, producer: str, ours: Array) -> int | None:
        """Returns which tensor a layer's output is; None if none has its grid and its shape."""
        shape = ours.shape
        low, high = layer.fixed_range or (0.0, 0.0)
        scale = (high - low) / (2**layer.bits - 1)
        fits = [
            number
            for number, (_, info, values) in enumerate(self.tensors)
            if abs(info.scale / scale - 1) < _SAME_SCALE
            and _zero(info) == round(-low / scale)
            and values.size == math.prod(shape)
        ]
        scope = re.compile(rf"/{re.escape(producer)}(_\d+)*/|^{re.escape(producer)}$")

        def strangeness(number: int) -> tuple[bool, bool, bool, float]:
            name, info, values = self.tensors[number]
            foreign = scope.search(name) is None
            other = _sizes(info.shape[1:]) != _sizes(shape[1:])
            # Of two that compute the same the converter keeps one. What a layer transposes at its
            # end has its name, its grid and its size, in another order. Operations without a layer
            # have names of the converter's own: then the values themselves must tell.
            apart = float(np.abs(values.reshape(shape) - ours).mean())
            return number in self.taken, other, foreign, apart

        # Of equal ones the first: what only reshapes it comes later.
        return min(fits, key=strangeness, default=None)


def _run(file: TFLiteModel, samples: Sequence[Array]) -> list[Array]:
    """Returns what a file gives for samples, [samples, values] each.

    A tensor inside may have several rows for a sample, so that rows do not tell samples apart.
    """
    count = len(samples[0])
    step = count if file.inputs[0].dynamic_batch else file.inputs[0].shape[0]
    parts: list[list[Array]] = []
    for begin in range(0, count, step):
        batch = [array[begin : begin + step] for array in samples]
        missing = step - len(batch[0])
        full = [np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]) for a in batch]
        file.set_inputs(full if len(full) > 1 else full[0])
        file.invoke()
        views = [file.view_tensor(info.index) for info in file.outputs]
        parts.append(
            [
                info.dequantize(np.array(view)).reshape(step, -1)[: step - missing]
                for info, view in zip(file.outputs, views, strict=True)
            ]
        )
        del views
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _is_rounded(tensor: Any) -> bool:
    scales = None if tensor.quantization is None else tensor.quantization.scale
    return scales is not None and len(scales) == 1


def _zero(info: TensorInfo) -> int:
    """Returns the zero point, counted from the lowest integer of the type."""
    return info.zero_point - int(np.iinfo(info.dtype).min)


def _sizes(shape: Sequence[int]) -> list[int]:
    return [int(n) for n in shape if n != 1]


class _Comparison:
    def __init__(self, probe: _Probe) -> None:
        self._probe = probe
        self._producers: dict[int, str] = {}
        self._kept: list[Any] = []  # so that no id is given twice
        self._floats: set[int] = set()  # ids of what comes behind an end of the integers
        self.rows: list[OperatorAgreement] = []
        self.missing: list[str] = []

    def call(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = operation(*args, **kwargs)
        if isinstance(operation, FakeQuantize):
            producer = self._producers.get(id(args[0]), "")
            return self._compare(
                operation, producer, outputs, from_float=id(args[0]) in self._floats
            )
        given = keras.tree.flatten((args, kwargs))
        in_float = isinstance(operation, Dequantize) or any(id(x) in self._floats for x in given)
        for value in keras.tree.flatten(outputs):
            self._producers[id(value)] = operation.name
            self._kept.append(value)
            if in_float:
                self._floats.add(id(value))
        return outputs

    def _compare(self, layer: FakeQuantize, producer: str, ours: Any, *, from_float: bool) -> Any:
        name = layer.name.removesuffix("_quantize")
        array = keras.ops.convert_to_numpy(ours).astype(np.float64)
        number = self._probe.find(layer, producer or name, array)
        if number is None:
            self.missing.append(name)
            return ours
        self._probe.taken.add(number)
        tensor, info, found = self._probe.tensors[number]
        found = found.reshape(ours.shape)
        apart = np.abs(array - found) / info.scale
        self.rows.append(
            OperatorAgreement(
                name=producer or name,
                tensor=tensor,
                values=int(apart.size),
                max_steps=float(apart.max()),
                share_beyond=float((apart > 1 + _BEYOND).mean()),
                from_float=from_float,
            )
        )
        return keras.ops.convert_to_tensor(found.astype("float32"))
