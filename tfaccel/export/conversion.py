"""From a Keras model to a .tflite file."""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfaccel.core.artifacts import load_model, sha256, write_aside
from tfaccel.core.checks import check_in, check_model, check_positive
from tfaccel.core.graph import flat_layers
from tfaccel.core.stripping import Strippable, bake_weights, strip
from tfaccel.export.diagnosis import explain
from tfaccel.export.freezing import quiet_tensorflow, save_frozen, to_float32
from tfaccel.export.metadata import with_metadata
from tfaccel.export.verification import Audit, Verification, audit, check_verified, verify
from tfaccel.quantization import SCHEMES, freeze_ranges, scheme_of
from tfaccel.rewriting import fold_batch_norm

IO_DTYPES = ("float32", "int8", "uint8")


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A .tflite file that was written.

    Attributes:
        path: the file.
        scheme: how its numbers are stored.
        io_dtype: type of its inputs and outputs, where they are quantized.
        size_bytes: of the file.
        sha256: of the file, in hexadecimal.
        float_tensors: for int8, the values inside that are still float: what quantization does not
            cover. Empty for a fully quantized file.
        verification: how far its outputs are from Keras's, if data was given.
    """

    path: Path
    scheme: str
    io_dtype: str
    size_bytes: int
    sha256: str
    float_tensors: tuple[str, ...] = ()
    verification: Verification | None = None


def to_tflite(
    model: keras.Model | str | os.PathLike[str],
    path: str | os.PathLike[str],
    scheme: str | None = None,
    *,
    io_dtype: str = "float32",
    representative_data: Any = None,
    verify_data: Any = None,
    labels: Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    batch_size: int | None = 1,
    verbose: bool = False,
) -> Artifact:
    """Writes a model as a .tflite file, for LiteRT on phones, boards and CPUs.

    Masks and quantized weights are baked in, batch norm is folded, layers in mixed precision
    compute in float32, and a quantization-aware model becomes integers by the ranges that it was
    trained with. The file appears whole or not at all, and nothing is printed.

    Args:
        model: a built Functional or Sequential model, plain or rewritten, or a .keras file.
        path: ends in .tflite.
        scheme: "float32"; "float16" (weights in half precision); "dynamic_int8" (weights in int8,
            activations in float); "int8" (all in int8: for a quantization-aware model, or with
            `representative_data`). By default the model's own: "int8" for a quantization-aware
            model, else "float32".
        io_dtype: type of inputs and outputs of an int8 file: "float32", "int8" or "uint8".
        representative_data: for "int8" of a plain model, samples to find ranges with: an array
            [samples, ...], a list of such for several inputs, or an iterable of batches (a
            tf.data.Dataset of x or (x, y)). At most 512 samples are used.
        verify_data: samples, likewise, to compare the file with Keras on before it is kept.
        labels: names of the classes, put inside the file.
        metadata: JSON-like facts to put inside the file (see `read_metadata`).
        batch_size: samples that the file takes at once; None for any number, which some delegates
            refuse.
        verbose: shows what the converter prints.

    Returns:
        What was written.

    Raises:
        TypeError: the model is subclassed.
        ValueError: the model is not built, an argument does not fit, a range was never trained, the
            converter refuses a layer (named, with a remedy), or the outputs are wrong.
    """
    source = model if isinstance(model, keras.Model) else load_model(model)
    check_model(source, "to_tflite")
    target = Path(path)
    chosen = _check_arguments(source, target, scheme, io_dtype, representative_data, batch_size)
    samples = None if verify_data is None else _sample_list(source, verify_data, "verify_data")
    ready = prepare(source)
    with quiet_tensorflow(verbose=verbose):
        content = _convert(ready, chosen, io_dtype, representative_data, batch_size)
    facts = {
        "scheme": chosen,
        "labels": None if labels is None else list(labels),
        "source_sha256": _weights_hash(source),
        "metadata": None if metadata is None else dict(metadata),
    }
    content = with_metadata(content, facts)
    verification, checked = None, Audit((), ())
    with write_aside(target) as aside:
        aside.write_bytes(content)
        if chosen == "int8":
            checked = audit(aside)
        if samples is not None:
            verification = verify(aside, source, samples)
            check_verified(verification, chosen, target)
    return Artifact(
        path=target,
        scheme=chosen,
        io_dtype=io_dtype if chosen == "int8" else "float32",
        size_bytes=target.stat().st_size,
        sha256=sha256(target),
        float_tensors=checked.float_tensors,
        verification=verification,
    )


def prepare(model: keras.Model) -> keras.Model:
    """Returns the model as it is converted: weights baked, ranges fixed, norms folded, float32.

    Raises:
        ValueError: a range was never trained, or a pruning schedule never ran.
    """
    baked = bake_weights(model)
    if scheme_of(model) is None:
        # Without ranges there is nothing of ours to keep.
        baked = (
            strip(baked) if any(isinstance(x, Strippable) for x in flat_layers(baked)) else baked
        )
    else:
        baked = freeze_ranges(baked)
    return fold_batch_norm(to_float32(baked))


def _check_arguments(
    model: keras.Model,
    target: Path,
    scheme: str | None,
    io_dtype: str,
    representative_data: Any,
    batch_size: int | None,
) -> str:
    if target.suffix != ".tflite":
        raise ValueError(f"to_tflite() writes a .tflite file, but the path is {str(target)!r}.")
    if target.is_dir():
        raise IsADirectoryError(f"{str(target)!r} is a folder; give the name of a file.")
    check_in("io_dtype", io_dtype, IO_DTYPES)
    if batch_size is not None:
        check_positive("batch_size", batch_size)
    trained = scheme_of(model)
    chosen = SCHEMES.get(scheme).name if scheme else (trained.name if trained else "float32")
    if trained is not None and chosen != trained.name:
        raise ValueError(
            f"{model.name!r} was trained for {trained.name!r}, but got scheme={chosen!r}. "
            "Leave scheme out, or export tfaccel.strip(model), which has no quantization any more."
        )
    if chosen == "int8" and trained is None and representative_data is None:
        raise ValueError(
            "int8 needs to know the range of every value. Pass representative_data= (some hundred "
            "training samples), or train tfaccel.quantization.quantize_aware(model) and export that."
        )
    if representative_data is not None and (chosen != "int8" or trained is not None):
        why = "ranges were trained" if trained else f"{chosen!r} needs no ranges"
        raise ValueError(f"representative_data is for int8 of a plain model, but here {why}.")
    if io_dtype != "float32" and chosen != "int8":
        raise ValueError(
            f"io_dtype={io_dtype!r} needs scheme='int8', but the scheme is {chosen!r}: only "
            "quantized values are integers."
        )
    return chosen


def _convert(
    model: keras.Model,
    scheme: str,
    io_dtype: str,
    representative_data: Any,
    batch_size: int | None,
) -> bytes:
    import tensorflow as tf

    with tempfile.TemporaryDirectory(prefix="tfaccel-") as folder:
        try:
            save_frozen(model, Path(folder), batch_size)
            converter = tf.lite.TFLiteConverter.from_saved_model(folder)
            if scheme != "float32":
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
            if scheme == "float16":
                converter.target_spec.supported_types = [tf.float16]
            if scheme == "int8":
                converter.inference_input_type = tf.as_dtype(io_dtype)
                converter.inference_output_type = tf.as_dtype(io_dtype)
            if representative_data is not None:
                samples = _sample_list(model, representative_data, "representative_data")
                converter.representative_dataset = lambda: _one_by_one(model, samples, batch_size)
            return bytes(converter.convert())
        except Exception as error:  # the converter raises whatever comes to it
            raise explain(error, model, scheme) from error


MOST_SAMPLES = 512


def _sample_list(model: keras.Model, data: Any, argument: str) -> list[np.ndarray[Any, Any]]:
    """Returns one array per input of the model, at most `MOST_SAMPLES` long."""
    count = len(model.inputs)
    if isinstance(data, np.ndarray):
        arrays = [data]
    elif isinstance(data, dict):
        arrays = [np.asarray(data[tensor.name]) for tensor in model.inputs if tensor.name in data]
    elif isinstance(data, (list, tuple)) and count > 1:
        arrays = [np.asarray(array) for array in data]
    elif isinstance(data, Iterable):
        arrays = _gather(data, count)
    else:
        arrays = [np.asarray(data)]
    wanted = [tuple(tensor.shape) for tensor in model.inputs]
    fits = len(arrays) == count and all(
        array.ndim == len(shape)
        and all(size in (None, n) for size, n in zip(shape[1:], array.shape[1:], strict=True))
        for array, shape in zip(arrays, wanted, strict=True)
    )
    if not fits or not len(arrays[0]):
        raise ValueError(
            f"{argument} must hold samples for {model.name!r}, which takes {_listed(wanted)}, but "
            f"got {_listed([array.shape for array in arrays])}."
        )
    pairs = zip(arrays, model.inputs, strict=True)
    return [array[:MOST_SAMPLES].astype(tensor.dtype, copy=False) for array, tensor in pairs]


def _gather(batches: Iterable[Any], count: int) -> list[np.ndarray[Any, Any]]:
    parts: list[list[np.ndarray[Any, Any]]] = []
    total = 0
    for batch in batches:
        x = batch[0] if isinstance(batch, tuple) else batch
        arrays = [np.asarray(value) for value in (keras.tree.flatten(x) if count > 1 else [x])]
        parts.append(arrays)
        total += len(arrays[0]) if arrays[0].ndim else 0
        if total >= MOST_SAMPLES:
            break
    return (
        [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else [np.empty(0)]
    )


def _one_by_one(
    model: keras.Model, samples: list[np.ndarray[Any, Any]], batch_size: int | None
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    from tfaccel.export.freezing import input_names

    step = batch_size or 1
    for begin in range(0, len(samples[0]) - step + 1, step):
        names = input_names(model)
        yield {n: s[begin : begin + step] for n, s in zip(names, samples, strict=True)}


def _weights_hash(model: keras.Model) -> str:
    digest = hashlib.sha256()
    for weight in model.get_weights():
        digest.update(np.ascontiguousarray(weight).tobytes())
    return digest.hexdigest()


def _listed(shapes: list[tuple[int | None, ...]]) -> str:
    return " and ".join(str([s if s is not None else "any" for s in shape]) for shape in shapes)
