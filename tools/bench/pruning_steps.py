"""What a training step between two mask updates costs: unpruned, pruned, and TFMOT on tf_keras.

    python tools/bench/pruning_steps.py [--rounds 15] [--steps 10] [--markdown TABLE]

ResNet-20 on random 32x32 images in batches of 64, 80 % of the weights pruned, no mask due while it
is timed. Arms take turns, round by round, and each is compared with the unpruned one of its own
library in the same round. About 10 minutes on two cores; wants a quiet machine. TFMOT and tf_keras
are in the extra `dev`.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import keras
import numpy as np
from rich.console import Console

from tfaccel.core.artifacts import write_aside
from tfaccel.pruning import ConstantSparsity, UpdatePruning, prune

BATCH = 64
FAR = 10**6


def resnet20(library: Any) -> Any:
    """Builds ResNet-20 (He et al. 2016, section 4.2) of either Keras."""
    layers = library.layers

    def convolve(x: Any, filters: int, window: int, strides: int = 1) -> Any:
        x = layers.Conv2D(filters, window, strides=strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    inputs = library.Input((32, 32, 3))
    x = layers.ReLU()(convolve(inputs, 16, 3))
    for filters in (16, 32, 64):
        for block in range(3):
            strides = 2 if filters > 16 and block == 0 else 1
            y = layers.ReLU()(convolve(x, filters, 3, strides))
            y = convolve(y, filters, 3)
            shortcut = convolve(x, filters, 1, strides) if strides > 1 else x
            x = layers.ReLU()(layers.Add()([y, shortcut]))
    x = layers.GlobalAveragePooling2D()(x)
    return library.Model(inputs, layers.Dense(10)(x))


def arm(library: Any, rewrite: Callable[[Any], Any] | None, callback: Any, jit: bool) -> Any:
    """Returns a function that trains for some steps, and has trained for a few already."""
    import tensorflow as tf

    random = np.random.default_rng(0)
    images = random.normal(size=(BATCH, 32, 32, 3)).astype("float32")
    labels = random.integers(0, 10, BATCH)
    flow = tf.data.Dataset.from_tensors((images, labels)).cache().repeat()
    model = resnet20(library)
    model = model if rewrite is None else rewrite(model)
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(library.optimizers.SGD(0.01, momentum=0.9), loss, jit_compile=jit)
    ends: list[float] = []

    class Stopwatch(library.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
            ends.append(time.perf_counter())

    callbacks = [*([] if callback is None else [callback()]), Stopwatch()]

    def run(steps: int) -> float:
        ends.clear()
        model.fit(flow, steps_per_epoch=steps + 1, verbose=0, callbacks=callbacks)
        return float(np.median(np.diff(ends)))

    run(3)
    return run


def main() -> None:
    """Times all arms in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="of each arm in a round")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    import tensorflow_model_optimization as tfmot
    import tf_keras

    theirs = tfmot.sparsity.keras

    def by_tfmot(model: Any) -> Any:
        schedule = theirs.ConstantSparsity(0.8, 0, frequency=FAR)
        return theirs.prune_low_magnitude(model, schedule)

    lines = [
        "| compiled by XLA | arm | step [ms] | to unpruned (quartiles) |",
        "| --- | --- | ---: | ---: |",
    ]
    for jit in (False, True):
        arms = {
            "Keras 3": arm(keras, None, None, jit),
            "Keras 3, tfaccel": arm(
                keras,
                lambda m: prune(m, ConstantSparsity(0.8, 0, frequency=FAR)),
                UpdatePruning,
                jit,
            ),
            "tf_keras": arm(tf_keras, None, None, jit),
        }
        try:
            arms["tf_keras, TFMOT"] = arm(tf_keras, by_tfmot, theirs.UpdatePruningStep, jit)
        except Exception as error:  # noqa: BLE001  whatever it is, it belongs in the table
            lines.append(
                f"| {'yes' if jit else 'no'} | tf_keras, TFMOT | fails: {type(error).__name__} | |"
            )
        times: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(options.rounds):
            for name, run in arms.items():
                times[name].append(run(options.steps))
        for name, values in times.items():
            base = times[name.split(",", maxsplit=1)[0]]
            ratios = np.array(values) / np.array(base)
            low, middle, high = np.percentile(ratios, [25, 50, 75])
            lines.append(
                f"| {'yes' if jit else 'no'} | {name} | {1e3 * np.median(values):.1f} | "
                f"{middle:.3f} ({low:.3f} to {high:.3f}) |"
            )
            Console(stderr=True).print(lines[-1])
    table = "\n".join(lines) + "\n"
    print(table, end="")
    if options.markdown:
        with write_aside(options.markdown) as aside:
            aside.write_text(table)


if __name__ == "__main__":
    main()
