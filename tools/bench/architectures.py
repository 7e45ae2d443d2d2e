"""Every network at 224 x 224: parameters, MACs, and what its .tflite files weigh and take.

    python tools/bench/architectures.py WORK [--json RESULTS] [--markdown TABLE] [--quick]

Weights are random: neither size nor latency depends on them. WORK keeps what is done, so that a
killed run goes on; one file is there at a time. About 25 minutes on two cores.
"""

import argparse
import gc
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import keras
import numpy as np
from rich.console import Console

import tfaccel
from tfaccel import architectures
from tfaccel.core.artifacts import write_aside

SIZE, CLASSES = 224, 1000
QUICK_SIZE, QUICK_CLASSES = 64, 10
CALIBRATION_SAMPLES = 4
SCHEMES = ("float32", "int8")
SEED = 0

Build = Callable[..., keras.Model]

NETWORKS: dict[str, tuple[Build, dict[str, Any]]] = {
    "NIN (ImageNet)": (architectures.NIN, {"variant": "imagenet"}),
    "VGG11": (architectures.VGG11, {}),
    "VGG13": (architectures.VGG13, {}),
    "VGG16": (architectures.VGG16, {}),
    "VGG19": (architectures.VGG19, {}),
    "GoogLeNet": (architectures.GoogLeNet, {}),
    "SqueezeNet 1.0": (architectures.SqueezeNet, {"version": "1.0"}),
    "SqueezeNet 1.1": (architectures.SqueezeNet, {"version": "1.1"}),
    "MobileNetV1 1.0": (architectures.MobileNetV1, {}),
    "MobileNetV1 0.5": (architectures.MobileNetV1, {"width": 0.5}),
    "MobileNetV1 0.25": (architectures.MobileNetV1, {"width": 0.25}),
    "MobileNetV2 1.0": (architectures.MobileNetV2, {}),
    "MobileNetV3-Small": (architectures.MobileNetV3Small, {}),
    "MobileNetV3-Large": (architectures.MobileNetV3Large, {}),
    "ShuffleNetV1 1x, g=1": (architectures.ShuffleNetV1, {"groups": 1}),
    "ShuffleNetV1 1x, g=3": (architectures.ShuffleNetV1, {"groups": 3}),
    "ShuffleNetV1 1x, g=8": (architectures.ShuffleNetV1, {"groups": 8}),
    "ShuffleNetV2 0.5x": (architectures.ShuffleNetV2, {"width": 0.5}),
    "ShuffleNetV2 1x": (architectures.ShuffleNetV2, {}),
    "ShuffleNetV2 2x": (architectures.ShuffleNetV2, {"width": 2.0}),
}


def measure_network(name: str, work: Path, size: int, classes: int, runs: int) -> dict[str, Any]:
    """Builds, exports and measures one network; its files are deleted again."""
    build, arguments = NETWORKS[name]
    keras.utils.set_random_seed(SEED)
    model = build((size, size, 3), classes, **arguments)
    counts = tfaccel.measurement.count(model)
    row: dict[str, Any] = {"name": name, "parameters": counts.parameters, "macs": counts.macs}
    samples = np.random.default_rng(SEED).random((CALIBRATION_SAMPLES, size, size, 3), np.float32)
    for scheme in SCHEMES:
        path = work / "network.tflite"
        data = samples if scheme == "int8" else None
        tfaccel.export.to_tflite(model, path, scheme, representative_data=data)
        measured = tfaccel.measure(path, runs=runs)
        row[scheme] = {"size_bytes": measured.size_bytes, "latency_ms": measured.latency_ms}
        path.unlink()
    return row


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows as a markdown table."""
    lines = [
        "| network | parameters | M MACs | float32 MB | int8 MB | float32 ms | int8 ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        floats, integers = row["float32"], row["int8"]
        lines.append(
            f"| {row['name']} | {row['parameters']:,} | {row['macs'] / 1e6:,.0f} "
            f"| {floats['size_bytes'] / 1e6:,.1f} | {integers['size_bytes'] / 1e6:,.1f} "
            f"| {floats['latency_ms']:,.1f} | {integers['latency_ms']:,.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures what WORK does not have yet and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for finished rows and the file at work")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--runs", type=int, default=30, help="timed calls for each file")
    parser.add_argument("--quick", action="store_true", help="64 pixels, 10 classes: a smoke test")
    options = parser.parse_args()
    size, classes = (QUICK_SIZE, QUICK_CLASSES) if options.quick else (SIZE, CLASSES)
    done = options.work / f"rows_{size}.json"
    options.work.mkdir(parents=True, exist_ok=True)
    rows = json.loads(done.read_text()) if done.exists() else []
    console = Console(stderr=True)
    for place, name in enumerate(NETWORKS, start=1):
        if name in {row["name"] for row in rows}:
            continue
        with console.status(f"{name} ({place} of {len(NETWORKS)})"):
            rows.append(measure_network(name, options.work, size, classes, options.runs))
        _write(done, json.dumps(rows, indent=1))
        gc.collect()
    table = render(rows)
    if options.json:
        _write(options.json, json.dumps(rows, indent=1))
    if options.markdown:
        _write(options.markdown, table + "\n")
    print(table)


def _write(path: Path, text: str) -> None:
    with write_aside(path) as aside:
        aside.write_text(text)


if __name__ == "__main__":
    main()
