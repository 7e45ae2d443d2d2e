"""From a float .tflite file to a quantized one, where the Keras model is not at hand."""

import contextlib
import io
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tfaccel.core.artifacts import sha256, write_aside
from tfaccel.core.checks import check_file, check_in, check_positive
from tfaccel.core.quiet import silence_native_output
from tfaccel.export.auditing import audit
from tfaccel.export.conversion import Artifact
from tfaccel.export.samples import read_arrays
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.quantization.calibration import BINS, CALIBRATORS, Calibrator, Statistics

Array = npt.NDArray[Any]

SCHEMES = ("float16", "dynamic_int8", "int8", "int16x8", "int4", "int4_weight_only")
_STATIC = ("int8", "int16x8", "int4")
_KERNELS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_BATCH = 16  # samples whose extremes are taken together


def quantize_file(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    scheme: str = "int8",
    calibration_data: Any = None,
    *,
    calibrator: str | dict[str, Any] | Calibrator = "percentile",
    io_dtype: str = "float32",
    samples: int = 256,
    seed: int = 0,
) -> Artifact:
    """Quantizes a float .tflite file by ranges of our calibrators; AI Edge Quantizer writes it.

    For a Keras model, `tfaccel.quantization.quantize` does more: it corrects biases, rounds kernels
    by what they do, and can be looked at and trained on. Here kernels are rounded to the nearest.

    Args:
        source: the float file, with a signature, as the converter writes it.
        path: the file to write, ends in .tflite.
        scheme: "float16" (weights in half precision); "dynamic_int8" (weights in int8, values in
            float between layers); "int8"; "int16x8" (values in 16 bits, weights in 8); "int4"
            (as int8, kernels in 4 bits but for depthwise ones, the first and the last);
            "int4_weight_only" (weights in 4 bits, computed in float).
        calibration_data: for "int8", "int16x8" and "int4", samples of what the file takes: an array
            [samples, ...], for several inputs a list or a dict by name, or batches of these (a
            tf.data.Dataset). Never those that accuracy is measured on.
        calibrator: as for `quantize`, without "auto".
        io_dtype: of inputs and outputs: "float32", or "int8" ("int16" for "int16x8").
        samples: of the calibration data, a random choice of at most so many.
        seed: of the choice.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an argument does not fit, the file has integers already or no signature, samples
            are missing or do not fit, or AI Edge Quantizer refuses it.
    """
    file = check_file(source, "quantize_file", suffixes=(".tflite",))
    target = Path(path)
    check_in("scheme", scheme, SCHEMES)
    if target.suffix != ".tflite":
        raise ValueError(f"quantize_file() writes a .tflite file, but the path is {str(target)!r}.")
    _check_ends(scheme, io_dtype)
    ranges = CALIBRATORS.get(calibrator)
    check_positive("samples", samples)
    if (calibration_data is None) == (scheme in _STATIC):
        raise ValueError(
            f"{scheme} needs calibration_data=, some hundred samples of what the file takes."
            if scheme in _STATIC
            else f"{scheme} needs no calibration_data. Leave it out."
        )
    reader = _FloatFile(file)
    recipe = _recipe(scheme, io_dtype, reader)
    result = None
    if scheme in _STATIC:
        bits = 16 if scheme == "int16x8" else 8
        chosen = reader.choose(calibration_data, samples, seed)
        result = {
            name: _as_result(ranges.range_of(statistics, bits), rank)
            for name, rank, statistics in reader.observe(chosen)
        }
    content = _write(file, recipe, result)
    with write_aside(target) as aside:
        aside.write_bytes(content)
        TFLiteModel(aside)  # refuses a file that LiteRT does not open
        floats = audit(aside).float_tensors if scheme in _STATIC else ()
    return Artifact(
        path=target,
        scheme=scheme,
        io_dtype=io_dtype,
        size_bytes=target.stat().st_size,
        sha256=sha256(target),
        float_tensors=floats,
    )


