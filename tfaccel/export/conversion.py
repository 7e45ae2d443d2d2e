"""From a Keras model to a .tflite file."""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfaccel.core.artifacts import load_model, sha256, write_aside
from tfaccel.core.checks import check_in, check_model, check_positive, check_type
from tfaccel.core.graph import flat_layers
from tfaccel.export.auditing import Audit, audit_operators, check_operators, read_audit
from tfaccel.export.diagnosis import LOOPS, explain, explain_refusal
from tfaccel.export.freezing import end_names, name_scopes, save_inference, to_float32
from tfaccel.export.kernels import store_kernels, trained_kernels, widen_biases
from tfaccel.export.metadata import encode_facts, put_facts
from tfaccel.export.packing import name_ends, pack, unpack
from tfaccel.export.preparation import prepare
from tfaccel.export.samples import Array, gather_samples
from tfaccel.export.silence import quiet_tensorflow
from tfaccel.export.verification import Verification, check_verified, compare
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.quantization import SCHEMES, Scheme, quantize_aware, scheme_of

# Of files with values of 8 and of 16 bits.
IO_DTYPES = (("float32", "int8", "uint8"), ("float32", "int16"))
# Schemes that the converter can find ranges for by itself.
CALIBRATED = ("int8", "int16x8")


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A .tflite file that was written.

    Attributes:
        path: the file.
        scheme: how its numbers are stored.
        io_dtype: type of its inputs and outputs, where they are quantized.
        size_bytes: of the file.
        sha256: of the file, in hexadecimal.
        float_tensors: for schemes with integers between layers, the values inside that are still
            float: what quantization does not cover. Empty for a fully quantized file.
        verification: how far its outputs are from Keras's, if data was given.
        audit: for such schemes, what is integers, and for a quantized model how far each operator
            is from Keras on the same inputs.
    """

    path: Path
    scheme: str
    io_dtype: str
    size_bytes: int
    sha256: str
    float_tensors: tuple[str, ...] = ()
    verification: Verification | None = None
    audit: Audit | None = None


def to_tflite(
    model: keras.Model | str | os.PathLike[str],
    path: str | os.PathLike[str],
    scheme: str | None = None,
    *,
    io_dtype: str = "float32",
    sparse: bool = False,
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
            activations in float); "int8" (all in int8: for a quantized model, or with
            `representative_data`); "int4" (as int8, kernels of 4 bits in 4 bits: for a model that
            was quantized so. LiteRT computes most of these slower: it is for size); "int16x8"
            (activations in int16, slow: for a quantized model, or with `representative_data`);
            "int4_weight_only" and "int4_block32" (kernels in 4 bits, activations in float: for a
            quantized model, or rounded here). By default the model's own: that of a quantized
            model, else "float32".
        io_dtype: type of inputs and outputs of a file with integers between layers: "float32",
            "int8" or "uint8"; for int16x8 "float32" or "int16".
        sparse: stores kernels of a pruned model without their zeros, for "float32". The file is
            then as small as its zeros make it. It is not faster, but for dense kernels pruned in
            "4x1" blocks, for which LiteRT has sparse kernels, and for 1x1 convolutions on ARM.
        representative_data: for "int8" and "int16x8" of a plain model, samples to find ranges with:
            an array [samples, ...], for several inputs a list of such or a dict by input name, or
            an iterable of batches (a tf.data.Dataset of x or (x, y)). At most 512 samples are used.
        verify_data: samples, likewise, to compare the file with Keras on before it is kept.
        labels: names of the classes, put inside the file.
        metadata: JSON-like facts to put inside the file (see `read_metadata`).
        batch_size: samples that the file takes at once; None for any number, which some delegates
            refuse. A model whose own batch size is fixed keeps that.
        verbose: shows what the converter prints.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: there is no such .keras file.
        PermissionError: the folder is read-only.
        TypeError: the model is subclassed, or labels are no list of strings.
        ValueError: the model is not built, an argument does not fit, a range was never trained, the
            converter refuses a layer (named, with a remedy), an operator of a quantized model
            computes something else than Keras, or the outputs are wrong.
    """
    check_type("path", path, (str, os.PathLike))
    is_file = isinstance(model, (str, os.PathLike))
    source = load_model(model) if is_file else model
    target = Path(path)
    chosen = _check_arguments(source, target, scheme, io_dtype, representative_data)
    _check_sparse(sparse, chosen.name)
    batch = _batch_of(source, batch_size)
    _check_labels(source, labels)
    if metadata is not None:
        check_type("metadata", metadata, Mapping)
    facts = encode_facts(
        {
            "scheme": chosen.name,
            "labels": None if labels is None else list(labels),
            "source_sha256": _weights_hash(source),
            "metadata": None if metadata is None else dict(metadata),
        }
    )
    samples = None if verify_data is None else gather_samples(source, verify_data, "verify_data")
    quantized = source
    if chosen.trainable and not chosen.integer_activations and scheme_of(source) is None:
        quantized = quantize_aware(source, chosen)  # rounded to the nearest, without training
    ready = prepare(quantized)
    trained = scheme_of(quantized) is not None
    kernels = trained_kernels(quantized, ready) if trained else []
    calibration = None
    if representative_data is not None:
        calibration = gather_samples(
            ready, representative_data, "representative_data", least=batch or 1
        )
    with quiet_tensorflow(verbose=verbose):
        content = _convert(ready, chosen, io_dtype, calibration, batch, sparse=sparse)
    flatbuffer = unpack(content)
    store_kernels(flatbuffer, kernels, low_bits=chosen.weight_bits <= 4)
    if chosen.activation_bits == 16:
        widen_biases(flatbuffer)
    name_ends(flatbuffer, *end_names(source))
    put_facts(flatbuffer, facts)
    verification = found = None
    with write_aside(target) as aside:
        aside.write_bytes(pack(flatbuffer))
        _check_runs(aside, source, chosen.name, io_dtype)
        if chosen.integer_activations:
            found = audit_operators(aside, ready, samples) if trained else read_audit(aside)
            # Integers of an input, such as token ids, cannot be drawn at random: zeros are no test.
            if samples is not None or all("float" in x.dtype for x in ready.inputs):
                check_operators(found, target)
        if samples is not None:
            verification = compare(aside, to_float32(quantized), samples)
            check_verified(verification, chosen.name, target)
    return Artifact(
        path=target,
        scheme=chosen.name,
        io_dtype=io_dtype if chosen.integer_activations else "float32",
        size_bytes=target.stat().st_size,
        sha256=sha256(target),
        float_tensors=() if found is None else found.float_tensors,
        verification=verification,
        audit=None if found is None else dataclasses.replace(found, verification=verification),
    )


