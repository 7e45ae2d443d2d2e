"""Prints what one training step takes: run as a script, in a process of its own.

python memory_probe.py DEPTH {reversible,plain} {graph,xla} FOLDER
"""

import json
import pathlib
import re
import sys


def peak_bytes():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def main():
    depth, kind, mode, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    import keras
    import numpy as np
    from keras import layers

    from tfaccel.architectures.lsh_attention import LSHSelfAttention
    from tfaccel.architectures.reformer import NormalizedLayer
    from tfaccel.architectures.reversible import ReversibleBlocks

    def wide():
        return keras.Sequential([layers.Dense(1024, "relu"), layers.Dense(32)])

    blocks = [
        (NormalizedLayer(LSHSelfAttention(2, 16, 64, 2, causal=True)), NormalizedLayer(wide(), 0.1))
        for _ in range(depth)
    ]
    x = keras.Input((1024, 32))
    y = ReversibleBlocks(blocks, recompute=kind == "reversible")([x, x])
    model = keras.Model(x, layers.Add()(y))
    model.compile("sgd", "mse", jit_compile=mode == "xla")
    data = np.random.default_rng(0).normal(size=(4, 1024, 32)).astype("float32")
    before = peak_bytes()
    for _ in range(2):
        model.train_on_batch(data, data)
    result = {"resident": peak_bytes() - before}
    reports = sorted(pathlib.Path(folder).glob("*memory-usage-report.txt"))
    if reports:
        sizes = [re.search(r"Total bytes used: (\d+)", p.read_text()) for p in reports]
        result["planned"] = max(int(size.group(1)) for size in sizes)
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main()
