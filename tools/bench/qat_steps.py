"""What a step of quantization-aware training costs: float, quantized, and TFMOT on tf_keras.

    python tools/bench/qat_steps.py [--rounds 15] [--steps 10] [--markdown TABLE]

ResNet-20 on random 32x32 images and MobileNetV2 on random 96x96 images, both in batches of 64, int8
with every way of finding ranges. Arms take turns, round by round, and each is compared with the
float one of its own library in the same round. Some 25 minutes on two cores; wants a quiet machine.
TFMOT and tf_keras are in the extra `dev`.
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
from tfaccel.quantization import quantize_aware

NETWORKS = {"ResNet-20, 32x32": ("resnet20", 32), "MobileNetV2, 96x96": ("mobilenet", 96)}


def resnet20(library: Any, size: int) -> Any:
    """Builds ResNet-20 (He et al. 2016, section 4.2) of either Keras."""
    layers = library.layers

    def convolve(x: Any, filters: int, window: int, strides: int = 1) -> Any:
        x = layers.Conv2D(filters, window, strides=strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    inputs = library.Input((size, size, 3))
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


def mobilenet(library: Any, size: int) -> Any:
    """Builds MobileNetV2 (Sandler et al. 2018) as either Keras has it."""
    return library.applications.MobileNetV2(
        (size, size, 3), weights=None, classes=10, classifier_activation=None
    )


BUILDERS: dict[str, Callable[[Any, int], Any]] = {"resnet20": resnet20, "mobilenet": mobilenet}


def arm(
    library: Any, network: str, rewrite: Callable[[Any], Any] | None, batch: int, *, jit: bool
) -> Callable[[int], float]:
    """Returns a function that trains for some steps, and has trained for a few already.

    It gives the median time of a step in seconds.
    """
    import tensorflow as tf

    builder, size = NETWORKS[network]
    random = np.random.default_rng(0)
    images = random.normal(size=(batch, size, size, 3)).astype("float32")
    labels = random.integers(0, 10, batch)
    flow = tf.data.Dataset.from_tensors((images, labels)).cache().repeat()
    model = BUILDERS[builder](library, size)
    model = model if rewrite is None else rewrite(model)
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(library.optimizers.SGD(0.01, momentum=0.9), loss, jit_compile=jit)
    ends: list[float] = []

    class Stopwatch(library.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
            ends.append(time.perf_counter())

    def run(steps: int) -> float:
        ends.clear()
        model.fit(flow, steps_per_epoch=steps + 1, verbose=0, callbacks=[Stopwatch()])
        return float(np.median(np.diff(ends)))

    run(3)
    return run


def by_ranges(ranges: str) -> Callable[[Any], Any]:
    """Returns the rewrite that finds ranges in one way."""
    return lambda model: quantize_aware(model, ranges=ranges)


def arms_of(network: str, batch: int, *, jit: bool) -> tuple[dict[str, Any], list[str]]:
    """Returns the arms, and a line for each that could not be made."""
    import tensorflow_model_optimization as tfmot
    import tf_keras

    makers: dict[str, tuple[Any, Any]] = {
        "Keras 3": (keras, None),
        "Keras 3, tfaccel": (keras, by_ranges("ema")),
        "Keras 3, tfaccel, LSQ": (keras, by_ranges("lsq")),
        "Keras 3, tfaccel, PACT": (keras, by_ranges("pact")),
        "tf_keras": (tf_keras, None),
        "tf_keras, TFMOT": (tf_keras, tfmot.quantization.keras.quantize_model),
    }
    made: dict[str, Any] = {}
    failed = []
    for name, (library, rewrite) in makers.items():
        try:
            made[name] = arm(library, network, rewrite, batch, jit=jit)
        except Exception as error:  # noqa: BLE001, PERF203  whatever it is, the table says so
            compiled = "yes" if jit else "no"
            failed.append(f"| {network} | {compiled} | {name} | fails: {type(error).__name__} | |")
    return made, failed


def main() -> None:
    """Times all arms in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="of each arm in a round")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--jit", nargs="*", choices=("no", "yes"), default=["no", "yes"])
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    lines = [
        "| network | compiled by XLA | arm | step [ms] | to float (quartiles) |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for network in options.networks:
        for jit in options.jit:
            arms, failed = arms_of(network, options.batch, jit=jit == "yes")
            lines += failed
            times: dict[str, list[float]] = {name: [] for name in arms}
            for _ in range(options.rounds):
                for name, run in arms.items():
                    times[name].append(run(options.steps))
            for name, values in times.items():
                ratios = np.array(values) / np.array(times[name.split(",", maxsplit=1)[0]])
                low, middle, high = np.percentile(ratios, [25, 50, 75])
                lines.append(
                    f"| {network} | {jit} | {name} | {1e3 * np.median(values):.1f} | "
                    f"{middle:.3f} ({low:.3f} to {high:.3f}) |"
                )
                Console(stderr=True).print(lines[-1])
            keras.backend.clear_session()
    table = "\n".join(lines) + "\n"
    print(table, end="")
    if options.markdown:
        with write_aside(options.markdown) as aside:
            aside.write_text(table)


if __name__ == "__main__":
    main()
