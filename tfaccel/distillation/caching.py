"""What a teacher says about each training sample, asked once and kept on disk."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfaccel.core import keras_private
from tfaccel.core.artifacts import write_json
from tfaccel.core.checks import check_in, check_model, check_type
from tfaccel.distillation.extraction import FINAL
from tfaccel.distillation.feature_losses import check_layer_name
from tfaccel.distillation.fingerprints import hash_data, hash_model
from tfaccel.distillation.losses import LogitDistillation
from tfaccel.distillation.stored_batches import EpochOrder, as_arrays, stored_batches
from tfaccel.distillation.stored_outputs import StoredOutputs
from tfaccel.distillation.views import Augment, probe, same_probe, view_seeds, viewer

_RECORD = "cache.json"
_SECONDS = 5.0  # between two notes of what is done
_WORDS = {
    "teacher": "the teacher is another, or has other weights",
    "data": "the data are others",
    "augmented": "one was made with augment=, the other is without",
}


def cache_teacher(
    teacher: keras.Model,
    x: Any,
    path: str | os.PathLike[str],
    *,
    batch_size: int = 256,
    layers: Sequence[str] = (),
    top: int | None = None,
    dtype: str = "float16",
    augment: Augment | None = None,
    views: int = 1,
    seed: int = 0,
    verbose: int = 0,
) -> "TeacherCache":
    """Returns what a teacher says about each sample, computed once and kept in a folder.

    A run that is killed goes on where it stopped when it is started again; a finished cache is
    opened at once. `cache.dataset(x, y, batch_size)` is then what a `Distiller(cache, student)` is
    fitted to.

    With `augment`, each sample has `views` versions, made from (seed, index of the sample, number
    of the version) alone: the teacher sees exactly what the student will see (Beyer 2022, "A good
    teacher is patient and consistent").

    Args:
        teacher: a built Functional or Sequential model with one output.
        x: the training inputs, an array or a structure of arrays; anything that is sliced and
            indexed like a numpy array, such as a `numpy.memmap` beyond memory.
        path: folder to keep it in.
        batch_size: samples that the teacher sees at a time.
        layers: names of layers whose outputs are kept too.
        top: keep only the largest logits of each sample, this many, and the probability of the
            others together, which is then spread evenly over these; None keeps all logits.
        dtype: "float16" or "float32", of what is kept.
        augment: `augment(sample, seed)` gives another version of one sample; seed is [2] int32, for
            TensorFlow's stateless random operations (`tf.image.stateless_random_flip_left_right`).
        views: versions of each sample; epoch e of the data uses version e mod views.
        seed: of the versions.
        verbose: 1 shows progress.

    Raises:
        TypeError: the teacher has no graph, or an argument is of another type.
        ValueError: `path` holds the cache of something else, the outputs do not fit the type, or an
            argument makes no sense.
    """
    check_model(teacher, "cache_teacher")
    x = as_arrays("x", x)
    check_in("dtype", dtype, ("float16", "float32"))
    _check_count("batch_size", batch_size)
    _check_count("views", views)
    check_type("seed", seed, int)
    if views > 1 and augment is None:
        raise ValueError(
            f"views={views} without augment= would keep the same outputs {views} times. "
            "Give augment(sample, seed), or leave views at 1."
        )
    for name in layers:
        check_layer_name("teacher", teacher, name)
    functional = keras_private.functional_of(teacher)
    if not isinstance(functional.output, keras.KerasTensor):
        raise ValueError(  # noqa: TRY004 (it is a model, of the wrong form)
            f"cache_teacher() needs a teacher with one output, but {teacher.name!r} has several. "
            "Make a model of the one that is to be learnt from: "
            "keras.Model(teacher.inputs, teacher.outputs[0])."
        )
    if top is not None:
        _check_count("top", top)
        LogitDistillation().validate_model_compatibility(teacher, teacher)
        classes = functional.output.shape[-1]
        if top >= classes:
            raise ValueError(f"top={top} of {classes} classes keeps all. Leave top out.")
    made_of = {
        "teacher": hash_model(teacher),
        "data": hash_data(x),
        "samples": len(keras.tree.flatten(x)[0]),
        "layers": list(layers),
        "top": top,
        "dtype": dtype,
        "views": views,
        "seed": seed,
        "augmented": augment is not None,
    }
    if Path(path).exists() and not Path(path).is_dir():
        raise NotADirectoryError(f"{str(path)!r} is a file. Give a folder for the cache.")
    record = _read_record(Path(path))
    if record is not None:
        _check_made_of(Path(path), record["made_of"], made_of)
    if record is None or record["done"] < record["rows"]:
        outputs = {name: teacher.get_layer(name).output for name in layers}
        source = keras.Model(functional.input, {**outputs, FINAL: functional.output})
        source.compile(jit_compile=False)  # for a last batch of its own size, XLA starts over
        job = _Job(source, x, augment, seed, batch_size, verbose)
        job.run(Path(path), record, {"name": teacher.name, "made_of": made_of})
    return TeacherCache(path, augment=augment)


class TeacherCache:
    """A teacher's outputs in a folder, finished; made by `cache_teacher`.

    It stands for the teacher in a `Distiller(cache, student)`, which then trains on
    `cache.dataset(x, y, batch_size)`.

    Args:
        path: the folder.
        augment: that with which it was made, if any.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: it is not finished, or was made with `augment` and none is given, or the other
            way round.

    Attributes:
        name: of the teacher.
        output_shapes: shape by layer name, "final_output" for the model's output, the batch first,
            as None.
        samples: how many it knows.
        views: versions of each.
        size_bytes: of what is kept.
    """

    def __init__(self, path: str | os.PathLike[str], *, augment: Augment | None = None) -> None:
        self.path = Path(path)
        record = _read_record(self.path)
        if record is None:
            raise FileNotFoundError(
                f"There is no teacher cache in {str(path)!r}. Make it with cache_teacher()."
            )
        if record["done"] < record["rows"]:
            raise ValueError(
                f"The teacher cache in {str(path)!r} is not finished: {record['done']:,} of "
                f"{record['rows']:,} outputs. Start cache_teacher() again, it goes on from there."
            )
        made_of = record["made_of"]
        if made_of["augmented"] != (augment is not None):
            raise ValueError(
                f"The teacher cache in {str(path)!r} was made "
                + (
                    "with augment=. Give the same function."
                    if augment is None
                    else "without augment=. Leave it out, or make another cache with it."
                )
            )
        self.name: str = record["name"]
        self.samples: int = made_of["samples"]
        self.views: int = made_of["views"]
        self.output_shapes = {name: (None, *shape) for name, shape in record["shapes"].items()}
        self._augment, self._seed = augment, made_of["seed"]
        self._data, self._probe = made_of["data"], record["probe"]
        self._outputs = _open_outputs(self.path, record)
        self.size_bytes = self._outputs.size_bytes

    def outputs(self, indices: Any, view: int = 0) -> Any:
        """Returns what the teacher said, float32; by layer name where layers were kept.

        Args:
            indices: [batch] int, which samples.
            view: which version of them.
        """
        found = self._outputs.read(view, np.asarray(indices))
        return found if len(found) > 1 else found[FINAL]

    def dataset(
        self,
        x: Any,
        y: Any = None,
        batch_size: int = 32,
        *,
        shuffle: bool = True,
        sample_weight: Any = None,
        drop_remainder: bool = False,
        first_epoch: int = 0,
        seed: int = 0,
    ) -> Any:
        """Returns batches of samples with the teacher's outputs, as a `tf.data.Dataset`.

        Each is ({"inputs": x, "sample_index": i, "teacher_outputs": t}, y), with the weights third.
        From one epoch to the next the order changes, and the version if there are several. An epoch
        counts as soon as its last batch is drawn. Since the data set shuffles by itself, `fit` it
        with shuffle=False, else Keras warns.

        Args:
            x: the inputs that the cache was made of.
            y: labels, an array or a structure of arrays; None where alpha is 0.
            batch_size: samples of a batch.
            shuffle: whether each epoch has an order of its own.
            sample_weight: [samples], or a structure of such.
            drop_remainder: whether a last batch that is smaller is left out.
            first_epoch: number of the epoch to begin with, to train on after a stop.
            seed: of the order.

        Raises:
            ValueError: the cache was made of other data or with another augmentation, or an array
                has another length.
        """
        x = as_arrays("x", x)
        _check_count("batch_size", batch_size)
        arrays = {"inputs": x}
        for name, more in (("y", y), ("sample_weight", sample_weight)):
            if more is not None:
                arrays[name] = as_arrays(name, more)
        self._check_arrays(arrays)
        count = self.samples // batch_size if drop_remainder else -(-self.samples // batch_size)
        if count == 0:
            raise ValueError(
                f"A batch of {batch_size} is more than the {self.samples} samples there are, and "
                "drop_remainder=True leaves none. Lower batch_size."
            )
        order = EpochOrder(self.samples, batch_size, count, seed if shuffle else None, first_epoch)
        return stored_batches(
            arrays,
            self.outputs,
            order,
            augment=self._augment,
            seed=self._seed,
            views=self.views,
            batch_size=batch_size if drop_remainder else None,
        )

    def _check_arrays(self, arrays: dict[str, Any]) -> None:
        for name, array in arrays.items():
            lengths = {len(leaf) for leaf in keras.tree.flatten(array)}
            if lengths != {self.samples}:
                raise ValueError(
                    f"The cache in {str(self.path)!r} is of {self.samples:,} samples, but {name} "
                    f"has {' and '.join(f'{length:,}' for length in sorted(lengths))}. Give all of "
                    "them, in the same order; leave samples out by a sample_weight of 0."
                )
        if hash_data(arrays["inputs"]) != self._data:
            raise ValueError(
                f"The cache in {str(self.path)!r} was made of other inputs: {_WORDS['data']}, or "
                "in another order or type. Give the same x, or make another cache."
            )
        if self._augment is not None:
            found = probe(self._augment, arrays["inputs"], self._seed, self.views)
            if not same_probe(found, self._probe):
                raise ValueError(
                    f"The cache in {str(self.path)!r} was made with another augmentation: augment= "
                    "gives other versions of the same samples. Give the same function, or make "
                    "another cache."
                )


class _Job:
    """Asks the teacher about every version of every sample."""

    def __init__(
        self,
        source: keras.Model,
        x: Any,
        augment: Augment | None,
        seed: int,
        batch_size: int,
        verbose: int,
    ) -> None:
        self._source, self._x, self._augment, self._seed = source, x, augment, seed
        self._batch_size, self._verbose = batch_size, verbose
        self._samples = len(keras.tree.flatten(x)[0])
        self._view = None if augment is None else viewer(augment, x)

    def run(self, folder: Path, record: dict[str, Any] | None, facts: dict[str, Any]) -> None:
        views = facts["made_of"]["views"]
        found = probe(self._augment, self._x, self._seed, views) if self._augment else None
        if record is None:
            folder.mkdir(parents=True, exist_ok=True)
            outputs = self._ask(0, 0, min(self._batch_size, self._samples))
            shapes = {name: list(np.shape(output)[1:]) for name, output in outputs.items()}
            rows = views * self._samples
            record = {**facts, "shapes": shapes, "probe": found, "rows": rows, "done": 0}
            kept = _open_outputs(folder, record, mode="w+")
            write_json(folder / _RECORD, record)
        elif found is not None and not same_probe(found, record["probe"]):
            raise ValueError(
                f"{str(folder)!r} holds an unfinished cache with another augmentation: augment= "
                "gives other versions of the same samples. Give another path, or delete that "
                "folder."
            )
        else:
            kept = _open_outputs(folder, record, mode="r+")
        bar = keras.utils.Progbar(record["rows"], unit_name="sample") if self._verbose else None
        noted = time.monotonic()
        while record["done"] < record["rows"]:
            view, start = divmod(record["done"], self._samples)
            stop = min(start + self._batch_size, self._samples)
            kept.write(view, start, self._ask(view, start, stop))
            record["done"] += stop - start
            if bar is not None:
                bar.update(record["done"])
            if record["done"] == record["rows"] or time.monotonic() - noted >= _SECONDS:
                kept.flush()  # first the outputs, then the note that they are there
                write_json(folder / _RECORD, record)
                noted = time.monotonic()

    def _ask(self, view: int, start: int, stop: int) -> dict[str, Any]:
        batch = keras.tree.map_structure(lambda array: np.asarray(array[start:stop]), self._x)
        if self._view is not None:
            batch = self._view(batch, view_seeds(self._seed, np.arange(start, stop), view))
        return dict(self._source.predict_on_batch(batch))


def _open_outputs(folder: Path, record: dict[str, Any], *, mode: str = "r") -> StoredOutputs:
    made_of = record["made_of"]
    return StoredOutputs(
        folder,
        {name: tuple(shape) for name, shape in record["shapes"].items()},
        views=made_of["views"],
        samples=made_of["samples"],
        dtype=made_of["dtype"],
        top=made_of["top"],
        top_of=FINAL,
        mode=mode,
    )


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(folder / _RECORD)!r} is damaged ({error}). Delete the folder and cache the "
            "teacher again."
        ) from error
    return record


def _check_made_of(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        what = ", ".join(
            _WORDS.get(key, f"{key} is {found.get(key)!r} there and {wanted[key]!r} here")
            for key in differing
        )
        raise ValueError(
            f"{str(folder)!r} holds the cache of something else: {what}. Give another path, or "
            "delete that folder."
        )


def _check_count(name: str, value: Any) -> None:
    check_type(name, value, int)
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, but got {value!r}.")
