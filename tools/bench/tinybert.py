"""TinyBERT on SST-2: how a 2-layer student comes out of plain training and out of each stage.

    python tools/bench/tinybert.py WORK --data ../shared/data/sst2

The teacher has 6 layers; it is pre-trained as a masked language model on the training sentences
without their labels, then fine-tuned. Each student has the same architecture and is trained from
another seed in each run. Controls that could have won: plain training with its best number of
epochs, plain training on the augmented text, and masked-language-model pre-training of the student
itself. All arms keep their best epoch by accuracy on dev.tsv; test.tsv is looked at once.

What is finished is kept in WORK, so that a run that was stopped goes on where it was.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import click
import keras
import numpy as np

from tfaccel.architectures.bert import BERT
from tfaccel.core.artifacts import load_model, save_model, write_aside, write_json
from tfaccel.distillation import Distiller, LogitDistillation
from tfaccel.distillation.augmentation import substitute, word_candidates
from tfaccel.distillation.masked_language_model import (
    MaskedLanguageModel,
    pretrain,
    warm_up_and_decay,
)
from tfaccel.distillation.tinybert import distill_general, distill_task, with_encoder_weights
from tfaccel.distillation.tokenization import text_tokens, word_vectorizer
from tfaccel.export import to_tflite

ARMS = {
    "plain": "labels",
    "logits": "logits",
    "task": "task stage only",
    "both": "both stages",
    "plain_augmented": "labels, augmented text",
    "logits_augmented": "logits, augmented text",
    "pretrained": "masked words, then labels",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the result of a run."""

    vocabulary: int = 8000
    length: int = 32
    heads: int = 4
    teacher_depth: int = 6
    teacher_width: int = 128
    teacher_feed_forward: int = 256
    student_depth: int = 2
    student_width: int = 64
    pretraining_epochs: int = 20
    pretraining_rate: float = 1e-3
    fine_tuning_epochs: int = 6
    fine_tuning_rates: tuple[float, ...] = (2e-4, 5e-4)
    plain_epochs: int = 12
    augmented_epochs: int = 4
    plain_rates: tuple[float, ...] = (5e-4, 1e-3)
    patience: int = 4
    general_epochs: int = 15
    copies: int = 4
    intermediate_epochs: int = 3
    prediction_epochs: int = 3
    rate: float = 1e-3
    batch_size: int = 64
    samples: int | None = None


QUICK = Settings(
    vocabulary=500,
    length=12,
    teacher_depth=2,
    teacher_width=8,
    teacher_feed_forward=8,
    student_depth=1,
    student_width=8,
    pretraining_epochs=1,
    fine_tuning_epochs=1,
    fine_tuning_rates=(1e-3,),
    plain_epochs=1,
    augmented_epochs=1,
    plain_rates=(1e-3,),
    general_epochs=1,
    copies=1,
    intermediate_epochs=1,
    prediction_epochs=1,
    samples=128,
)


def read_split(path: Path, samples: int | None) -> tuple[list[str], Any]:
    """Returns sentences and labels of a file of lines: sentence, tab, label."""
    rows = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = rows[:samples]
    return [sentence for sentence, _ in rows], np.array([int(label) for _, label in rows])


