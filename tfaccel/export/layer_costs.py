"""How long each layer takes in so many bits: the costs for `allocate_bits` under a time budget."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfaccel.core.checks import check_in, check_model
from tfaccel.core.cloning import clone_built
from tfaccel.core.selection import Selector, select_layers
from tfaccel.core.stripping import bake_weights
from tfaccel.core.walking import read_graphs
from tfaccel.export.conversion import to_tflite
from tfaccel.measurement.measuring import measure
from tfaccel.quantization.patches import AS_MATRICES
from tfaccel.quantization.post_training import quantize
from tfaccel.quantization.schemes import LOW_BITS
from tfaccel.rewriting import fold_batch_norm

Cost = Callable[[keras.layers.Layer, int], float]


def layer_latencies(
    model: keras.Model,
    *,
    choices: Sequence[int] = (4, 8),
    include: Selector | None = None,
    exclude: Selector | None = None,
    runs: int = 50,
    verbose: bool = False,
) -> Cost:
    """Times every dense layer and convolution by itself, quantized, on this machine.

    Give the result to `tfaccel.quantization.allocate_bits` as `cost`, and the budget in
    milliseconds. Layers alike are timed once. That times add up is an assumption: in the whole
    file, values may be in a cache or not; measure that file in the end. Other devices have other
    kernels, so time on the device that you ship to.

    Args:
        model: a built Functional or Sequential model of fixed input sizes; not changed.
        choices: numbers of bits of weights, 2 to 8; values have 8.
        include: layers to time (names, patterns, predicate); by default all.
        exclude: layers to leave out.
        runs: timed calls of each.
        verbose: prints each layer that is timed.

    Returns:
        A function of a layer and its bits that gives milliseconds, on one thread.

    Raises:
        TypeError: the model is subclassed.
        ValueError: the model is not built, a number of bits is out of range, or a layer's input has
            no fixed size.
    """
    check_model(model, "layer_latencies")
    for bits in choices:
        check_in("choices", bits, LOW_BITS)
    folded = fold_batch_norm(bake_weights(model))
    chosen = {id(c.layer) for c in select_layers(folded, include, exclude) if c.chosen}
    known: dict[Any, float] = {}
    times: dict[tuple[str, int], float] = {}
    for graph in read_graphs(folded):
        for node in graph.nodes:
            layer: Any = node.layer
            if type(layer) not in AS_MATRICES or id(layer) not in chosen:
                continue
            shape = tuple(node.inputs[0].shape[1:])
            for bits in choices:
                # A shared layer takes its time at each call.
                found = _time_of(layer, shape, bits, runs, known)
                times[layer.name, bits] = times.get((layer.name, bits), 0.0) + found
                if verbose:
                    print(f"{layer.name}, {bits} bits: {found:.4f} ms", flush=True)  # noqa: T201

    def cost(layer: keras.layers.Layer, bits: int) -> float:
        if (layer.name, bits) not in times:
            raise ValueError(
                f"Layer {layer.name!r} was not timed in {bits} bits. Give layer_latencies() the "
                "same model, choices=, include= and exclude= as allocate_bits()."
            )
        return times[layer.name, bits]

    return cost


def _time_of(
    layer: Any, shape: tuple[Any, ...], bits: int, runs: int, known: dict[Any, float]
) -> float:
    if None in shape:
        raise ValueError(
            f"The input of {layer.name!r} has the shape {shape}, but only a fixed size can be "
            "timed. Build the model on keras.Input of a fixed shape."
        )
    config = {name: str(value) for name, value in layer.get_config().items() if name != "name"}
    key = type(layer), shape, bits, tuple(sorted(config.items()))
    if key not in known:
        inputs = keras.Input(shape, name="values")
        alone = keras.Model(inputs, clone_built(layer)(inputs), name="alone")
        samples = np.random.default_rng(0).normal(size=(8, *shape)).astype("float32")
        quantized = quantize(alone, samples, f"w{bits}a8", calibrator="minmax", correct_bias=False)
        with tempfile.TemporaryDirectory(prefix="tfaccel-") as folder:
            path = to_tflite(quantized, Path(folder) / "alone.tflite", io_dtype="int8").path
            record: Any = measure(path, runs=runs)
            known[key] = float(record.latency_ms)
    return known[key]
