"""Every way to fewer bits beside the others: accuracy, size and latency of small networks.

    python tools/bench/quantization.py WORK [--cifar10 CIFAR.npz] [--datasets fashion_mnist cifar10]
        [--networks resnet20 mobilenet_v2] [--arms float qat_int8 ...] [--images 10000] [--epochs 6]
        [--tuning 2] [--test 5000] [--markdown TABLE]

ResNet-20 (He et al. 2016) and MobileNetV2 (width 0.5) on Fashion-MNIST (from Keras, KERAS_HOME) and
on CIFAR-10 (`x_train`, `y_train`, `x_test`, `y_test` in an .npz; without one by Keras). A float
network is trained; arms that train go on from it for the same steps, with the same batches, seed
and learning rates, the float one too; arms without training take what the float arm ends as, and
256 training images to calibrate. The peer is TFMOT's QAT on tf_keras, which starts from the same
weights in a process of its own (quantization_peer.py). Every arm ends as a .tflite file, of batch
one, and that file is scored on test images. No runtime computes in clusters, ternary or binary
weights: their files are float32 files, and the weights are stored in the size that is given beside,
by `save_compressed` and `save_packed`. Files are timed at the end, turn by turn, on one thread.
WORK keeps files and rows: a killed run goes on.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import keras
import numpy as np
from rich.console import Console
from small_images import NETWORKS, Data, read_data

import tfaccel
from tfaccel.core.artifacts import write_aside, write_json
from tfaccel.export import audit, to_tflite
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.quantization.clustering import cluster
from tfaccel.quantization.compression import save_compressed
from tfaccel.quantization.low_bit import low_bit
from tfaccel.quantization.packing import save_packed
from tfaccel.quantization.post_training import quantize
from tfaccel.quantization.training import quantize_aware

BATCH = 128
CALIBRATION = 256
ROUNDS = 5
RUNS = 20
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
PEER = Path(__file__).parent / "quantization_peer.py"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to fewer bits.

    Attributes:
        title: what the table calls it.
        make: for an arm that trains `model -> model`, to be trained next; for one that does not
            `(trained, samples, path) -> None`, which writes the file; None for the peer.
        trains: whether it does.
        store: writes the trained model in few bits for each weight, and returns the bytes.
    """

    title: str
    make: Callable[..., Any] | None
    trains: bool = False
    store: Callable[[keras.Model, Path], int] | None = None


def exported(scheme: str | None, **options: Any) -> Callable[..., None]:
    """Returns what exports the float model by a scheme of the converter's."""

    def make(model: keras.Model, samples: Any, path: Path) -> None:
        more = {"representative_data": samples} if options.get("calibrated") else {}
        to_tflite(model, path, scheme, **more)

    return make


def calibrated(scheme: str = "int8", **options: Any) -> Callable[..., None]:
    """Returns what quantizes after training."""

    def make(model: keras.Model, samples: Any, path: Path) -> None:
        to_tflite(quantize(model, samples, scheme, samples=CALIBRATION, **options), path)

    return make


def packed(model: keras.Model, path: Path) -> int:
    """Stores one or two bits for each weight; returns the bytes without the architecture."""
    size = save_packed(model, path)
    return size.size_bytes - size.header_bytes


def compressed(model: keras.Model, path: Path) -> int:
    """Stores shared values and Huffman's codes; returns the bytes of the file."""
    return save_compressed(model, path).stat().st_size


ARMS: dict[str, Arm] = {
    "float": Arm("float32", lambda model: model, trains=True),
    "float16": Arm("float16", exported("float16")),
    "dynamic_int8": Arm("dynamic int8", exported("dynamic_int8")),
    "converter_int8": Arm("TFLiteConverter, int8", exported("int8", calibrated=True)),
    **{
        f"ptq_{name}": Arm(f"PTQ int8, {name}", calibrated(calibrator=name, correct_bias=False))
        for name in ("minmax", "moving_average", "percentile", "entropy", "mse", "auto")
    },
    "ptq_corrected": Arm("PTQ int8, percentile, bias corrected", calibrated()),
    "ptq_int4": Arm("PTQ int4, GPTQ", calibrated("int4", rounding="gptq")),
    "qat_int8": Arm("QAT int8", quantize_aware, trains=True),
    "tfmot_int8": Arm("TFMOT's QAT int8 (tf_keras)", None, trains=True),
    "qat_int4": Arm("QAT int4", lambda model: quantize_aware(model, "int4"), trains=True),
    "cluster32": Arm("32 clusters", lambda model: cluster(model, 32, seed=1), True, compressed),
    "cluster16": Arm("16 clusters", lambda model: cluster(model, 16, seed=1), True, compressed),
    "twn": Arm("TWN, 2 bits", lambda model: low_bit(model, "twn", seed=1), True, packed),
    "xnor": Arm(
        "XNOR-Net, 1 bit, inputs too", lambda model: low_bit(model, "xnor", seed=1), True, packed
    ),
}