class Bench:
    """The arms of one run, what they share, and the folder that keeps what is done."""

    def __init__(self, settings: Settings, data: Path, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.rows_path = folder / "rows.json"
        self.rows: list[dict[str, Any]] = []
        if self.rows_path.exists():
            self.rows = json.loads(self.rows_path.read_text())
        self._began = time.perf_counter()
        texts, self.labels = read_split(data / "train.tsv", settings.samples)
        # The sentences are in lower case, their punctuation set apart by spaces.
        vectorizer = word_vectorizer(
            texts, settings.vocabulary, settings.length, standardize="lower"
        )
        self.vocabulary = vectorizer.vocabulary_size()
        self.tokens = text_tokens(vectorizer, texts)
        splits = (read_split(data / f"{name}.tsv", settings.samples) for name in ("dev", "test"))
        self.dev, self.test = ((text_tokens(vectorizer, x), y) for x, y in splits)

    def run(self, seeds: int) -> None:
        """Trains what is not there yet."""
        model = self.masked_language_model()
        teacher = self.teacher(model.encoder)
        augmented = self.augmented(model)
        done = {(row["arm"], row["seed"]) for row in self.rows}
        arms = tuple(ARMS)
        for group in (arms[:4], arms[4:]):  # the controls last
            for seed, arm in itertools.product(range(seeds), group):
                if (arm, seed) in done:
                    continue
                began = time.perf_counter()
                keras.utils.set_random_seed(seed)
                student = self.student(arm, seed, teacher, model.encoder, augmented)
                self.record(arm, seed, student, time.perf_counter() - began)

    # What all arms share

    def masked_language_model(self) -> MaskedLanguageModel:
        """Returns the teacher's encoder, pre-trained on the sentences."""
        path, settings = self.folder / "masked_language_model.keras", self.settings
        if not path.exists():
            encoder = self.bert(None, teacher=True)
            model = pretrain(
                encoder,
                self.tokens,
                epochs=settings.pretraining_epochs,
                batch_size=settings.batch_size,
                learning_rate=settings.pretraining_rate,
                seed=0,
                jit_compile=False,
                callbacks=[self.progress("pre-training")],
            )
            save_model(model, path)
        loaded = load_model(path)
        assert isinstance(loaded, MaskedLanguageModel)  # noqa: S101
        return loaded

    def teacher(self, encoder: keras.Model) -> keras.Model:
        """Returns the fine-tuned teacher, the best of the learning rates by dev accuracy."""
        path = self.folder / "teacher.keras"
        if not path.exists():
            began = time.perf_counter()
            new = with_encoder_weights(self.bert(2, teacher=True), encoder)
            best = self.best_rate(new, self.settings.fine_tuning_rates, self.tokens, self.labels)
            save_model(best, path)
            self.record("teacher", 0, best, time.perf_counter() - began)
        return load_model(path)

    def augmented(self, model: MaskedLanguageModel) -> Any:
        """Returns the sentences and their augmented copies, behind them."""
        path = self.folder / "candidates.npy"
        if not path.exists():
            self.say("candidates of all words")
            candidates = word_candidates(model, self.tokens, min(15, self.vocabulary - 4))
            with write_aside(path) as aside:
                np.save(aside, candidates.astype(np.int16))
        more = substitute(
            self.tokens, np.load(path).astype(np.int32), copies=self.settings.copies, seed=0
        )
        return np.concatenate([self.tokens, more])

    # Arms

    def student(
        self, arm: str, seed: int, teacher: keras.Model, encoder: keras.Model, augmented: Any
    ) -> keras.Model:
        """Returns a trained student."""
        settings = self.settings
        if arm in ("task", "both"):
            return self.taught_inside(seed, teacher, encoder if arm == "both" else None, augmented)
        tokens, labels = self.tokens, self.labels
        if arm.endswith("augmented"):
            tokens = augmented
            labels = np.concatenate([labels, np.repeat(labels, settings.copies)])
        student = self.bert(2, seed=seed)
        if arm == "pretrained":
            own = self.bert(None, seed=seed)
            pretrain(
                own,
                self.tokens,
                epochs=settings.pretraining_epochs,
                batch_size=settings.batch_size,
                learning_rate=settings.pretraining_rate,
                seed=seed,
                jit_compile=False,
            )
            student = with_encoder_weights(student, own)
        by_logits = teacher if arm.startswith("logits") else None
        return self.best_rate(student, settings.plain_rates, tokens, labels, by_logits)

    def taught_inside(
        self, seed: int, teacher: keras.Model, encoder: keras.Model | None, augmented: Any
    ) -> keras.Model:
        """Returns a student after the task stage, and before it, with `encoder`, the general one.

        Args:
            seed: of the student.
            teacher: of the task stage.
            encoder: teacher of the general stage; None to leave that out.
            augmented: text of the task stage.
        """
        settings = self.settings
        student, general = self.bert(2, seed=seed), None
        if encoder is not None:
            general = distill_general(
                encoder,
                self.bert(None, seed=seed),
                self.tokens,
                epochs=settings.general_epochs,
                batch_size=settings.batch_size,
                learning_rate=settings.rate,
                seed=seed,
                jit_compile=False,
            )
            student = with_encoder_weights(student, general.student)
        distill_task(
            teacher,
            student,
            augmented,
            intermediate_epochs=settings.intermediate_epochs,
            prediction_epochs=settings.prediction_epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.rate,
            general=general,
            validation_data=self.dev,
            seed=seed,
            jit_compile=False,
            callbacks=[self.best_epoch()],
        )
        return student

    # Tools

    def bert(self, classes: int | None, *, teacher: bool = False, seed: int = 0) -> keras.Model:
        """Returns a new model of the teacher's or the student's size."""
        settings = self.settings
        role = "teacher" if teacher else "student"
        return BERT(
            self.vocabulary,
            settings.length,
            depth=settings.teacher_depth if teacher else settings.student_depth,
            width=settings.teacher_width if teacher else settings.student_width,
            heads=settings.heads,
            feed_forward=settings.teacher_feed_forward if teacher else None,
            classes=classes,
            seed=seed,
            name=role,
        )

    def best_rate(
        self,
        model: keras.Model,
        rates: tuple[float, ...],
        tokens: Any,
        labels: Any,
        teacher: keras.Model | None = None,
    ) -> keras.Model:
        """Returns the best of copies of a model, trained with one learning rate each, by dev.

        Args:
            model: what to begin with.
            rates: highest learning rates to try.
            tokens: [n, length].
            labels: [n].
            teacher: to learn from its logits in place of the labels.
        """
        settings = self.settings
        x, found = tokens, []
        if teacher is not None:
            logits = teacher.predict(tokens, batch_size=256, verbose=0)
            x = {"inputs": tokens, "teacher_outputs": logits}
        for rate in rates:
            copy = keras.models.clone_model(model)
            copy.set_weights(model.get_weights())
            trained = copy
            if teacher is not None:
                loss = LogitDistillation(temperature=1.0)
                trained = Distiller(teacher, copy, alpha=0.0, losses=loss)
            is_teacher = model.name == "teacher"
            if is_teacher:
                epochs = settings.fine_tuning_epochs
            elif len(tokens) > len(self.tokens):
                epochs = settings.augmented_epochs
            else:
                epochs = settings.plain_epochs
            steps = epochs * -(-len(tokens) // settings.batch_size)
            self.compile(trained, warm_up_and_decay(rate, steps))
            callbacks = [self.best_epoch()]
            if is_teacher:
                callbacks.append(self.progress(f"fine-tuning at {rate:g}"))
            trained.fit(
                x,
                labels,
                batch_size=settings.batch_size,
                epochs=epochs,
                validation_data=self.dev,
                callbacks=callbacks,
                verbose=0,
            )
            found.append((self.accuracy(copy, self.dev), copy))
        return max(found, key=lambda pair: pair[0])[1]

    @staticmethod
    def compile(model: keras.Model, rate: Any) -> None:
        """Compiles for integer labels."""
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = keras.optimizers.AdamW(rate, weight_decay=0.01)
        model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)

    def best_epoch(self) -> keras.callbacks.Callback:
        """Goes back to the best epoch by accuracy on dev."""
        return keras.callbacks.EarlyStopping(
            "val_accuracy",
            mode="max",
            patience=self.settings.patience,
            restore_best_weights=True,
        )

    @staticmethod
    def accuracy(model: keras.Model, split: tuple[Any, Any]) -> float:
        """Returns the share of texts that are told right."""
        logits = model.predict(split[0], batch_size=256, verbose=0)
        return float(np.mean(np.argmax(logits, axis=-1) == split[1]))

    def record(self, arm: str, seed: int, model: keras.Model, seconds: float) -> None:
        """Measures a model and keeps the row."""
        path = self.folder / f"{'teacher' if arm == 'teacher' else 'student'}.tflite"
        row = {
            "arm": arm,
            "seed": seed,
            "dev_accuracy": self.accuracy(model, self.dev),
            "test_accuracy": self.accuracy(model, self.test),
            "parameters": model.count_params(),
            "size_bytes": to_tflite(model, path).size_bytes,
            "seconds": seconds,
        }
        self.rows.append(row)
        write_json(self.rows_path, self.rows)
        self.say(
            f"{arm} {seed}: dev {row['dev_accuracy']:.2%}, test {row['test_accuracy']:.2%}, "
            f"{seconds:.0f} s"
        )

    def progress(self, what: str) -> keras.callbacks.Callback:
        """Says after each epoch how it went."""

        def tell(epoch: int, logs: dict[str, float]) -> None:
            told = ", ".join(f"{name} {value:.4f}" for name, value in logs.items())
            self.say(f"{what}, epoch {epoch + 1}: {told}")

        return keras.callbacks.LambdaCallback(on_epoch_end=tell)

    def say(self, text: str) -> None:
        """Shows what is going on, on stderr."""
        print(f"[{time.perf_counter() - self._began:7.1f} s] {text}", file=sys.stderr, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a markdown table, a line for each arm."""
    lines = [
        "| model | trained by | dev | test | runs | parameters | TFLite kB | seconds |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for arm, label in {"teacher": "masked words, then labels", **ARMS}.items():
        runs = [row for row in rows if row["arm"] == arm]
        if not runs:
            continue
        dev, test = (
            spread([row[f"{split}_accuracy"] for row in runs]) for split in ("dev", "test")
        )
        role = "teacher" if arm == "teacher" else "student"
        lines.append(
            f"| {role} | {label} | {dev} | {test} | {len(runs)} | {runs[0]['parameters']:,} "
            f"| {runs[0]['size_bytes'] / 1e3:,.0f} "
            f"| {statistics.mean(row['seconds'] for row in runs):,.0f} |"
        )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Returns mean and standard deviation, in percent."""
    told = f"{statistics.mean(values):.2%}"
    return f"{told} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else told


@click.command(help=__doc__)
@click.argument("work", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder with train.tsv, dev.tsv and test.tsv.",
)
@click.option("--seeds", default=3, help="Students of each arm.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File for results.")
@click.option("--quick", is_flag=True, help="Tiny, to see that it runs.")
def main(work: Path, data: Path, seeds: int, json_path: Path | None, quick: bool) -> None:
    """Runs all arms, prints the table, writes the JSON."""
    settings = QUICK if quick else Settings()
    told = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    folder = work / hashlib.sha256(told.encode()).hexdigest()[:12]  # other settings, other models
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(settings, data, folder)
    bench.run(seeds)
    print(table(bench.rows))
    if json_path is not None:
        write_json(json_path, {"settings": dataclasses.asdict(settings), "rows": bench.rows})


if __name__ == "__main__":
    main()