def _check_arguments(
    model: keras.Model, target: Path, scheme: str | None, io_dtype: str, representative_data: Any
) -> Scheme:
    check_model(model, "to_tflite")
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"to_tflite() needs Keras on TensorFlow, but the backend is "
            f"{keras.backend.backend()!r}. Save the model (model.save('model.keras')) and export "
            "that file in a process with KERAS_BACKEND=tensorflow."
        )
    if target.suffix != ".tflite":
        raise ValueError(f"to_tflite() writes a .tflite file, but the path is {str(target)!r}.")
    if target.is_dir():
        raise IsADirectoryError(f"{str(target)!r} is a folder; give the name of a file.")
    if any(parent.is_file() for parent in target.parents):
        raise NotADirectoryError(f"A part of {str(target)!r} is a file, not a folder.")
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{str(target)!r} cannot be written: {str(folder)!r} is read-only.")
    _check_exportable(model)
    trained = scheme_of(model)
    chosen = SCHEMES.get(scheme) if scheme else (trained or SCHEMES.get("float32"))
    check_in("io_dtype", io_dtype, IO_DTYPES[chosen.activation_bits == 16])
    if trained is not None and chosen.name != trained.name:
        raise ValueError(
            f"{model.name!r} was trained for {trained.name!r}, but got scheme={chosen.name!r}. "
            "Leave scheme out, or export tfaccel.strip(model), which has no quantization any more."
        )
    if trained is None and chosen.integer_activations:
        _check_calibrated(chosen, representative_data)
    if representative_data is not None and (trained or not chosen.integer_activations):
        why = "ranges were trained" if trained else f"{chosen.name!r} needs no ranges"
        raise ValueError(
            f"representative_data is for int8 and int16x8 of a plain model, but here {why}."
        )
    if io_dtype != "float32" and not chosen.integer_activations:
        raise ValueError(
            f"io_dtype={io_dtype!r} needs scheme='int8', but the scheme is {chosen.name!r}: "
            "only quantized values are integers."
        )
    return chosen


def _check_calibrated(scheme: Scheme, representative_data: Any) -> None:
    """Checks that the ranges of a plain model can be found."""
    if scheme.name not in CALIBRATED:
        raise ValueError(
            f"{scheme.name} needs a model that was prepared for it. Export what "
            f"tfaccel.quantization.quantize(model, data, {scheme.name!r}) or "
            f"quantize_aware(model, {scheme.name!r}) makes."
        )
    if representative_data is None:
        raise ValueError(
            f"{scheme.name} needs to know the range of every value. Pass representative_data= "
            "(some hundred training samples), or train "
            "tfaccel.quantization.quantize_aware(model) and export it."
        )


def _check_sparse(sparse: bool, scheme: str) -> None:
    check_type("sparse", sparse, bool)
    if sparse and scheme != "float32":
        raise ValueError(
            f"sparse=True is for 'float32', but the scheme is {scheme!r}: with quantized weights "
            "LiteRT's sparse kernels give wrong results without a word. Leave one of them out; "
            "compressed (gzip), zeros cost next to nothing in any scheme."
        )