def train(model: keras.Model, data: Data, epochs: int, rate: float) -> float:
    """Trains with Adam, the rate falling to zero as a cosine; half of the images are mirrored.

    Returns:
        The median time of a step of the last epoch, in milliseconds.
    """
    import tensorflow as tf

    x, y, *_ = data
    batch = min(BATCH, len(x))
    steps = len(x) // batch * epochs
    flow = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=1)
    flow = flow.batch(batch, drop_remainder=True)
    flow = flow.map(lambda a, b: (tf.image.random_flip_left_right(a, seed=1), b)).prefetch(2)
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, max(steps, 1)))
    # On a CPU, XLA compiles for longer than these runs take, and its steps are slower.
    model.compile(optimizer, LOSS, jit_compile=False)
    times = Times()
    model.fit(flow, epochs=epochs, shuffle=False, verbose=0, callbacks=[times])
    return float(np.median(times.seconds) * 1e3)


class Times(keras.callbacks.Callback):
    """Keeps the seconds of each step of the last epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._began = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Forgets the epoch before, in which the graph was made."""
        self.seconds = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Starts the watch."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Stops it."""
        self.seconds.append(time.perf_counter() - self._began)


class Combination:
    """The arms of one network on one data set."""

    def __init__(self, dataset: str, network: str, options: argparse.Namespace) -> None:
        self.dataset, self.network, self.options = dataset, network, options
        x, y, x_test, y_test = read_data(dataset, options.cifar10, options.images)
        self.data = x, y, x_test[: options.test], y_test[: options.test]
        self.start = self.stem("start").with_suffix(".keras")
        self.trained = self.stem("float").with_suffix(".keras")

    def stem(self, key: str) -> Path:
        """Returns the path of an arm's files, without their suffix."""
        return Path(self.options.work) / f"{self.dataset}-{self.network}-{key}"

    def run(self, key: str) -> None:
        """Makes an arm's file, scores it, and writes its row; what is done is left as it is."""
        stem = self.stem(key)
        if stem.with_suffix(".json").exists():
            return
        self._prepare()
        if key != "float" and not self.trained.exists():
            self.run("float")
        began = time.perf_counter()
        path = stem.with_suffix(".tflite")
        row = self._train_arm(key, path) if ARMS[key].trains else self._make(key, path)
        row["seconds"] = time.perf_counter() - began
        began = time.perf_counter()
        row["accuracy"] = self._score(TFLiteModel(path).predict)
        row["seconds_of_scoring"] = time.perf_counter() - began
        row["size_bytes"] = path.stat().st_size
        row["gzip_bytes"] = tfaccel.measurement.measure_gzip_size(path)
        if key.startswith(("converter", "ptq", "qat", "tfmot")):
            row["float_tensors"] = len(audit(path).float_tensors)
        write_json(stem.with_suffix(".json"), row)

    def _prepare(self) -> None:
        if self.start.exists():
            return
        keras.utils.set_random_seed(self.options.seed)
        model = NETWORKS[self.network](self.data[0].shape[1:], 10)
        train(model, self.data, self.options.epochs, 3e-3)
        with write_aside(self.start) as aside:
            model.save(aside)

    def _make(self, key: str, path: Path) -> dict[str, Any]:
        make: Any = ARMS[key].make
        model = keras.models.load_model(self.trained, compile=False)
        make(model, self.data[0][:CALIBRATION], path)
        return {}

    def _train_arm(self, key: str, path: Path) -> dict[str, Any]:
        arm = ARMS[key]
        if arm.make is None:
            return self._call_peer(path)
        keras.utils.set_random_seed(100 + self.options.seed)
        model = arm.make(keras.models.load_model(self.start, compile=False))
        row: dict[str, Any] = {"step_ms": train(model, self.data, self.options.tuning, 1e-3)}
        row["accuracy_in_keras"] = self._score(
            lambda x: model.predict(x, batch_size=500, verbose=0)
        )
        to_tflite(model, path)
        if key == "float":
            with write_aside(self.trained) as aside:
                model.save(aside)
        if arm.store is not None:
            row["stored_bytes"] = arm.store(model, path.with_suffix(".bin"))
        return row

    def _call_peer(self, path: Path) -> dict[str, Any]:
        options = self.options
        command = [sys.executable, "-W", "ignore", str(PEER), str(self.start), str(path)]
        command += [f"--dataset={self.dataset}", f"--images={options.images}"]
        command += [f"--tuning={options.tuning}", f"--seed={100 + options.seed}"]
        if options.cifar10:
            command.append(f"--cifar10={options.cifar10}")
        found = subprocess.run(command, check=False, capture_output=True, text=True)
        if found.returncode:
            raise RuntimeError(f"The peer failed: {found.stderr[-2000:]}")
        return dict(json.loads(found.stdout.splitlines()[-1]))

    def _score(self, predict: Callable[[Any], Any]) -> float:
        _, _, x, y = self.data
        return float((np.asarray(predict(x)).argmax(1) == y).mean())


