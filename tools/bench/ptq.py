"""Post-training quantization of a trained ImageNet network: what each method leaves of its top-1.

Half of the photos, drawn by a seed, calibrate; the other half is scored, and nothing else sees it.
Every arm is measured twice: in Keras, and as the .tflite file by LiteRT. The peers are
TFLiteConverter's own int8 and AI Edge Quantizer's int8 and int4, given the same photos.

    python tools/bench/ptq.py runs --model mobilenet_v2.keras --images imagenet-mini-jpeg.npz

Each arm is kept in the work folder as soon as it is done, so that a run that was stopped goes on.
"""

import dataclasses
import fnmatch
import io
import itertools
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import keras
import numpy as np
import numpy.typing as npt

from tfaccel.core.artifacts import load_model
from tfaccel.export import to_tflite
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.quantization.equalization import equalize
from tfaccel.quantization.post_training import quantize
from tfaccel.quantization.rounding import AdaRound
from tfaccel.quantization.schemes import Scheme

Array = npt.NDArray[Any]

MEAN = 255 * np.array((0.485, 0.456, 0.406))
STANDARD_DEVIATION = 255 * np.array((0.229, 0.224, 0.225))
BATCH = 25
ALL_FOUR = Scheme("int4", 4, 8)  # the ends in 4 bits too, as the peer has them


@dataclasses.dataclass
class Row:
    """One way to quantize; accuracies are top-1 on the photos held out."""

    arm: str
    seconds: float
    keras_accuracy: float | None
    accuracy: float
    size_bytes: int
    float_tensors: int
    seconds_per_image: float


@dataclasses.dataclass(frozen=True)
class Photos:
    """What calibrates, and what is scored."""

    calibration: Array
    x: Array
    labels: Array


def read_photos(path: Path, seed: int, limit: int | None) -> Photos:
    """Decodes the photos and divides them in halves."""
    from PIL import Image

    with np.load(path) as file:
        content, offsets, labels = file["jpeg"].tobytes(), file["offset"], file["label"]
    pictures = [
        np.asarray(Image.open(io.BytesIO(content[begin:end])).convert("RGB"))
        for begin, end in itertools.pairwise(offsets)
    ]
    x = ((np.stack(pictures) - MEAN) / STANDARD_DEVIATION).astype("float32")
    order = np.random.default_rng(seed).permutation(len(x))
    half = len(x) // 2
    first, second = order[:half][:limit], order[half:][:limit]
    return Photos(x[first], x[second], labels[second])