def _check_ends(scheme: str, io_dtype: str) -> None:
    integers = {"int16x8": "int16", "int8": "int8", "int4": "int8"}
    check_in("io_dtype", io_dtype, ("float32", *([integers[scheme]] if scheme in integers else [])))


def _as_result(limits: tuple[float, float], rank: int) -> dict[str, Array]:
    """Returns a range as AI Edge Quantizer keeps it; zero is a value of each."""
    shape = (1,) * rank
    low, high = min(limits[0], 0.0), max(limits[1], 0.0)
    return {
        "min": np.full(shape, low, np.float32),
        "max": np.full(shape, high if high > low else low + 1.0, np.float32),
    }


class _FloatFile:
    """A float file whose values between layers can be looked at."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.tools import flatbuffer_utils

        self._path = path
        self._file = TFLiteModel(path, delegates=False)
        model = flatbuffer_utils.read_model(str(path))
        self._model, self._graph = model, model.subgraphs[0]
        if not model.signatureDefs:
            raise ValueError(
                f"{str(path)!r} has no signature, by which AI Edge Quantizer knows inputs and "
                "outputs. Export the model again with tfaccel.export.to_tflite."
            )
        if len(model.subgraphs) > 1:
            raise ValueError(
                f"{str(path)!r} has loops or branches, whose values cannot be looked at."
            )
        if any(
            t.quantization is not None
            and t.quantization.scale is not None
            and len(t.quantization.scale)
            for t in self._graph.tensors
        ):
            raise ValueError(
                f"{str(path)!r} holds quantized values already. Give the float32 file that it was "
                "made from."
            )

    def choose(self, data: Any, count: int, seed: int) -> list[Array]:
        """Returns a random choice of samples, an array for each input.

        Raises:
            ValueError: they do not fit the inputs.
        """
        names = [info.name for info in self._file.inputs]
        arrays = read_arrays(names, data, "calibration_data", count)
        wanted = [tuple(info.signature[1:]) for info in self._file.inputs]
        fits = len(arrays) == len(wanted) and all(
            array.ndim == len(shape) + 1
            and all(size in (-1, n) for size, n in zip(shape, array.shape[1:], strict=True))
            for array, shape in zip(arrays, wanted, strict=True)
        )
        lengths = {len(array) for array in arrays} if fits else set()
        if len(lengths) != 1 or lengths == {0}:
            raise ValueError(
                f"calibration_data must hold samples of the shapes {wanted}, the same number for "
                f"each, but got arrays of {[array.shape for array in arrays]}."
            )
        for array, name in zip(arrays, names, strict=True):
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"calibration_data holds a NaN or an infinity for {name!r}.")
        order = np.sort(np.random.default_rng(seed).permutation(lengths.pop())[:count])
        return [array[order] for array in arrays]

    def observe(self, samples: list[Array]) -> Iterator[tuple[str, int, Statistics]]:
        """Yields name, rank and statistics of every float value of the graph."""
        extremes: dict[int, list[tuple[float, float]]] = {}
        for values in self._batches(samples):
            for index, value in values.items():
                ends_of_batch = float(value.min()), float(value.max())
                extremes.setdefault(index, []).append(ends_of_batch)
        ends = {
            index: (min(low for low, _ in seen), max(high for _, high in seen))
            for index, seen in extremes.items()
        }
        counts = {index: np.zeros(BINS, np.int64) for index in ends}
        for values in self._batches(samples):
            for index, value in values.items():
                low, high = ends[index]
                if high > low:
                    counts[index] += np.histogram(value, BINS, (low, high))[0]
        for index, seen in extremes.items():
            tensor = self._graph.tensors[index]
            both = np.array(seen)
            spread = counts[index] if counts[index].any() else np.zeros(0, np.int64)
            statistics = Statistics(both[:, 0], both[:, 1], spread)
            yield tensor.name.decode(), len(tensor.shape), statistics

    def _batches(self, samples: list[Array]) -> Iterator[dict[int, Array]]:
        """Yields the values of all float tensors that are no constants, some samples at a time."""
        from ai_edge_litert import schema_py_generated as schema
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        with silence_native_output():
            interpreter = Interpreter(
                model_path=str(self._path),
                experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
                experimental_preserve_all_tensors=True,
            )
            interpreter.allocate_tensors()
        computed = [
            index
            for index, tensor in enumerate(self._graph.tensors)
            if tensor.type == schema.TensorType.FLOAT32
            and self._model.buffers[tensor.buffer].data is None
        ]
        portion = int(self._file.inputs[0].shape[0])
        batch = max(_BATCH // portion, 1) * portion
        for begin in range(0, len(samples[0]), batch):
            parts: dict[int, list[Array]] = {index: [] for index in computed}
            chunk = [array[begin : begin + batch] for array in samples]
            for start in range(0, len(chunk[0]), portion):
                for info, array in zip(self._file.inputs, chunk, strict=True):
                    piece = array[start : start + portion].astype(info.dtype)
                    # The file takes whole portions: samples of the last may be in it twice.
                    interpreter.set_tensor(
                        info.index, np.resize(piece, (portion, *piece.shape[1:]))
                    )
                interpreter.invoke()
                for index in computed:
                    parts[index].append(np.array(interpreter.get_tensor(index)))
            yield {
                index: np.stack(values)
                for index, values in parts.items()
                if values and values[0].size
            }

    def end_kernels(self) -> list[str]:
        """Returns the names of what the first and the last operator with a kernel give."""
        from ai_edge_litert import schema_py_generated as schema

        kinds = [getattr(schema.BuiltinOperator, name) for name in _KERNELS]
        found = [
            self._graph.tensors[operation.outputs[0]].name.decode()
            for operation in self._graph.operators
            if self._model.operatorCodes[operation.opcodeIndex].builtinCode in kinds
        ]
        return [*found[:1], *found[-1:]]


def _recipe(scheme: str, io_dtype: str, reader: _FloatFile) -> list[dict[str, Any]]:
    """Returns AI Edge Quantizer's recipe for a scheme."""
    from ai_edge_quantizer import qtyping, recipe
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.recipe_manager import RecipeManager

    names = qtyping.TFLOperationName
    if scheme == "dynamic_int8":
        return list(recipe.dynamic_wi8_afp32())
    if scheme == "int4_weight_only":
        return list(recipe.weight_only_wi4_afp32())
    manager = RecipeManager()
    if scheme == "float16":
        halves = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
        manager.add_quantization_config(
            ".*",
            names.ALL_SUPPORTED,
            qtyping.OpQuantizationConfig(
                weight_tensor_config=halves,
                compute_precision=qtyping.ComputePrecision.FLOAT,
                explicit_dequantize=True,
            ),
            algorithm_key=AlgorithmName.FLOAT_CASTING,
        )
        return list(manager.get_quantization_recipe())
    values = 16 if scheme == "int16x8" else 8
    manager.add_static_config(".*", names.ALL_SUPPORTED, values, 4 if scheme == "int4" else 8)
    if scheme == "int4":
        # It has no depthwise kernels of 4 bits, and would leave them in float.
        manager.add_static_config(".*", names.DEPTHWISE_CONV_2D, values, 8)
        for end in reader.end_kernels():
            for name in _KERNELS:
                manager.add_static_config(re.escape(end), getattr(names, name), values, 8)
    if io_dtype == "float32":
        for name in (names.INPUT, names.OUTPUT):
            manager.add_quantization_config(".*", name, algorithm_key=AlgorithmName.NO_QUANTIZE)
    return list(manager.get_quantization_recipe())


def _write(file: Path, recipe: list[dict[str, Any]], result: Any) -> bytes:
    from ai_edge_quantizer import quantizer

    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            silence_native_output(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of its own use of LiteRT
            tool = quantizer.Quantizer(str(file))
            tool.load_quantization_recipe(recipe)
            done = tool.quantize(result, enable_progress_report=False)
    except Exception as error:  # it raises whatever comes to it
        raise ValueError(f"AI Edge Quantizer refuses {str(file)!r}: {error}") from error
    return bytes(done.quantized_model or b"")
