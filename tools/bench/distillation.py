"""What each way of distillation gives a small student, beside training on labels alone.

    python tools/bench/distillation.py WORK [--cifar10 CIFAR.npz] [--datasets fashion_mnist cifar10]
        [--images 10000] [--teacher-epochs 8] [--epochs 6] [--seeds 3] [--markdown TABLE]

A ResNet-20 teaches a MobileNetV2 of width 0.35 and the published strides on Fashion-MNIST (from
Keras, KERAS_HOME) and on CIFAR-10 (`x_train`, `y_train`, `x_test`, `y_test` in an .npz; without one
by Keras). All networks see the same images for the same steps, without augmentation, and are scored
on the 10,000 test images, which nothing else looks at. Every arm but the first has logit
distillation in it, so that each stands beside plain distillation ("KD"); the weights of the
additional losses are the papers', where those fit, and were not tuned here. The gap arms teach a
far smaller convolutional network, directly and by way of an assistant whose parameters are the
geometric mean. What the teachers say is cached on disk (`cache_teacher`), for all arms alike. WORK
keeps what is finished: a killed run goes on.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import keras
import numpy as np
from keras import layers
from rich.console import Console
from small_images import Data, mobilenet_v2, read_data, resnet20

from tfaccel.core.artifacts import write_aside
from tfaccel.distillation import (
    AttentionTransfer,
    ContrastiveRepresentation,
    DecoupledDistillation,
    Distiller,
    HintLoss,
    LogitDistillation,
    RelationalDistillation,
    SimilarityPreserving,
    at_pairs,
    cache_teacher,
    ensemble,
    pair_layers,
)

BATCH = 128
RATE = 3e-3
TEMPERATURE = 4.0
ALPHA = 0.1  # Hinton 2015: most of the weight is the teacher's
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CONSOLE = Console(stderr=True)

Losses = Callable[[keras.Model, keras.Model, int], tuple[list[Any], list[float]]]


def kd() -> LogitDistillation:
    """Returns plain logit distillation."""
    return LogitDistillation(TEMPERATURE)


def hints(teacher: keras.Model, student: keras.Model, samples: int) -> Any:  # noqa: ARG001
    """The middle of the network, as in FitNets."""
    pairs = pair_layers(teacher, student)
    return [kd(), *at_pairs(HintLoss(), pairs[len(pairs) // 2 : len(pairs) // 2 + 1])], [1.0, 1.0]


def attention(teacher: keras.Model, student: keras.Model, samples: int) -> Any:  # noqa: ARG001
    """Every resolution; a sum of squares over unit maps is small, so that the weight is large."""
    pairs = pair_layers(teacher, student)
    return [kd(), *at_pairs(AttentionTransfer(), pairs)], [1.0] + [10.0] * len(pairs)


def at_the_end(loss: Any, weight: float) -> Losses:
    """Losses on what the classifier reads."""

    def losses(teacher: keras.Model, student: keras.Model, samples: int) -> Any:  # noqa: ARG001
        return [kd(), *at_pairs(loss, [(pooled(teacher), pooled(student))])], [1.0, weight]

    return losses


def contrastive(teacher: keras.Model, student: keras.Model, samples: int) -> Any:
    """CRD with its memory; fewer negatives than for the paper's 50,000 images."""
    loss = ContrastiveRepresentation(samples=samples, draws=min(4096, samples), seed=1)
    return [kd(), *at_pairs(loss, [(pooled(teacher), pooled(student))])], [1.0, 0.8]


def decoupled(teacher: keras.Model, student: keras.Model, samples: int) -> Any:  # noqa: ARG001
    """DKD alone, in place of KD."""
    return [DecoupledDistillation()], [1.0]


def pooled(model: keras.Model) -> str:
    """Returns the name of the pooling layer before the classifier."""
    kinds = layers.GlobalAveragePooling2D
    return str(next(x.name for x in reversed(model.layers) if isinstance(x, kinds)))


FEATURES: dict[str, tuple[str, Losses]] = {
    "fitnets": ("KD + hints (FitNets)", hints),
    "at": ("KD + attention transfer", attention),
    "sp": ("KD + similarity-preserving", at_the_end(SimilarityPreserving(), 100.0)),
    "rkd": ("KD + relational", at_the_end(RelationalDistillation(), 1.0)),
    "crd": ("KD + CRD", contrastive),
    "dkd": ("decoupled KD", decoupled),
}


def tiny(shape: tuple[int, int, int], classes: int, width: int = 4) -> keras.Model:
    """Builds three plain convolutions: what is left on a small microcontroller."""
    inputs = keras.Input(shape)
    x = inputs
    for factor in (1, 2, 4):
        x = layers.Conv2D(width * factor, 3, strides=2, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes)(x), name="tiny")


