"""A .tflite file that runs: LiteRT's interpreter with floats in and floats out."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tfaccel.core.checks import check_file, check_positive
from tfaccel.core.quiet import silence_native_output

_IDENTIFIER = b"TFL3"  # bytes 4 to 7 of every .tflite file


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """An input or output of a .tflite file.

    Attributes:
        name: in the file's signature, or of the tensor where the file has no signature.
        shape: as the file has it, the batch dimension first.
        signature: the same with -1 for each size that is free.
        dtype: NumPy type.
        scale: of the quantization, real = scale * (integer - zero_point); 0 for floats.
        zero_point: of the quantization.
        index: the interpreter's number for it.
    """

    name: str
    shape: tuple[int, ...]
    signature: tuple[int, ...]
    dtype: np.dtype[Any]
    scale: float
    zero_point: int
    index: int

    @property
    def dynamic_batch(self) -> bool:
        """Whether the file allows any batch size."""
        return len(self.signature) > 0 and self.signature[0] == -1

    @property
    def quantized(self) -> bool:
        """Whether integers stand for real numbers here."""
        return self.scale > 0

    def quantize(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Returns what stands for real `values` here: rounded half away from zero, saturated."""
        if not self.quantized:
            return values.astype(self.dtype, copy=False)
        scaled = values.astype(np.float64) / self.scale
        limits = np.iinfo(self.dtype)
        rounded = np.trunc(scaled + np.copysign(0.5, scaled)) + self.zero_point
        return np.clip(rounded, limits.min, limits.max).astype(self.dtype)

    def dequantize(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Returns the real numbers (float32) that `values` of the tensor stand for."""
        if not self.quantized:
            return values
        # In float32, as TFLite's own Dequantize does it.
        steps = (values.astype(np.int32) - self.zero_point).astype(np.float32)
        return np.float32(self.scale) * steps


class TFLiteModel:
    """A .tflite file, ready to run on the CPU. It prints nothing.

    Args:
        path: the file.
        threads: how many threads may work on one call.
        delegates: whether LiteRT's default delegate (XNNPACK) may be used, as it is by default.

    Attributes:
        path: the file.
        threads: as given.
        inputs: what goes in, in the file's order.
        outputs: what comes out, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, cut off, or no .tflite file, or it needs an operator that
            this LiteRT does not have.
    """

    def __init__(
        self, path: str | os.PathLike[str], threads: int = 1, *, delegates: bool = True
    ) -> None:
        check_positive("threads", threads)
        self.path = check_file(path, "TFLiteModel", suffixes=(".tflite",))
        self.threads = threads
        self._interpreter = self._open(delegates)
        names_in, names_out = self._signature_names()
        self.inputs = tuple(
            _describe(details, names_in) for details in self._interpreter.get_input_details()
        )
        self.outputs = tuple(
            _describe(details, names_out) for details in self._interpreter.get_output_details()
        )

    def _open(self, delegates: bool) -> Any:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        with self.path.open("rb") as file:
            head = file.read(8)
        if head[4:] != _IDENTIFIER:
            raise ValueError(
                f"{str(self.path)!r} is not a .tflite file: it lacks the mark "
                f"{_IDENTIFIER.decode()!r} at its beginning. Export the model again."
            )
        resolver = (
            OpResolverType.AUTO if delegates else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        )
        try:
            with silence_native_output():
                interpreter = Interpreter(
                    model_path=str(self.path),
                    num_threads=self.threads,
                    experimental_op_resolver_type=resolver,
                )
                interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"LiteRT cannot run {str(self.path)!r}: {_first_line(error)}. The file may be cut "
                "off or need an operator that is not built in. Export the model again."
            ) from error
        return interpreter

    def _signature_names(self) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
        if not self._interpreter.get_signature_list():
            return {}, {}
        with silence_native_output():
            runner = self._interpreter.get_signature_runner(
                next(iter(self._interpreter.get_signature_list()))
            )
            details = runner.get_input_details(), runner.get_output_details()
        return _by_index(details[0]), _by_index(details[1])

    def predict(self, x: Any) -> Any:
        """Runs the model on samples of any number.

        Quantized inputs take real numbers, and quantized outputs give them: both are converted by
        the file's own scale and zero point. A batch runs at once where the file allows any batch
        size, else in portions of the file's own.

        Args:
            x: array [batch, ...]; for several inputs a list in the order of `inputs`, or a dict by
                name.

        Returns:
            Array [batch, ...]; a list in the order of `outputs` where there are several.

        Raises:
            ValueError: the samples do not have the shape that the file takes, there are none, or
                the inputs do not agree in number.
        """
        arrays = self._arrays(x)
        batch = len(arrays[0])
        if all(info.dynamic_batch for info in self.inputs):
            outputs = [self._run(arrays)]
        else:
            outputs = self._run_in_portions(arrays, batch)
        results = [np.concatenate(parts)[:batch] for parts in zip(*outputs, strict=True)]
        return results if len(results) > 1 else results[0]

    def set_inputs(self, x: Any) -> None:
        """Sets one batch of samples for `invoke`, of the file's batch size if that is fixed."""
        self._set(self._arrays(x))

    def invoke(self) -> None:
        """Runs the model once on what `set_inputs` has set; its outputs stay in the interpreter."""
        self._interpreter.invoke()

    def tensor_details(self) -> list[dict[str, Any]]:
        """Returns LiteRT's description of every tensor: name, index, shape, dtype and more."""
        return list(self._interpreter.get_tensor_details())

    def view_tensor(self, index: int) -> npt.NDArray[Any] | None:
        """Returns a view of a tensor's memory, None if it has none. Drop it before `predict`."""
        try:
            return np.asarray(self._interpreter.tensor(index)())
        except (ValueError, RuntimeError):
            return None

    def _run(self, arrays: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        self._set(arrays)
        try:
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"LiteRT failed while running {str(self.path)!r}: {_first_line(error)}."
            ) from error
        return [info.dequantize(self._interpreter.get_tensor(info.index)) for info in self.outputs]

    def _run_in_portions(
        self, arrays: Sequence[npt.NDArray[Any]], batch: int
    ) -> list[list[npt.NDArray[Any]]]:
        portion = self.inputs[0].shape[0]
        outputs = []
        for begin in range(0, batch, portion):
            parts = [array[begin : begin + portion] for array in arrays]
            missing = portion - len(parts[0])
            if missing:
                parts = [np.concatenate([p, np.repeat(p[-1:], missing, axis=0)]) for p in parts]
            outputs.append(self._run(parts))
        return outputs

    def _set(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        current = self._interpreter.get_input_details()
        shapes = [tuple(details["shape"]) for details in current]
        if shapes != [array.shape for array in arrays]:
            with silence_native_output():
                for info, array in zip(self.inputs, arrays, strict=True):
                    self._interpreter.resize_tensor_input(info.index, array.shape)
                self._interpreter.allocate_tensors()
        for info, array in zip(self.inputs, arrays, strict=True):
            self._interpreter.set_tensor(info.index, info.quantize(array))

    def _arrays(self, x: Any) -> list[npt.NDArray[Any]]:
        given = self._ordered(x)
        arrays = [np.asarray(value) for value in given]
        for info, array in zip(self.inputs, arrays, strict=True):
            if not _fits(array.shape, info):
                raise ValueError(
                    f"{str(self.path)!r} takes {_shape(info)} as {info.name!r}, "
                    f"but got an array of shape {list(array.shape)}."
                )
        lengths = {len(array) for array in arrays}
        if len(lengths) > 1:
            raise ValueError(f"The inputs hold different numbers of samples: {sorted(lengths)}.")
        if lengths == {0}:
            raise ValueError("predict() needs one sample at least, but got none.")
        return arrays

    def _ordered(self, x: Any) -> list[Any]:
        names = [info.name for info in self.inputs]
        if isinstance(x, Mapping):
            if set(x) != set(names):
                raise ValueError(f"The inputs are {names}, but got {list(x)}.")
            return [x[name] for name in names]
        values = list(x) if isinstance(x, (list, tuple)) and len(names) > 1 else [x]
        if len(values) != len(names):
            raise ValueError(
                f"{str(self.path)!r} has {len(names)} inputs, {names}, but got {len(values)}."
            )
        return values


def _by_index(kind: Mapping[str, Mapping[str, Any]]) -> dict[int, list[str]]:
    """Returns the names of each tensor: one that is two outputs at once has two."""
    names: dict[int, list[str]] = {}
    for name, details in kind.items():
        names.setdefault(details["index"], []).append(name)
    return names


def _describe(details: Mapping[str, Any], names: Mapping[int, list[str]]) -> TensorInfo:
    own = names.get(details["index"])
    scale, zero_point = details["quantization"]
    shape = tuple(int(n) for n in details["shape"])
    signature = tuple(int(n) for n in details["shape_signature"])
    return TensorInfo(
        name=own.pop(0) if own else details["name"],
        shape=shape,
        # A file without free sizes may leave its signature out.
        signature=signature if len(signature) == len(shape) else shape,
        dtype=np.dtype(details["dtype"]),
        scale=float(scale),
        zero_point=int(zero_point),
        index=int(details["index"]),
    )


def _fits(shape: tuple[int, ...], info: TensorInfo) -> bool:
    return len(shape) == len(info.signature) > 0 and all(
        size in (-1, given) for size, given in zip(info.signature[1:], shape[1:], strict=True)
    )


def _shape(info: TensorInfo) -> str:
    sizes = ["any" if size == -1 else str(size) for size in info.signature[1:]]
    return "[" + ", ".join(["batch", *sizes]) + "]"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
