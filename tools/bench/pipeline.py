"""The bubble of a pipeline: how long stages wait, predicted and measured.

    python tools/bench/pipeline.py [--steps 6] [--kinds waiting,dense] [--markdown TABLE]

Ranks of Horovod on this machine, one stage each. `waiting` layers take a time that is proportional
to the samples and need no processor, so that four stages can be seen on two cores; `dense` layers
compute, one thread each. Then two pipelines of two stages side by side train as one process does.
Some five minutes on two idle cores; needs the Horovod wheel.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")

import keras
import numpy as np
import tensorflow as tf

import tfaccel.distributed as hvd
from tfaccel.core.artifacts import write_aside
from tfaccel.distributed.jobs import run_workers

BATCH = 64
WAIT_SECONDS = 0.02  # of a sample, forward, and as much backward
MICRO_BATCHES = (1, 2, 4, 8, 16)
CASES = [("waiting", 2), ("waiting", 4), ("dense", 2)]


def nap(values: Any) -> Any:
    """Waits in proportion to the samples."""
    time.sleep(WAIT_SECONDS * values.shape[0])
    return values


@tf.custom_gradient
def wait(values: Any) -> Any:
    """The identity, slowly, forward and backward."""

    def slowly(tensor: Any) -> Any:
        result = tf.py_function(nap, [tensor], tensor.dtype)
        result.set_shape(tensor.shape)
        return result

    return slowly(values), slowly


@keras.saving.register_keras_serializable("bench")
class Waiting(keras.layers.Layer):
    """A layer that takes time and no processor."""

    def call(self, inputs: Any) -> Any:
        """Passes its input on."""
        return wait(inputs)


def make_model(kind: str, stages: int) -> keras.Model:
    """Returns a model of as many equally slow blocks as there are stages."""
    keras.utils.set_random_seed(0)
    layers: list[Any] = [keras.Input((512,))]
    for number in range(stages):
        if kind == "waiting":
            layers += [Waiting(), keras.layers.Dense(512, name=f"end{number}")]
        else:
            layers += [keras.layers.Dense(2048, activation="relu") for _ in range(3)]
            layers += [keras.layers.Dense(512, name=f"end{number}")]
    return keras.Sequential(layers)


def work(folder: Path, steps: int, kinds: list[str]) -> None:
    """What each rank does."""
    hvd.init()
    x = np.random.default_rng(0).normal(size=(BATCH * (steps + 1), 512)).astype("float32")
    rows = []
    for kind, stages in CASES:
        if stages != hvd.size() or kind not in kinds:
            continue
        for count in MICRO_BATCHES:
            cuts = [f"end{number}" for number in range(stages - 1)]
            pipeline = hvd.Pipeline(make_model(kind, stages), micro_batches=count, cuts=cuts)
            pipeline.compile("sgd", "mse")
            pipeline.fit(x, x, batch_size=BATCH, verbose=0)
            assert pipeline.times is not None  # noqa: S101 - there were steps
            times = pipeline.times
            rows.append((kind, stages, count, times.expected_bubble, times.bubble, times.step_ms))
    found = {"rows": rows, "error": compare_two_by_two() if hvd.size() == 4 else None}
    if hvd.rank() == 0:
        (folder / "result.json").write_text(json.dumps(found))
    hvd.shutdown()


def compare_two_by_two() -> float:
    """Returns the largest difference of a weight after ten steps, Adam, clipped by global norm."""
    random = np.random.default_rng(1)
    x, y = random.normal(size=(170, 512)).astype("float32"), np.zeros((170, 512), "float32")
    models = [make_small(), make_small()]
    pipeline = hvd.Pipeline(models[0], cuts=["half"], micro_batches=3)
    for trained in (pipeline, models[1]):
        trained.compile(keras.optimizers.Adam(0.001, global_clipnorm=1.0), "mse")
        trained.fit(x, y, batch_size=34, epochs=2, shuffle=False, verbose=0)
    pairs = zip(models[0].get_weights(), models[1].get_weights(), strict=True)
    return max(float(np.abs(one - other).max()) for one, other in pairs)


def make_small() -> keras.Model:
    """Returns a model of two layers."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, "tanh", name="half"), keras.layers.Dense(512)]
    return keras.Sequential([keras.Input((512,)), *layers])


def main() -> None:
    """Runs the jobs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--kinds", default="waiting,dense")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.steps, arguments.kinds.split(","))
        return
    lines = [
        "| layers | stages | micro-batches | bubble, (S-1)/(M+S-1) | measured | step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for size in (2, 4):
        with tempfile.TemporaryDirectory() as name:
            command = [sys.executable, __file__, "--work", name, "--kinds", arguments.kinds]
            command += ["--steps", str(arguments.steps)]
            run_workers(command, size, timeout=500)
            found = json.loads(Path(name, "result.json").read_text())
        for kind, stages, count, expected, measured, step_ms in found["rows"]:
            lines.append(
                f"| {kind} | {stages} | {count} | {expected:.1%} | {measured:.1%} "
                f"| {step_ms:,.0f} ms |"
            )
        if found["error"] is not None:
            print(f"2 x 2 ranks against one process: weights differ by {found['error']:.1e}")
    text = "\n".join(lines)
    print(text)
    if arguments.markdown:
        with write_aside(arguments.markdown) as aside:
            aside.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