def measure_all(paths: list[Path], file: Path) -> dict[str, float]:
    """Returns the median latency of each file, timed in turns so that a busy minute hits all."""
    found: dict[str, list[float]] = {path.stem: [] for path in paths}
    for _ in range(ROUNDS):
        for path in paths:
            found[path.stem].append(tfaccel.measure(path, runs=RUNS).latency_ms)
    medians = {name: float(np.median(times)) for name, times in found.items()}
    write_json(file, medians)
    return medians


def to_markdown(done: list[tuple[Combination, str]], latency: dict[str, float]) -> str:
    """Returns the rows as a table."""
    lines = [
        "| data | network | arm | accuracy | in Keras | .tflite [kB] | gzip [kB] | stored [kB] "
        "| latency [ms] | step [ms] | float values |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for combination, key in done:
        stem = combination.stem(key)
        row = json.loads(stem.with_suffix(".json").read_text())
        in_keras, step, stored, floats = (
            "" if name not in row else form(row[name])
            for name, form in (
                ("accuracy_in_keras", "{:.1%}".format),
                ("step_ms", "{:.0f}".format),
                ("stored_bytes", lambda size: f"{size / 1e3:.1f}"),
                ("float_tensors", str),
            )
        )
        lines.append(
            f"| {combination.dataset} | {combination.network} | {ARMS[key].title} | "
            f"{row['accuracy']:.1%} | {in_keras} | {row['size_bytes'] / 1e3:.1f} | "
            f"{row['gzip_bytes'] / 1e3:.1f} | {stored} | {latency[stem.name]:.2f} | {step} | "
            f"{floats} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs all arms, then times them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for finished files and rows")
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--datasets", nargs="+", default=["fashion_mnist", "cifar10"])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--images", type=int, default=10000, help="to train on")
    parser.add_argument("--test", type=int, default=5000, help="images to score on")
    parser.add_argument("--epochs", type=int, default=6, help="of the float network")
    parser.add_argument("--tuning", type=int, default=2, help="epochs of every arm that trains")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    console = Console(stderr=True)
    options.work.mkdir(parents=True, exist_ok=True)
    done = []
    for network in options.networks:
        for dataset in options.datasets:
            combination = Combination(dataset, network, options)
            for key in options.arms:
                combination.run(key)
                done.append((combination, key))
                row = json.loads(combination.stem(key).with_suffix(".json").read_text())
                console.print(combination.stem(key).name, row)
    paths = [combination.stem(key).with_suffix(".tflite") for combination, key in done]
    table = to_markdown(done, measure_all(paths, options.work / "latency.json"))
    print(table, end="")
    if options.markdown:
        with write_aside(options.markdown) as aside:
            aside.write_text(table)


if __name__ == "__main__":
    main()