class Bench:
    """The arms on one data set."""

    def __init__(self, dataset: str, options: argparse.Namespace) -> None:
        self.dataset, self.options = dataset, options
        self.work = options.work / dataset
        self.work.mkdir(parents=True, exist_ok=True)
        self.data: Data = read_data(dataset, options.cifar10, options.images)
        self.shape = self.data[0].shape[1:]

    def train(self, model: keras.Model, data: Any, epochs: int) -> None:
        """Trains with Adam, the rate falling to zero as a cosine."""
        steps = len(self.data[0]) // BATCH * epochs
        schedule = keras.optimizers.schedules.CosineDecay(RATE, steps)
        # On a CPU, XLA compiles for longer than these runs take, and its steps are slower.
        model.compile(keras.optimizers.Adam(schedule), LOSS, jit_compile=False)
        model.fit(data, epochs=epochs, shuffle=False, verbose=0)

    def plain(self, seed: int) -> Any:
        """Returns the training images in batches, with the number of each."""
        import tensorflow as tf

        x, y, *_ = self.data
        numbers = np.arange(len(x), dtype="int32")
        flow = tf.data.Dataset.from_tensor_slices(({"inputs": x, "sample_index": numbers}, y))
        return flow.shuffle(len(x), seed=seed).batch(BATCH, drop_remainder=True).prefetch(2)

    def labels_alone(self, model: keras.Model, seed: int, epochs: int) -> keras.Model:
        """Trains a model on labels."""
        flow = self.plain(seed).map(lambda x, y: (x["inputs"], y))
        self.train(model, flow, epochs)
        return model

    def kept(self, name: str, make: Callable[[], keras.Model]) -> keras.Model:
        """Returns a model from WORK, made first if it is not there."""
        file = self.work / f"{name}.keras"
        if not file.exists():
            model = make()
            with write_aside(file) as aside:
                model.save(aside)
        return keras.models.load_model(file, compile=False)

    @functools.cache  # noqa: B019  lives as long as the bench
    def teacher(self, seed: int = 1) -> keras.Model:
        """Returns a trained teacher."""

        def make() -> keras.Model:
            keras.utils.set_random_seed(seed)
            return self.labels_alone(resnet20(self.shape, 10), seed, self.options.teacher_epochs)

        return self.kept(f"teacher-{seed}", make)

    @functools.cache  # noqa: B019
    def teachers(self) -> keras.Model:
        """Returns the mean of two teachers."""
        return ensemble([self.teacher(1), self.teacher(2)])

    @functools.cache  # noqa: B019
    def assistant(self) -> keras.Model:
        """Returns a teacher's assistant, taught by the teacher."""

        def make() -> keras.Model:
            keras.utils.set_random_seed(11)
            student = self.sized(self.between())
            self.cached(self.teacher(), student, 11)
            return student

        return self.kept("assistant", make)

    def sized(self, width: int) -> keras.Model:
        """Returns an untrained network of the small kind."""
        return tiny(self.shape, 10, width)

    def between(self) -> int:
        """Returns the width whose parameters are nearest the geometric mean of the gap's ends."""
        ends = self.teacher().count_params(), self.sized(4).count_params()
        wanted = float(np.sqrt(ends[0] * ends[1]))
        return min(range(4, 65), key=lambda w: abs(self.sized(w).count_params() - wanted))

    def distill(
        self,
        teacher: keras.Model,
        student: keras.Model,
        seed: int,
        losses: Sequence[Any],
        weights: Sequence[float],
    ) -> None:
        """Distills from what the teacher said once."""
        x, y, *_ = self.data
        names = sorted({loss.teacher_layer_name for loss in losses if hasattr(loss, "make_head")})
        folder = self.work / "-".join(["said-by", teacher.name, id_of(teacher), *names])
        cache = cache_teacher(teacher, x, folder, layers=names)
        flow = cache.dataset(x, y, BATCH, drop_remainder=True, seed=seed)
        distiller = Distiller(cache, student, alpha=ALPHA, losses=losses, loss_weights=weights)
        self.train(distiller, flow, self.options.epochs)

    def cached(self, teacher: keras.Model, student: keras.Model, seed: int) -> None:
        """Distills logits."""
        self.distill(teacher, student, seed, [kd()], [1.0])

    def with_features(self, losses: Losses, student: keras.Model, seed: int) -> None:
        """Distills with losses that look inside."""
        chosen, weights = losses(self.teacher(), student, len(self.data[0]))
        self.distill(self.teacher(), student, seed, chosen, weights)

    def arms(self) -> dict[str, tuple[str, str, Callable[[int], keras.Model]]]:
        """Returns title, student and training by key."""
        epochs = self.options.epochs

        def student(seed: int) -> keras.Model:
            keras.utils.set_random_seed(seed)
            return mobilenet_v2(self.shape, 10, 0.35, 32)

        def small(seed: int) -> keras.Model:
            keras.utils.set_random_seed(seed)
            return self.sized(4)

        def taught(make: Any, train: Callable[[keras.Model, int], Any]) -> Any:
            def run(seed: int) -> keras.Model:
                model = make(seed)
                train(model, seed)
                return model

            return run

        mobile, plain = "MobileNetV2 0.35", "3 convolutions"
        found = {
            "hard": ("labels alone", mobile, taught(student, self.by_labels(epochs))),
            "kd": ("KD", mobile, taught(student, lambda m, s: self.cached(self.teacher(), m, s))),
        }
        for key, (title, losses) in FEATURES.items():
            train = functools.partial(self.with_features, losses)
            found[key] = (title, mobile, taught(student, train))
        found["ensemble"] = (
            "KD from two teachers",
            mobile,
            taught(student, lambda m, s: self.cached(self.teachers(), m, s)),
        )
        found["gap-hard"] = ("labels alone", plain, taught(small, self.by_labels(epochs)))
        found["gap-kd"] = (
            "KD, directly",
            plain,
            taught(small, lambda m, s: self.cached(self.teacher(), m, s)),
        )
        found["gap-takd"] = (
            "KD by way of an assistant (TAKD)",
            plain,
            taught(small, lambda m, s: self.cached(self.assistant(), m, s)),
        )
        return found

    def by_labels(self, epochs: int) -> Callable[[keras.Model, int], Any]:
        """Returns training on labels alone."""
        return lambda model, seed: self.labels_alone(model, seed, epochs)

    def row(self, key: str, seed: int, make: Callable[[int], keras.Model]) -> dict[str, float]:
        """Returns what one training gave, from WORK if it is there."""
        file = self.work / f"{key}-{seed}.json"
        if not file.exists():
            start = time.perf_counter()
            model = make(seed)
            row = {
                "accuracy": self.score(model),
                "parameters": model.count_params(),
                "seconds": time.perf_counter() - start,
            }
            with write_aside(file) as aside:
                aside.write_text(json.dumps(row))
            CONSOLE.print(self.dataset, key, seed, row)
        return dict(json.loads(file.read_text()))

    def score(self, model: keras.Model) -> float:
        """Returns the test accuracy."""
        logits = model.predict(self.data[2], batch_size=500, verbose=0)
        return float((logits.argmax(1) == self.data[3]).mean())


