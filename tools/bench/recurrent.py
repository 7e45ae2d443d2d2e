"""Light recurrent layers against keras LSTM and GRU: tokens per second, training and .tflite.

    python tools/bench/recurrent.py [--json RESULTS] [--markdown TABLE] [--quick]

One layer from [batch, steps, 128] to its last output of 128 channels and a dense layer; a training
step is forward, backward and Adam. TFLite runs one sequence on one thread. An arm that cannot be
is "-": static int8 takes no loops. About 8 minutes on two cores.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import keras
import numpy as np
from keras import layers
from rich.console import Console

import tfaccel
from tfaccel.architectures import QRNN, SRU, SlicedRNN
from tfaccel.core.artifacts import write_aside

UNITS, BATCH, SEED = 128, 32, 0
STEPS, QUICK_STEPS = (128, 512, 1024), (64,)
SECONDS, QUICK_SECONDS = 4.0, 0.5

ARMS: dict[str, Callable[[], keras.layers.Layer]] = {
    "keras LSTM": lambda: layers.LSTM(UNITS),
    "keras GRU": lambda: layers.GRU(UNITS),
    "QRNN fo, k=2": lambda: QRNN(UNITS),
    "SRU": lambda: SRU(UNITS),
    "SRU, plain gates": lambda: SRU(UNITS, recurrent_gates=False),
    "SlicedRNN GRU, 4 slices, 2 levels": lambda: SlicedRNN(layers.GRU(UNITS), 4, 2),
    "SlicedRNN GRU, 8 slices, 1 level": lambda: SlicedRNN(layers.GRU(UNITS), 8, 1),
}

# The same without loops, for static int8. A plain LSTM or GRU of these lengths is too large so.
UNROLLED: dict[str, Callable[[], keras.layers.Layer]] = {
    "SlicedRNN GRU, 4 slices, 2 levels": lambda: SlicedRNN(layers.GRU(UNITS, unroll=True), 4, 2),
}


def make_model(layer: keras.layers.Layer, steps: int) -> keras.Model:
    """One layer and a dense one."""
    keras.utils.set_random_seed(SEED)
    inputs = keras.Input((steps, UNITS))
    return keras.Model(inputs, layers.Dense(1)(layer(inputs)))


def measure_training(model: keras.Model, steps: int, seconds: float, *, jit: bool) -> float:
    """Returns tokens per second of training steps, the first ones (tracing) left out."""
    model.compile("adam", "mse", jit_compile=jit)
    random = np.random.default_rng(SEED)
    x = random.normal(size=(BATCH, steps, UNITS)).astype("float32")
    y = random.normal(size=(BATCH, 1)).astype("float32")
    for _ in range(3):
        model.train_on_batch(x, y)
    begin, done = time.perf_counter(), 0
    while done < 3 or time.perf_counter() - begin < seconds:
        model.train_on_batch(x, y)
        done += 1
    return done * BATCH * steps / (time.perf_counter() - begin)


def measure_file(
    model: keras.Model, steps: int, scheme: str, seconds: float, folder: Path
) -> float | None:
    """Returns tokens per second of a .tflite file; None if the scheme takes no loops."""
    samples = np.random.default_rng(SEED).normal(size=(8, steps, UNITS)).astype("float32")
    data = samples if scheme == "int8" else None
    try:
        path = tfaccel.export.to_tflite(
            model, folder / "m.tflite", scheme, representative_data=data
        ).path
    except ValueError as error:
        if "without loops" not in str(error):
            raise
        return None
    measured = tfaccel.measure(path, runs=5, min_seconds=seconds / 2)
    return 1e3 * steps / measured.latency_ms if measured.latency_ms else None


def measure_arm(arm: str, steps: int, seconds: float) -> dict[str, Any]:
    """Measures one layer at one length."""
    model = make_model(ARMS[arm](), steps)
    row: dict[str, Any] = {"layer": arm, "steps": steps, "parameters": model.count_params()}
    row["train"] = measure_training(model, steps, seconds, jit=False)
    row["train_xla"] = measure_training(model, steps, seconds, jit=True)
    with tempfile.TemporaryDirectory() as folder:
        row["float32"] = measure_file(model, steps, "float32", seconds, Path(folder))
        unrolled = make_model(UNROLLED.get(arm, ARMS[arm])(), steps)
        row["int8"] = measure_file(unrolled, steps, "int8", seconds, Path(folder))
    return row


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows as a markdown table, in thousands of tokens per second."""
    columns = ("train", "train_xla", "float32", "int8")
    lines = [
        "| layer | steps | parameters | training | training, XLA | .tflite float32 | int8 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = ["-" if row[c] is None else f"{row[c] / 1e3:,.0f}" for c in columns]
        lines.append(
            f"| {row['layer']} | {row['steps']:,} | {row['parameters']:,} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures all layers at all lengths and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--quick", action="store_true", help="64 steps only: a smoke test")
    options = parser.parse_args()
    lengths, seconds = (QUICK_STEPS, QUICK_SECONDS) if options.quick else (STEPS, SECONDS)
    console = Console(stderr=True)
    rows = []
    for steps in lengths:
        for arm in ARMS:
            with console.status(f"{arm}, {steps} steps"):
                rows.append(measure_arm(arm, steps, seconds))
        if options.json:
            with write_aside(options.json) as aside:
                aside.write_text(json.dumps(rows, indent=1))
    table = render(rows)
    if options.markdown:
        with write_aside(options.markdown) as aside:
            aside.write_text(f"Thousands of tokens per second:\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
