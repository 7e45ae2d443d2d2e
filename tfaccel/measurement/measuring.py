"""All figures of a model in one record."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core import keras_private
from tfaccel.core.artifacts import load_model, save_model
from tfaccel.core.checks import check_file, check_model, check_positive
from tfaccel.core.stripping import bake_weights
from tfaccel.measurement.accuracy import measure_accuracy
from tfaccel.measurement.counting import count
from tfaccel.measurement.devices import describe_device
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.measurement.latency import measure_latency
from tfaccel.measurement.memory import measure_peak_memory
from tfaccel.measurement.records import Latency, Measurement
from tfaccel.measurement.sizes import measure_gzip_size, measure_sparsity


def measure(
    model_or_path: keras.Model | str | os.PathLike[str],
    data: Any = None,
    *,
    threads: int = 1,
    runs: int = 100,
    warmup: int = 5,
    min_seconds: float = 0.0,
    name: str | None = None,
) -> Measurement:
    """Measures a model: accuracy, size, latency, memory, parameters, MACs, sparsity.

    A .tflite file is timed on 1 thread and, if `threads` is more, on `threads` too. A Keras model
    is timed through `predict_on_batch` on as many threads as its backend takes; its size is that of
    a .keras file without optimizer. Latencies are of one sample (of one call, if a file has a
    larger batch built in).

    Args:
        model_or_path: a .tflite or .keras file, or a built Functional or Sequential model, which is
            not changed.
        data: held-out samples, (x, y) arrays or a tf.data.Dataset of (x, y) batches. Without them
            no accuracy is measured, and a random sample is timed.
        threads: how many threads are timed beside one.
        runs: timed calls.
        warmup: calls made before, not timed.
        min_seconds: goes on beyond `runs` until so much time is in the timed calls.
        name: what the record calls the model; by default the file's or the model's.

    Returns:
        One record; figures that do not apply are None.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the model is subclassed, or is no model, or `data` is of another kind.
        ValueError: the model is not built, the file is damaged or of another kind, the data set is
            empty, or labels do not fit.
    """
    check_positive("threads", threads)
    check_positive("runs", runs)
    timing = {"runs": runs, "warmup": warmup, "min_seconds": min_seconds}
    if isinstance(model_or_path, (str, os.PathLike)):
        file = check_file(model_or_path, "measure", suffixes=(".keras", ".tflite"))
        if file.suffix == ".tflite":
            return _measure_tflite(file, data, threads, timing, name or file.stem)
        return _measure_keras(load_model(file), file, data, threads, timing, name or file.stem)
    check_model(model_or_path, "measure")
    # A copy runs, so that the given model is left without a predict function of ours.
    model = bake_weights(model_or_path)
    with tempfile.TemporaryDirectory() as folder:
        file = save_model(model, Path(folder) / "model.keras")
        return _measure_keras(model, file, data, threads, timing, name or model.name)


def _measure_tflite(
    file: Path, data: Any, threads: int, timing: dict[str, Any], name: str
) -> Measurement:
    model = TFLiteModel(file, threads)
    accuracy, samples, sample = _accuracy(model.predict, data)
    if sample is None:
        random = [_random(info.shape[1:], info.dtype, info.quantized) for info in model.inputs]
        sample = random if len(random) > 1 else random[0]
    single = _time_tflite(file, sample, 1, timing)
    several = _time_tflite(file, sample, threads, timing) if threads > 1 else None
    counts = count(file)
    return Measurement(
        name=name,
        format="tflite",
        parameters=counts.parameters,
        macs=counts.macs,
        sparsity=measure_sparsity(file),
        size_bytes=file.stat().st_size,
        gzip_bytes=measure_gzip_size(file),
        latency_ms=single.median_ms,
        latency_p95_ms=single.p95_ms,
        latency_threads_ms=several.median_ms if several else None,
        threads=threads,
        peak_memory_bytes=measure_peak_memory(file),
        accuracy=accuracy,
        samples=samples,
        device=describe_device(),
    )


def _measure_keras(
    model: keras.Model,
    file: Path,
    data: Any,
    threads: int,
    timing: dict[str, Any],
    name: str,
) -> Measurement:
    check_model(model, "measure")
    accuracy, samples, sample = _accuracy(model.predict_on_batch, data)
    if sample is None:
        sample = _random_inputs(model)
    latency = None
    if sample is not None:
        latency = measure_latency(lambda: model.predict_on_batch(sample), **timing)
    counts = count(model, input_shape=_sample_shapes(sample))
    return Measurement(
        name=name,
        format="keras",
        parameters=counts.parameters,
        macs=counts.macs,
        sparsity=measure_sparsity(model),
        size_bytes=file.stat().st_size,
        gzip_bytes=measure_gzip_size(file),
        latency_ms=latency.median_ms if latency else None,
        latency_p95_ms=latency.p95_ms if latency else None,
        latency_threads_ms=None,
        threads=threads,
        peak_memory_bytes=None,
        accuracy=accuracy,
        samples=samples,
        device=describe_device(),
    )


def _time_tflite(file: Path, sample: Any, threads: int, timing: dict[str, Any]) -> Latency:
    model = TFLiteModel(file, threads)
    batch = 1 if model.inputs[0].dynamic_batch else model.inputs[0].shape[0]
    model.set_inputs(keras.tree.map_structure(lambda x: np.repeat(x, batch, axis=0), sample))
    return measure_latency(model.invoke, **timing)


def _accuracy(predict: Callable[[Any], Any], data: Any) -> tuple[float | None, int | None, Any]:
    """Returns accuracy, number of samples and the first sample, in one pass over the data."""
    if data is None:
        return None, None, None
    first: list[Any] = []

    def predict_and_keep(x: Any) -> Any:
        if not first:
            first.append(keras.tree.map_structure(lambda array: array[:1], x))
        return predict(x)

    accuracy, samples = measure_accuracy(predict_and_keep, data)
    return accuracy, samples, first[0]


def _random_inputs(model: keras.Model) -> Any:
    """Returns one random sample in the structure of the model's inputs; None if a size is open."""
    if any(size is None for tensor in model.inputs for size in tensor.shape[1:]):
        return None
    batch = model.inputs[0].shape[0] or 1
    return keras.tree.map_structure(
        lambda tensor: _random(tuple(tensor.shape[1:]), tensor.dtype, False, batch),
        keras_private.functional_of(model).input,
    )


def _random(
    shape: tuple[int, ...], dtype: Any, quantized: bool, batch: int = 1
) -> npt.NDArray[Any]:
    # Zeros would do for time, were it not for the kernels that skip them.
    if quantized or keras.backend.is_float_dtype(str(dtype)):
        values = np.random.default_rng(0).random((batch, *shape), np.float32)
        return values if quantized else values.astype(dtype)
    return np.zeros((batch, *shape), dtype)


def _sample_shapes(sample: Any) -> list[tuple[int, ...]] | None:
    if sample is None:
        return None
    return [tuple(array.shape[1:]) for array in keras.tree.flatten(sample)]