def id_of(model: keras.Model) -> str:
    """Returns a few digits that tell one set of weights from another."""
    total = sum(float(np.abs(weight).sum()) for weight in model.get_weights())
    return f"{total:.6f}".replace(".", "")[-8:]


def time_epochs(bench: Bench) -> str:
    """Returns what an epoch takes with the teacher at work, and with its cached logits."""
    x, y, *_ = bench.data
    x, y = x[:2560], y[:2560]
    cache = cache_teacher(bench.teacher(), x, bench.work / "logits-timed")
    flows = {
        "teacher at work": (bench.teacher(), (x, y)),
        "cached": (cache, (cache.dataset(x, y, BATCH),)),
    }
    seconds: dict[str, list[float]] = {title: [] for title in flows}
    fits = {}
    for title, (teacher, arguments) in flows.items():
        model = Distiller(teacher, mobilenet_v2(bench.shape, 10, 0.35, 32), losses=kd())
        model.compile("adam", LOSS, jit_compile=False)
        options: dict[str, Any] = {"verbose": 0, "shuffle": False}
        if len(arguments) == 2:
            options["batch_size"] = BATCH
        fits[title] = functools.partial(model.fit, *arguments, **options)
        fits[title]()
    for _ in range(5):  # in turns, so that a busy minute hits both
        for title, fit in fits.items():
            start = time.perf_counter()
            fit()
            seconds[title].append(time.perf_counter() - start)
    medians = {title: float(np.median(times)) for title, times in seconds.items()}
    return f"{bench.dataset}: seconds per epoch of {len(x):,} images: " + ", ".join(
        f"{title} {value:.2f}" for title, value in medians.items()
    )


def main() -> None:
    """Runs all arms on all data sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for what is finished")
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--datasets", nargs="+", default=["fashion_mnist", "cifar10"])
    parser.add_argument("--arms", nargs="+", help="some of them; all by default")
    parser.add_argument("--images", type=int, default=10000, help="to train on")
    parser.add_argument("--teacher-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6, help="of every student")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each arm")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    lines = [
        "| data | student | parameters | learns from | accuracy, mean | lowest to highest | s |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    notes = []
    for dataset in options.datasets:
        bench = Bench(dataset, options)
        score = bench.score(bench.teacher())
        size = bench.teacher().count_params()
        lines.append(
            f"| {dataset} | *ResNet-20, the teacher* | {size:,} | labels | {score:.1%} | | |"
        )
        for key, (title, student, make) in bench.arms().items():
            if options.arms and key not in options.arms:
                continue
            rows = [bench.row(key, seed, make) for seed in range(options.seeds)]
            found = np.array([row["accuracy"] for row in rows])
            lines.append(
                f"| {dataset} | {student} | {int(rows[0]['parameters']):,} | {title} | "
                f"{found.mean():.1%} | {found.min():.1%} to {found.max():.1%} | "
                f"{np.median([row['seconds'] for row in rows]):.0f} |"
            )
        notes.append(time_epochs(bench))
    table = "\n".join([*lines, "", *notes]) + "\n"
    print(table, end="")
    if options.markdown:
        with write_aside(options.markdown) as aside:
            aside.write_text(table)


if __name__ == "__main__":
    main()