class Bench:
    """The arms of one run, and the folder that keeps what is done."""

    def __init__(self, model: keras.Model, photos: Photos, folder: Path, arms: str) -> None:
        self.model = model
        self.arms = arms
        self.photos = photos
        self.folder = folder
        self.rows: list[Row] = []

    def arm(self, name: str, make: Callable[[Path], keras.Model | None]) -> None:
        """Runs one arm, unless its result is in the folder; `make` writes the .tflite file."""
        if not fnmatch.fnmatchcase(name, self.arms):
            return
        stem = name.replace(" ", "_").replace(",", "").replace("%", "")
        kept, path = self.folder / f"{stem}.json", self.folder / f"{stem}.tflite"
        if not kept.exists():
            began = time.perf_counter()
            model = make(path)
            seconds = time.perf_counter() - began
            if model is not None:
                model.save(path.with_suffix(".keras"))
            in_keras = (
                None if model is None else self.score(model.predict, batch_size=BATCH, verbose=0)
            )
            file = TFLiteModel(path)
            began = time.perf_counter()
            accuracy = self.score(file.predict)
            each = (time.perf_counter() - began) / len(self.photos.x)
            row = Row(name, seconds, in_keras, accuracy, path.stat().st_size, floats_of(path), each)
            kept.write_text(json.dumps(dataclasses.asdict(row)))
        self.rows.append(Row(**json.loads(kept.read_text())))
        print(line(self.rows[-1]), flush=True)

    def score(self, predict: Callable[..., Any], **options: Any) -> float:
        """Returns the share of the photos held out that a model names."""
        return float(np.mean(predict(self.photos.x, **options).argmax(-1) == self.photos.labels))

    def ours(self, name: str, scheme: str | Scheme, **options: Any) -> None:
        """An arm of `quantize`."""

        def make(path: Path) -> keras.Model:
            model = quantize(self.model, self.photos.calibration, scheme, **options)
            to_tflite(model, path)
            return model

        self.arm(name, make)

    def run(self) -> None:
        """Runs all arms, those that matter most first."""

        def whole(path: Path) -> keras.Model:
            to_tflite(self.model, path)
            return self.model

        def converter(path: Path) -> None:
            to_tflite(self.model, path, "int8", representative_data=self.photos.calibration)

        def data_free(path: Path, **options: Any) -> keras.Model:
            equalized = equalize(self.model, **options)
            to_tflite(equalized, path)
            return equalized

        def through_relu6(path: Path, **options: Any) -> keras.Model:
            model = equalize(self.model, replace_relu6=True)
            made = quantize(model, self.photos.calibration, calibrator="minmax", **options)
            to_tflite(made, path)
            return made

        self.arm("float32", whole)
        self.ours("int8", "int8", correct_bias=False)
        self.ours("int4 gptq", "int4", rounding="gptq")
        self.arm("TFLiteConverter int8", converter)
        self.arm("AI Edge Quantizer int8", lambda path: self.edge(path, 8))
        self.arm("AI Edge Quantizer int4", lambda path: self.edge(path, 4))
        self.ours("int4 nearest", "int4", correct_bias=False)
        self.ours("int8 gptq", "int8", rounding="gptq")
        self.ours("int4 adaround", "int4", rounding=AdaRound())
        self.ours("int4 nearest, bias corrected", "int4")
        self.arm("float32 equalized without data", data_free)
        self.arm("float32 equalized through ReLU6", partial(data_free, replace_relu6=True))
        self.arm("int8 minmax, equalized through ReLU6", partial(through_relu6, correct_bias=False))
        self.arm("int8 minmax, equalized through ReLU6, bias corrected", through_relu6)
        equalized = {"equalize": True, "calibrator": "minmax"}
        self.ours("int8 minmax, equalized without data", "int8", correct_bias=False, **equalized)
        analytic = {**equalized, "correct_bias": "analytic"}
        self.ours("int8 minmax, equalized, analytic bias", "int8", **analytic)
        for calibrator in ("minmax", "moving_average", "entropy", "mse", "auto"):
            self.ours(f"int8 {calibrator}", "int8", calibrator=calibrator, correct_bias=False)
        self.ours("int4 gptq, ends too", ALL_FOUR, rounding="gptq")

    def edge(self, path: Path, bits: int) -> None:
        """Writes AI Edge Quantizer's file, of weights in so many bits, by minimum and maximum."""
        from ai_edge_quantizer import quantizer, recipe

        source = self.folder / "float32.tflite"
        recipes = recipe.static_wi8_ai8()
        for entry in recipes:
            entry["op_config"]["weight_tensor_config"]["num_bits"] = bits
        tool = quantizer.Quantizer(str(source))
        tool.load_quantization_recipe(recipes)
        name = self.model.inputs[0].name
        samples = [{name: x[np.newaxis]} for x in self.photos.calibration]
        result = tool.calibrate({"serving_default": samples}, num_threads=2)
        path.unlink(missing_ok=True)
        tool.quantize(result).export_model(str(path))


def floats_of(path: Path) -> int:
    """Returns how many values inside a file are float."""
    from tfaccel.export import audit

    return len(audit(path).float_tensors)


def line(row: Row) -> str:
    """Returns a row of the table."""
    in_keras = "-" if row.keras_accuracy is None else f"{row.keras_accuracy:.1%}"
    return (
        f"| {row.arm:40} | {in_keras:>6} | {row.accuracy:6.1%} | {row.size_bytes / 1e6:6.2f} MB | "
        f"{row.float_tensors:4} | {row.seconds:6.0f} s | {1000 * row.seconds_per_image:7.1f} ms |"
    )


@click.command()
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--model", "model_file", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--images", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--seed", default=0, show_default=True, help="Of the halves.")
@click.option("--arms", default="*", show_default=True, help="Pattern of the arms to run.")
@click.option("--limit", type=int, help="Photos of each half, for a quick look.")
def main(
    work: Path, model_file: Path, images: Path, seed: int, arms: str, limit: int | None
) -> None:
    """Prints the table, and writes it to WORK/ptq.json."""
    work.mkdir(parents=True, exist_ok=True)
    photos = read_photos(images, seed, limit)
    print("| arm | Keras | .tflite | size | float values | time | per image |", flush=True)
    bench = Bench(load_model(model_file), photos, work, arms)
    bench.run()
    rows = [dataclasses.asdict(row) for row in bench.rows]
    (work / "ptq.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.exit(main())
