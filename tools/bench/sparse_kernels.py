"""What each pattern of zeros does to a .tflite file: size, compressed size, latency; stored or not.

    python tools/bench/sparse_kernels.py WORK [--sparsity 0.9] [--markdown TABLE]

Two networks without training, since only the place of the zeros matters here: dense layers (784,
1024, 1024, 10), and 3x3 and 1x1 convolutions on 32x32 images. Each pattern is exported with its
zeros stored and without them (`sparse=True`). Files are timed on one thread, in turns. About two
minutes.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import keras
import numpy as np
from keras import layers

import tfaccel
from tfaccel.core.artifacts import write_aside
from tfaccel.pruning import prune, update_masks

ROUNDS = 7
PATTERNS = ("none", "element", "4x1", "1x4", "4x4", "2:4", "channel")


def dense() -> keras.Model:
    """Builds three dense layers."""
    keras.utils.set_random_seed(0)
    units = [layers.Dense(1024, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((784,)), *units, layers.Dense(10)], name="dense")


def convolutions() -> keras.Model:
    """Builds a stem and two convolutions each of 3x3 and 1x1."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(32, 3, strides=2, padding="same", activation="relu")(inputs)
    for size, filters in ((3, 64), (1, 128), (3, 128), (1, 256)):
        x = layers.Conv2D(filters, size, padding="same", activation="relu")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x), name="convolutions")


def main() -> None:
    """Exports all files, then times them in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for the files")
    parser.add_argument("--sparsity", type=float, default=0.9, help="of all patterns but 2:4")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    files = {}
    for network in (dense(), convolutions()):
        for pattern in PATTERNS:
            model = network
            if pattern != "none":
                share = 0.5 if pattern == "2:4" else options.sparsity
                pruned = prune(network, share, pattern=pattern)
                update_masks(pruned, 0)
                model = tfaccel.strip(pruned)
            for sparse in (False, True) if pattern != "none" else (False,):
                stem = (
                    f"{network.name}-{pattern.replace(':', 'of')}-{'sparse' if sparse else 'dense'}"
                )
                path = options.work / f"{stem}.tflite"
                files[network.name, pattern, sparse] = tfaccel.export.to_tflite(
                    model, path, sparse=sparse
                )
    times: dict[tuple[str, str, bool], list[float]] = {key: [] for key in files}
    for _ in range(ROUNDS):
        for key, artifact in files.items():
            times[key].append(tfaccel.measure(artifact.path, runs=100).latency_ms or 0.0)
    lines = [
        "| network | zeros | kB | gzip kB | ms | kB, zeros not stored | ms, zeros not stored |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for (network_name, pattern, sparse), artifact in files.items():
        if sparse:
            continue
        other = files.get((network_name, pattern, True))
        zeros = "none" if pattern == "none" else f"{pattern}, {options.sparsity:.0%}"
        compressed = tfaccel.measurement.measure_gzip_size(artifact.path)
        row = (
            f"| {network_name} | {'2:4, 50%' if pattern == '2:4' else zeros} | "
            f"{artifact.size_bytes / 1e3:.0f} | {compressed / 1e3:.0f} | "
            f"{np.median(times[network_name, pattern, False]):.3f} |"
        )
        if other is None:
            lines.append(f"{row} | |")
        else:
            median = np.median(times[network_name, pattern, True])
            lines.append(f"{row} {other.size_bytes / 1e3:.0f} | {median:.3f} |")
    table = "\n".join(lines) + "\n"
    print(table, end="")
    if options.markdown:
        with write_aside(options.markdown) as aside:
            aside.write_text(table)


if __name__ == "__main__":
    main()
