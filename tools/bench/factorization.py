"""Low-rank and separable convolutions in a VGG16-style network: MACs saved against accuracy.

One network is trained; `factorize` takes it to several shares of its MACs, `separable` to what its
form costs; each is fine-tuned. The control that could have won: the same architecture made narrower
by one factor for all layers, to the same MACs, trained from scratch for as many epochs as training
and fine-tuning had together.

    python tools/bench/factorization.py --data fashion_mnist --work runs --json result.json

Every model is kept in the work folder as soon as it is trained, so that a run that was stopped goes
on where it was.
"""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import keras
from keras import layers

import tfaccel
from tfaccel.core.artifacts import load_model, save_model
from tfaccel.export import to_tflite
from tfaccel.measurement import count
from tfaccel.recipes import load_data
from tfaccel.recipes.data import Split, Splits
from tfaccel.recipes.schema import DataSettings
from tfaccel.rewriting.factorization import factorize, plan_factorization
from tfaccel.rewriting.separation import separable

# Simonyan & Zisserman 2015, configuration D; the end of each stage halves the image.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
HEAD = 512

SHARES = (0.75, 0.5, 0.35, 0.25)
MULTIPLE_OF = 4
BATCH_SIZE = 128
RATE, TUNING_RATE = 1e-3, 5e-4
WEIGHT_DECAY = 1e-2
FIT_SAMPLES = 512  # whose activations the decompositions are fitted to


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the result of a run."""

    data: str
    width: float
    samples: int
    epochs: int
    tuning_epochs: int
    seed: int
    shares: tuple[float, ...] = SHARES
    multiple_of: int = MULTIPLE_OF


@dataclasses.dataclass
class Row:
    """One arm of the comparison."""

    arm: str
    target: float | None
    macs: int = 0
    macs_share: float = 0.0
    parameters: int = 0
    size_bytes: int = 0
    latency_ms: float = 0.0
    accuracy_by_weights: float | None = None  # decomposed without data, before fine-tuning
    accuracy_before_tuning: float | None = None
    accuracy: float = 0.0
    epochs: int = 0
    seconds: float = 0.0


def network(input_shape: tuple[int, ...], classes: int, width: float) -> keras.Model:
    """Returns a VGG16 with batch normalization for small images, channels times `width`."""

    def scaled(channels: int) -> int:
        return max(1, round(channels * width))

    x = inputs = keras.Input(input_shape)
    for stage, filters in enumerate(STAGES, 1):
        for place, channels in enumerate(filters, 1):
            name = f"conv{stage}_{place}"
            x = layers.Conv2D(scaled(channels), 3, padding="same", use_bias=False, name=name)(x)
            x = layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(x)
            x = layers.ReLU(name=f"{name}_relu")(x)
        x = layers.MaxPooling2D(padding="same", name=f"pool{stage}")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(scaled(HEAD), activation="relu", name="hidden")(x)
    x = layers.Dropout(0.3, name="dropout")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name="vgg16")


def narrower(input_shape: tuple[int, ...], classes: int, macs: int) -> keras.Model:
    """Returns the widest of these networks that takes at most so many MACs."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        within = (count(network(input_shape, classes, middle)).macs or 0) <= macs
        low, high = (middle, high) if within else (low, middle)
    return network(input_shape, classes, low)


