"""Reformer against full attention: time and peak memory of training, by length and by depth.

    python tools/bench/reformer.py [--json RESULTS] [--markdown TABLE] [--quick]

Each figure is taken in a process of its own: what it held at its peak above what it held before the
first step, and the median of the steps after that. Full attention whose scores alone would pass the
limit is skipped ("-"). About 10 minutes on two cores.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import keras
import numpy as np
from keras import layers
from rich.console import Console

from tfaccel.architectures import LSHSelfAttention, NormalizedLayer, ReversibleBlocks
from tfaccel.core.artifacts import write_aside

HEADS, KEY_DIM, WIDTH = 2, 32, 64
BUCKET_SIZE, HASHES = 64, 2
LENGTHS, QUICK_LENGTHS = (1024, 2048, 4096, 8192, 16384), (1024,)
DEPTHS, QUICK_DEPTHS = (2, 4, 8, 12), (2, 4)
DEPTH_LENGTH, DEPTH_HIDDEN, DEPTH_BATCH = 1024, 1024, 4
STEPS = 3
# Scores [heads, length, length] of float32, held about three times: themselves, their softmax and
# its gradient.
SCORE_LIMIT_BYTES = 8 << 30
SEED = 0


def attention(kind: str, length: int) -> tuple[keras.Model, Any]:
    """One self-attention layer on a sequence, and a batch of one."""
    keras.utils.set_random_seed(SEED)
    inputs = keras.Input((length, WIDTH))
    if kind == "full":
        outputs = layers.MultiHeadAttention(HEADS, KEY_DIM)(inputs, inputs, use_causal_mask=True)
    else:
        layer = LSHSelfAttention(HEADS, KEY_DIM, BUCKET_SIZE, HASHES, causal=True, seed=SEED)
        outputs = layer(inputs)
    return keras.Model(inputs, outputs), samples(1, length)


def blocks(kind: str, depth: int) -> tuple[keras.Model, Any]:
    """Residual blocks of LSH attention and a wide feed-forward, and a batch."""
    keras.utils.set_random_seed(SEED)

    def wide() -> keras.Model:
        return keras.Sequential([layers.Dense(DEPTH_HIDDEN, "relu"), layers.Dense(WIDTH)])

    pairs = [
        (
            NormalizedLayer(LSHSelfAttention(HEADS, KEY_DIM, BUCKET_SIZE, HASHES, causal=True)),
            NormalizedLayer(wide()),
        )
        for _ in range(depth)
    ]
    inputs = keras.Input((DEPTH_LENGTH, WIDTH))
    recompute = kind == "reversible"
    outputs = ReversibleBlocks(pairs, recompute=recompute)([inputs, inputs])
    return keras.Model(inputs, layers.Add()(outputs)), samples(DEPTH_BATCH, DEPTH_LENGTH)


def samples(batch: int, length: int) -> Any:
    """Random inputs."""
    random = np.random.default_rng(SEED)
    return random.normal(size=(batch, length, WIDTH)).astype("float32")


def measure_here(what: str, kind: str, size: int) -> dict[str, float]:
    """Runs training steps and inference in this process."""
    model, x = (attention if what == "attention" else blocks)(kind, size)
    model.compile("sgd", "mse", jit_compile=False)
    before = peak_bytes()
    model.train_on_batch(x, x)
    result = {"train_ms": median_ms(lambda: model.train_on_batch(x, x))}
    result["peak_bytes"] = peak_bytes() - before
    model.predict_on_batch(x)
    result["predict_ms"] = median_ms(lambda: model.predict_on_batch(x))
    return result


def median_ms(call: Any) -> float:
    """Milliseconds of a call, median."""
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def peak_bytes() -> int:
    """Most that this process has held so far."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found.group(1)) * 1024 if found else 0


def measure_apart(what: str, kind: str, size: int) -> dict[str, Any]:
    """Runs `measure_here` in a process of its own."""
    row: dict[str, Any] = {"what": what, "kind": kind, "size": size}
    if what == "attention" and kind == "full" and 3 * HEADS * size**2 * 4 > SCORE_LIMIT_BYTES:
        return row
    done = subprocess.run(
        [sys.executable, __file__, "--worker", what, kind, str(size)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{what} {kind} {size} failed:\n{done.stderr[-2000:]}")
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns both tables as markdown."""

    def cell(row: Mapping[str, Any], key: str, divisor: float = 1.0) -> str:
        return f"{row[key] / divisor:,.0f}" if key in row else "-"

    heads = {
        "attention": ("| attention | tokens | training ms | inference ms | peak MB |", 5),
        "blocks": ("| residual blocks | depth | training ms | inference ms | peak MB |", 5),
    }
    tables = []
    for what, (head, columns) in heads.items():
        lines = [head, "|" + " --- |" * columns]
        lines += [
            f"| {row['kind']} | {row['size']:,} | {cell(row, 'train_ms')} "
            f"| {cell(row, 'predict_ms')} | {cell(row, 'peak_bytes', 1e6)} |"
            for row in rows
            if row["what"] == what
        ]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def main() -> None:
    """Measures all arms and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--markdown", type=Path, help="where to write the tables")
    parser.add_argument("--quick", action="store_true", help="small sizes only: a smoke test")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        what, kind, size = options.worker
        print(json.dumps(measure_here(what, kind, int(size))))
        return
    lengths, depths = (QUICK_LENGTHS, QUICK_DEPTHS) if options.quick else (LENGTHS, DEPTHS)
    arms = [("attention", kind, n) for n in lengths for kind in ("full", "LSH")]
    arms += [("blocks", kind, n) for n in depths for kind in ("plain", "reversible")]
    console = Console(stderr=True)
    rows = []
    for arm in arms:
        with console.status(" ".join(map(str, arm))):
            rows.append(measure_apart(*arm))
        if options.json:
            with write_aside(options.json) as aside:
                aside.write_text(json.dumps(rows, indent=1))
    table = render(rows)
    if options.markdown:
        with write_aside(options.markdown) as aside:
            aside.write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