def _check_exportable(model: keras.Model) -> None:
    names = zip(end_names(model)[0], model.inputs, strict=True)
    texts = [name for name, tensor in names if tensor.dtype == "string"]
    if texts:
        raise ValueError(
            f"Input {texts[0]!r} of {model.name!r} takes text, but a .tflite file takes numbers. "
            "Export the part of the model behind the text layers, and prepare the text before it."
        )
    for layer in flat_layers(model):
        mode = getattr(layer, "quantization_mode", None)
        if mode is not None:
            raise ValueError(
                f"Layer {layer.name!r} was quantized by Keras ({mode}), which the converter does "
                "not read. Export the model as it was before model.quantize(), with scheme=."
            )


def _batch_of(model: keras.Model, batch_size: int | None) -> int | None:
    if batch_size is not None:
        check_type("batch_size", batch_size, int)
        check_positive("batch_size", batch_size)
    own = {tensor.shape[0] for tensor in model.inputs} - {None}
    if not own:
        return batch_size
    (fixed,) = own if len(own) == 1 else (None,)
    if fixed is None or batch_size not in (1, fixed):
        raise ValueError(
            f"{model.name!r} takes batches of {' and '.join(map(str, sorted(own)))}, so batch_size "
            f"cannot be {batch_size!r}. Leave it out, or build the model on keras.Input(shape=...)."
        )
    return int(fixed)


def _check_labels(model: keras.Model, labels: Sequence[str] | None) -> None:
    if labels is None:
        return
    if (
        isinstance(labels, str)
        or not isinstance(labels, Sequence)
        or not all(isinstance(label, str) for label in labels)
    ):
        raise TypeError(f"labels must be a list of strings, but got {labels!r}.")
    classes = [tensor.shape[-1] for tensor in model.outputs if len(tensor.shape) > 1]
    # One unit with a sigmoid tells two classes apart.
    if len(labels) not in classes and not (len(labels) == 2 and 1 in classes):
        raise ValueError(
            f"labels must name each class, but there are {len(labels)} labels and "
            f"{model.name!r} gives {' and '.join(map(str, classes)) or 'no'} classes."
        )


def _convert(
    model: keras.Model,
    scheme: Scheme,
    io_dtype: str,
    calibration: list[Array] | None,
    batch_size: int | None,
    *,
    sparse: bool,
) -> bytes:
    import tensorflow as tf

    scopes = name_scopes(model)
    with tempfile.TemporaryDirectory(prefix="tfaccel-") as folder:
        try:
            loops = save_inference(model, Path(folder), batch_size)
            if calibration is not None and loops:
                # The converter would crash, and the process with it.
                raise NotImplementedError(f"{LOOPS}: {loops}")
            converter = tf.lite.TFLiteConverter.from_saved_model(folder)
            if scheme.integer_activations or scheme.name in ("float16", "dynamic_int8"):
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
            if sparse:
                converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
            if scheme.name == "float16":
                converter.target_spec.supported_types = [tf.float16]
            if scheme.integer_activations:
                converter.inference_input_type = tf.as_dtype(io_dtype)
                converter.inference_output_type = tf.as_dtype(io_dtype)
            if calibration is not None:
                converter.representative_dataset = lambda: _portions(calibration, batch_size or 1)
                if scheme.activation_bits == 16:
                    converter.target_spec.supported_ops = [
                        tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8,
                        tf.lite.OpsSet.TFLITE_BUILTINS,
                    ]
            return bytes(converter.convert())
        except Exception as error:  # the converter raises whatever comes to it
            raise explain(error, model, scheme.name, scopes) from error


def _portions(samples: list[Array], size: int) -> Iterator[dict[str, Array]]:
    for begin in range(0, len(samples[0]) - size + 1, size):
        yield {
            f"input_{number:03}": array[begin : begin + size]
            for number, array in enumerate(samples)
        }


def _check_runs(path: Path, model: keras.Model, scheme: str, io_dtype: str) -> None:
    """Refuses a file that LiteRT does not open, or that is float where it begins and ends."""
    try:
        file = TFLiteModel(path)
    except ValueError as error:
        raise explain_refusal(error, model, scheme) from error
    floats = [info.name for info in (*file.inputs, *file.outputs) if info.dtype.kind == "f"]
    if io_dtype != "float32" and floats:
        raise ValueError(
            f"io_dtype={io_dtype!r} cannot be had: {' and '.join(map(repr, floats))} would stay "
            "float, because the layer there is not quantized. Use io_dtype='float32', or quantize "
            "that layer too (tfaccel.quantization.plan(model) says why it is not)."
        )


def _weights_hash(model: keras.Model) -> str:
    digest = hashlib.sha256()
    for weight in model.get_weights():
        digest.update(np.ascontiguousarray(weight).tobytes())
    return digest.hexdigest()