class Bench:
    """The arms of one run, what they share, and the folder that keeps what is done."""

    def __init__(self, settings: Settings, data: Splits, folder: Path) -> None:
        self.settings = settings
        self.data = data
        self.folder = folder
        self.rows: list[Row] = []
        self._began = time.perf_counter()

    def run(self) -> list[Row]:
        """Runs all arms."""
        settings, x = self.settings, self.data.train.x[:FIT_SAMPLES]
        shape, classes = self.data.input_shape, self.data.classes
        both = settings.epochs + settings.tuning_epochs

        def fresh() -> keras.Model:
            return network(shape, classes, settings.width)

        baseline = self.arm("baseline", None, fresh, settings.epochs, RATE)
        total = count(baseline).macs or 1

        def cost(model: keras.Model) -> float:
            return count(model).macs or 0

        self.arm("baseline, trained as long", None, fresh, both, RATE)
        for share in settings.shares:
            goal: dict[str, Any] = {
                "macs": share,
                "cost": cost,
                "multiple_of": settings.multiple_of,
            }

            def smaller(goal: dict[str, Any] = goal) -> keras.Model:
                plan = plan_factorization(baseline, data=x, **goal)
                self.say("\n".join(map(str, plan)))
                return factorize(baseline, data=x, **goal)

            def by_weights(goal: dict[str, Any] = goal) -> keras.Model:
                return factorize(baseline, **goal)

            self.arm("factorize", share, smaller, settings.tuning_epochs, TUNING_RATE, by_weights)
        self.arm(
            "separable", None, lambda: separable(baseline, x), settings.tuning_epochs, TUNING_RATE
        )
        for row in [row for row in self.rows if row.arm in ("factorize", "separable")]:
            self.arm(
                f"narrower, as {row.arm}",
                row.target,
                lambda macs=row.macs: narrower(shape, classes, macs),  # type: ignore[misc]
                both,
                RATE,
            )
        for row in self.rows:
            row.macs_share = row.macs / total
        return self.rows

    def arm(
        self,
        name: str,
        target: float | None,
        make: Callable[[], keras.Model],
        epochs: int,
        rate: float,
        by_weights: Callable[[], keras.Model] | None = None,
    ) -> keras.Model:
        """Makes, trains and measures one model, or takes it from the folder."""
        slug = "".join(c if c.isalnum() else "_" for c in f"{name} {target or ''}".strip())
        kept, record = self.folder / f"{slug}.keras", self.folder / f"{slug}.json"
        if record.exists():
            self.rows.append(Row(**json.loads(record.read_text())))
            self.say(f"{name} {target or ''}: taken from {kept}")
            return load_model(kept)
        began = time.perf_counter()
        keras.utils.set_random_seed(self.settings.seed)
        row = Row(name, target, epochs=epochs)
        model = make()
        if by_weights is not None:
            row.accuracy_by_weights = self.accuracy(by_weights())
        if rate == TUNING_RATE:
            row.accuracy_before_tuning = self.accuracy(model)
        self.fit(model, epochs, rate, f"{name} {target or ''}".strip())
        row.accuracy = self.accuracy(model)
        row.seconds = time.perf_counter() - began
        artifact = to_tflite(
            model, self.folder / f"{slug}.tflite", verify_data=self.data.test.x[:16]
        )
        found = tfaccel.measure(artifact.path)
        row.macs, row.parameters = count(model).macs or 0, count(model).parameters
        row.size_bytes, row.latency_ms = found.size_bytes, found.latency_ms or 0.0
        save_model(model, kept)
        record.write_text(json.dumps(dataclasses.asdict(row), indent=1))
        self.rows.append(row)
        return model

    def fit(self, model: keras.Model, epochs: int, rate: float, name: str) -> None:
        """Trains with AdamW, its rate falling to zero along a cosine."""
        train = self.data.train
        steps = epochs * -(-len(train) // BATCH_SIZE)
        schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
        self.compile(model, keras.optimizers.AdamW(schedule, weight_decay=WEIGHT_DECAY))

        def told(epoch: int, logs: dict[str, float] | None) -> None:
            numbers = ", ".join(f"{key} {value:.4f}" for key, value in (logs or {}).items())
            self.say(f"{name}: epoch {epoch + 1}/{epochs}, {numbers}")

        callback = keras.callbacks.LambdaCallback(on_epoch_end=told)
        model.fit(
            *train.arrays, batch_size=BATCH_SIZE, epochs=epochs, verbose=0, callbacks=[callback]
        )

    def accuracy(self, model: keras.Model) -> float:
        """Returns the accuracy on the test split."""
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
        self.compile(copy, "sgd")
        found = copy.evaluate(*self.data.test.arrays, batch_size=256, verbose=0, return_dict=True)
        return float(found["accuracy"])

    @staticmethod
    def compile(model: keras.Model, optimizer: Any) -> None:
        """Compiles for integer labels."""
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"])

    def say(self, text: str) -> None:
        """Shows what is going on, on stderr."""
        print(f"[{time.perf_counter() - self._began:7.1f} s] {text}", file=sys.stderr, flush=True)


def table(rows: list[Row]) -> str:
    """Returns the rows as a markdown table."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    head = (
        "| arm | MACs | of baseline | parameters | TFLite kB | ms | by weights only "
        f"| before tuning | accuracy | epochs |\n| --- |{' --: |' * 9}"
    )
    lines = [
        f"| {row.arm}{f' {row.target:g}' if row.target else ''} | {row.macs:,} "
        f"| {percent(row.macs_share)} | {row.parameters:,} | {row.size_bytes / 1e3:,.0f} "
        f"| {row.latency_ms:.3f} | {percent(row.accuracy_by_weights)} "
        f"| {percent(row.accuracy_before_tuning)} | {percent(row.accuracy)} | {row.epochs} |"
        for row in rows
    ]
    return "\n".join([head, *lines])


def limited(split: Split, samples: int) -> Split:
    """Returns the first samples of a split, which is shuffled already."""
    return Split(split.x[:samples], split.y[:samples])


@click.command(help=__doc__)
@click.option("--data", default="fashion_mnist", help="fashion_mnist, cifar10 or an .npz file.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for models.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File for results.")
@click.option("--width", default=0.25, help="Factor on the channels of VGG16.")
@click.option("--samples", default=12_000, help="Training samples.")
@click.option("--epochs", default=6, help="For the baseline.")
@click.option("--tuning-epochs", default=2, help="For each rewritten model.")
@click.option("--seed", default=0)
@click.option("--quick", is_flag=True, help="Tiny, to see that it runs.")
def main(
    data: str,
    work: Path,
    json_path: Path | None,
    width: float,
    samples: int,
    epochs: int,
    tuning_epochs: int,
    seed: int,
    quick: bool,
) -> None:
    """Runs all arms, prints the table, writes the JSON."""
    settings = Settings(data, width, samples, epochs, tuning_epochs, seed)
    if quick:
        settings = Settings(data, 0.125, 512, 1, 1, seed, shares=(0.5,))
    splits = load_data(DataSettings(name=data, validation=0.1), seed)
    splits = dataclasses.replace(
        splits,
        train=limited(splits.train, settings.samples),
        test=limited(splits.test, 512) if quick else splits.test,
    )
    told = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    folder = work / hashlib.sha256(told.encode()).hexdigest()[:12]  # other settings, other models
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(settings, splits, folder)
    rows = bench.run()
    print(table(rows))
    if json_path is not None:
        device = tfaccel.measure(folder / "baseline.tflite", runs=1).device
        facts = {
            "settings": dataclasses.asdict(settings),
            "data_digest": splits.digest,
            "device": device,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
