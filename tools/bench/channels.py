"""Channels off an ImageNet MobileNetV2: top-1 before any fine-tuning, by criterion.

    python tools/bench/channels.py MODEL PHOTOS WORK [--kept 0.7] [--markdown TABLE]

MODEL is a .keras file that gives logits of 1,000 classes and reads (x - mean) / std of RGB photos
of 224 x 224. PHOTOS is an .npz with `jpeg` (all bytes), `offset` and `label`. Every second photo is
evidence for the criteria and for the new batch-norm statistics, the others are scored; no photo is
both. WORK keeps finished rows, so that a killed run goes on. About 10 minutes on two cores.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console

import tfaccel
from tfaccel.core.artifacts import write_aside
from tfaccel.pruning import prune_channels, recalibrate_batch_norm

MEAN, STD = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])
CRITERIA = ("l1", "l2", "bn_gamma", "fpgm", "taylor", "activation", "apoz", "random")
ALLOCATIONS = ("global", "uniform")


def read_photos(path: Path) -> tuple[Any, Any]:
    """Returns photos [n, 224, 224, 3], normalized, and their labels."""
    with np.load(path) as packed:
        data, offsets, labels = packed["jpeg"].tobytes(), packed["offset"], packed["label"]
    ends = [*offsets[1:], len(data)] if len(offsets) == len(labels) else offsets[1:]
    photos = [
        tf.io.decode_jpeg(data[int(start) : int(end)], channels=3).numpy()
        for start, end in zip(offsets, ends, strict=False)
    ]
    return ((np.stack(photos) - MEAN) / STD).astype("float32"), labels


def score(model: keras.Model, x: Any, y: Any) -> float:
    """Returns top-1 accuracy."""
    found = model.predict(x, batch_size=50, verbose=0).argmax(axis=1)
    return float((found == y).mean())


def try_out(
    model: keras.Model, criterion: str, allocation: str, kept: float, evidence: Any, scored: Any
) -> dict[str, Any]:
    """Returns one row."""
    small = prune_channels(
        model,
        {"macs": kept},
        criterion,
        evidence,
        allocation=allocation,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    counts = tfaccel.measurement.count(small)
    return {
        "criterion": criterion,
        "allocation": allocation,
        "macs": counts.macs,
        "parameters": counts.parameters,
        "top1": score(small, *scored),
        "top1_recalibrated": score(recalibrate_batch_norm(small, evidence[0]), *scored),
    }


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a table."""
    lines = [
        "| criterion | allocation | MACs [M] | parameters [M] | top-1 | batch norm anew |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r['criterion']} | {r['allocation']} | {r['macs'] / 1e6:.1f} | "
        f"{r['parameters'] / 1e6:.2f} | {r['top1']:.1%} | {r['top1_recalibrated']:.1%} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs all rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("work", type=Path, help="folder for finished rows")
    parser.add_argument("--kept", type=float, default=0.7, help="share of the MACs")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    console = Console(stderr=True)
    options.work.mkdir(parents=True, exist_ok=True)
    model = keras.models.load_model(options.model, compile=False)
    x, y = read_photos(options.photos)
    evidence, scored = (x[::2], y[::2]), (x[1::2], y[1::2])
    whole = tfaccel.measurement.count(model)
    rows = [
        {
            "criterion": "none",
            "allocation": "",
            "macs": whole.macs,
            "parameters": whole.parameters,
            "top1": score(model, *scored),
            "top1_recalibrated": score(recalibrate_batch_norm(model, evidence[0]), *scored),
        }
    ]
    for allocation in ALLOCATIONS:
        for criterion in CRITERIA:
            file = options.work / f"{criterion}_{allocation}_{options.kept}.json"
            if not file.exists():
                row = try_out(model, criterion, allocation, options.kept, evidence, scored)
                with write_aside(file) as aside:
                    aside.write_text(json.dumps(row))
            rows.append(json.loads(file.read_text()))
            console.print(rows[-1])
    table = to_markdown(rows)
    print(table, end="")
    if options.markdown:
        with write_aside(options.markdown) as aside:
            aside.write_text(table)


if __name__ == "__main__":
    main()
