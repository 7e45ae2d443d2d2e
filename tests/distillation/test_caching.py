"""Cached teachers: the same outputs, the same pixels, and a run that goes on where it stopped."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from scipy.special import log_softmax, softmax

from tfaccel.distillation import Distiller, LogitDistillation, caching
from tfaccel.distillation.caching import TeacherCache, cache_teacher

SAMPLES, CLASSES = 22, 7


def net(seed=0, units=4, activation=None):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(units, 3, activation="relu", name="conv"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(
                CLASSES, activation=activation, kernel_initializer="random_normal", name="logits"
            ),
        ],
        name="teacher",
    )


def data(size=SAMPLES, dtype="uint8"):
    random = np.random.default_rng(7)
    return random.integers(0, 256, (size, 6, 6, 2)).astype(dtype), random.integers(0, CLASSES, size)


def augment(image, seed):
    image = tf.image.stateless_random_flip_left_right(image, seed)
    image = tf.image.stateless_random_crop(tf.pad(image, [[1, 1], [1, 1], [0, 0]]), (6, 6, 2), seed)
    return tf.cast(image, "float32") / 255


class Watched:
    """Counts what is read of an array, and stops it with an error when it is told to."""

    def __init__(self, array, stop=None):
        self.array, self.stop, self.read = array, stop, 0
        self.shape, self.dtype = array.shape, array.dtype

    def __len__(self):
        return len(self.array)

    def __getitem__(self, places):
        if isinstance(places, slice) and places.stop - places.start > 1:
            if self.stop is not None and self.read >= self.stop:
                raise KeyboardInterrupt
            self.read += places.stop - places.start
        return self.array[places]


def compiled(distiller, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    options = {"jit_compile": False, "metrics": ["accuracy"], **options}
    distiller.compile(keras.optimizers.SGD(0.05), loss, **options)
    return distiller


def epoch_of(dataset):
    """Returns one epoch, in the order of the samples."""
    batches = list(dataset.as_numpy_iterator())
    named = {
        key: np.concatenate([batch[0][key] for batch in batches])
        for key in ("inputs", "sample_index")
    }
    order = np.argsort(named["sample_index"])
    taught = np.concatenate([batch[0]["teacher_outputs"] for batch in batches])
    labels = np.concatenate([batch[1] for batch in batches])
    assert sorted(named["sample_index"]) == list(range(SAMPLES))
    return named["inputs"][order], taught[order], labels[order], named["sample_index"]


def test_outputs_and_features_are_the_teachers(tmp_path):
    teacher, (x, y) = net(), data()
    cache = cache_teacher(teacher, x, tmp_path, batch_size=8, layers=["conv"])
    assert cache.name == "teacher"
    assert cache.output_shapes == {"conv": (None, 4, 4, 4), "final_output": (None, CLASSES)}
    assert cache.size_bytes == 2 * SAMPLES * (4 * 4 * 4 + CLASSES)
    batches = list(cache.dataset(x, y, 8, shuffle=False).as_numpy_iterator())
    assert [len(labels) for _, labels in batches] == [8, 8, 6]
    conv = teacher.layers[0](x.astype("float32"))
    for number, (inputs, labels) in enumerate(batches):
        part = slice(8 * number, 8 * number + 8)
        np.testing.assert_array_equal(inputs["inputs"], x[part])
        np.testing.assert_array_equal(labels, y[part])
        found = inputs["teacher_outputs"]
        np.testing.assert_allclose(found["conv"], conv[part], rtol=1e-3)
        expected = teacher.predict(x[part], verbose=0)
        np.testing.assert_allclose(found["final_output"], expected, rtol=1e-3, atol=1e-3)


def test_the_teacher_saw_the_pixels_that_the_student_sees(tmp_path):
    teacher, (x, y) = net(), data()
    options = {"augment": augment, "views": 3, "seed": 5, "dtype": "float32"}
    cache = cache_teacher(teacher, x, tmp_path, batch_size=8, **options)
    dataset = cache.dataset(x, y, 5)
    epochs = [epoch_of(dataset) for _ in range(4)]
    for pixels, taught, labels, _ in epochs:
        # One by one, to be free of how the cache makes its batches.
        expected = np.concatenate([teacher(image[None]) for image in pixels])
        np.testing.assert_allclose(taught, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(labels, y)
    # Three versions, then the first again, in another order.
    versions = [pixels for pixels, *_ in epochs]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        differing = (versions[one] != versions[other]).any(axis=(1, 2, 3))
        assert differing.mean() > 0.7  # of 18 crops and flips two may be the same
    np.testing.assert_array_equal(versions[0], versions[3])
    assert list(epochs[0][3]) != list(epochs[3][3])
    # Every version is a crop of the padded image or of its mirror image.
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]).astype("float32") / 255
    flipped = np.pad(x[:, :, ::-1], [(0, 0), (1, 1), (1, 1), (0, 0)]).astype("float32") / 255
    crops = [
        source[:, row : row + 6, column : column + 6]
        for source in (padded, flipped)
        for row in range(3)
        for column in range(3)
    ]
    nearest = np.min([np.abs(versions[1] - crop).max(axis=(1, 2, 3)) for crop in crops], axis=0)
    np.testing.assert_allclose(nearest, 0, atol=1e-6)


def test_epochs_are_reproducible_and_can_be_begun_at(tmp_path):
    teacher, (x, y) = net(), data()
    cache = cache_teacher(teacher, x, tmp_path, augment=augment, views=2)
    whole, later = cache.dataset(x, y, 8, seed=3), cache.dataset(x, y, 8, seed=3, first_epoch=2)
    three = [epoch_of(whole) for _ in range(3)]
    for one, other in zip(three[2], epoch_of(later), strict=True):
        np.testing.assert_array_equal(one, other)
    assert list(three[0][3]) != list(epoch_of(cache.dataset(x, y, 8, seed=4))[3])


def test_a_look_at_the_first_batch_is_no_epoch(tmp_path):
    x, y = data()
    cache = cache_teacher(net(), x, tmp_path)
    dataset, other = cache.dataset(x, y, 1), cache.dataset(x, y, 1)
    iter(dataset)  # as Keras does at the end of each epoch
    next(iter(dataset.take(1)))
    np.testing.assert_array_equal(epoch_of(dataset)[3], epoch_of(other)[3])


def test_a_distiller_trains_on_it_as_on_the_teacher(tmp_path):
    teacher, (x, y) = net(), data(dtype="float32")
    weights = np.random.default_rng(0).random(SAMPLES).astype("float32")
    cache = cache_teacher(teacher, x, tmp_path, dtype="float32")
    losses = [LogitDistillation(2.0)]
    direct, cached = net(1, units=2), net(1, units=2)
    options = {"epochs": 2, "verbose": 0, "shuffle": False}
    distiller = compiled(Distiller(teacher, direct, losses=losses))
    distiller.fit(x, y, sample_weight=weights, batch_size=8, **options)
    distiller = compiled(Distiller(cache, cached, losses=losses))
    dataset = cache.dataset(x, y, 8, shuffle=False, sample_weight=weights)
    history = distiller.fit(dataset, validation_data=(x, y), **options).history
    assert {"accuracy", "val_accuracy"} <= set(history)
    for one, other in zip(direct.get_weights(), cached.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_fit_goes_through_the_views_epoch_by_epoch(tmp_path):
    x, _ = data()
    cache = cache_teacher(net(), x, tmp_path, augment=augment, views=3)
    asked = []
    outputs = cache.outputs
    cache.outputs = lambda indices, view=0: (asked.append(view), outputs(indices, view))[1]
    dataset = cache.dataset(x, None, 11)
    asked.clear()
    distiller = Distiller(cache, net(1), alpha=0.0)
    distiller.compile("sgd", jit_compile=False)
    distiller.fit(dataset, epochs=4, shuffle=False, verbose=0)
    assert asked == [0, 0, 1, 1, 2, 2, 0, 0]


def test_the_largest_logits_and_the_rest_spread_evenly(tmp_path):
    teacher, (x, _) = net(), data()
    cache = cache_teacher(teacher, x, tmp_path, top=3)
    logs = log_softmax(teacher.predict(x, verbose=0).astype("float64"), axis=-1)
    found = cache.outputs(np.arange(SAMPLES))
    for expected, row in zip(logs, found, strict=True):
        largest = np.argsort(-expected)[:3]
        np.testing.assert_allclose(row[largest], expected[largest], rtol=1e-3, atol=1e-3)
        rest = np.log(np.delete(np.exp(expected), largest).mean())
        np.testing.assert_allclose(np.delete(row, largest), rest, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(softmax(found, axis=-1).sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.exp(found).sum(axis=-1), 1, atol=2e-3)
    # 3 logits of 2 bytes, their classes, and the rest.
    assert cache.size_bytes == SAMPLES * (3 * 2 + 3 * 2 + 2)


@pytest.mark.parametrize("views", [1, 2])
def test_a_run_that_was_killed_goes_on_where_it_stopped(views, tmp_path, monkeypatch):
    teacher, (x, _) = net(), data()
    options = {"batch_size": 4, "views": views, "augment": augment if views > 1 else None}
    whole = cache_teacher(teacher, x, tmp_path / "whole", **options)
    monkeypatch.setattr(caching, "_SECONDS", 0.0)
    killed = Watched(x, stop=4 + 8 + (SAMPLES if views > 1 else 0))  # 4 for the shapes
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(teacher, killed, tmp_path / "cache", **options)
    done = json.loads((tmp_path / "cache" / "cache.json").read_text())["done"]
    assert done == killed.read - 4
    with pytest.raises(ValueError, match=f"not finished: {done} of {views * SAMPLES}"):
        TeacherCache(tmp_path / "cache", augment=options["augment"])
    rest = Watched(x)
    cache = cache_teacher(teacher, rest, tmp_path / "cache", **options)
    assert rest.read == views * SAMPLES - done
    for view in range(views):
        np.testing.assert_array_equal(
            cache.outputs(np.arange(SAMPLES), view), whole.outputs(np.arange(SAMPLES), view)
        )
    again = Watched(x)
    cache_teacher(teacher, again, tmp_path / "cache", **options)
    assert again.read == 0


def test_what_was_not_noted_is_computed_again(tmp_path, monkeypatch):
    # The outputs of a batch are on disk, the note about them is not.
    teacher, (x, _) = net(), data()
    monkeypatch.setattr(caching, "write_json", lambda *_: None)
    with pytest.raises(FileNotFoundError, match="no teacher cache"):
        cache_teacher(teacher, x, tmp_path)
    monkeypatch.undo()
    rest = Watched(x)
    cache_teacher(teacher, rest, tmp_path)
    assert rest.read == 2 * SAMPLES  # once for the shapes


def test_inputs_can_be_beyond_memory_and_of_several_parts(tmp_path):
    keras.utils.set_random_seed(0)
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((2,), name="b")}
    both = layers.Concatenate()([inputs["a"], inputs["b"]])
    teacher = keras.Model(inputs, layers.Dense(3)(both))
    random = np.random.default_rng(0)
    x = {"a": random.normal(size=(9, 3)), "b": random.normal(size=(9, 2))}
    mapped = {}
    for key, array in x.items():
        np.save(tmp_path / f"{key}.npy", array)
        mapped[key] = np.load(tmp_path / f"{key}.npy", mmap_mode="r")
    cache = cache_teacher(teacher, mapped, tmp_path / "cache", augment=lambda x, _: x)
    (batch, labels), *more = cache.dataset(mapped, {"y": np.arange(9)}, 9).as_numpy_iterator()
    assert not more
    order = batch["sample_index"]
    np.testing.assert_array_equal(labels["y"], order)
    np.testing.assert_array_equal(batch["inputs"]["a"], x["a"][order])
    expected = teacher.predict(x, verbose=0)[order]
    np.testing.assert_allclose(batch["teacher_outputs"], expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": net(3)}, "the teacher is another"),
        ({"x": data()[0][::-1]}, "the data are others"),
        ({"layers": ["conv"]}, r"layers is \[\] there and \['conv'\] here"),
        ({"top": 2}, "top is None there and 2 here"),
        ({"augment": augment}, "one was made with augment="),
        ({"seed": 1}, "seed is 0 there and 1 here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_cache_of_something_else_is_refused(change, message, tmp_path):
    options = {"teacher": net(), "x": data()[0], "path": tmp_path}
    cache_teacher(**options)
    with pytest.raises(ValueError, match=message):
        cache_teacher(**{**options, **change})


def test_a_data_set_of_something_else_is_refused(tmp_path):
    x, y = data()
    cache_teacher(net(), x, tmp_path, augment=augment, views=2)
    cache = TeacherCache(tmp_path, augment=lambda image, seed: 1 - augment(image, seed))
    with pytest.raises(ValueError, match="another augmentation"):
        cache.dataset(x, y)
    cache = TeacherCache(tmp_path, augment=augment)
    with pytest.raises(ValueError, match="made of other inputs"):
        cache.dataset(x.astype("float32"), y)
    with pytest.raises(ValueError, match="of 22 samples, but y has 21"):
        cache.dataset(x, y[1:])
    with pytest.raises(TypeError, match="y must be an array"):
        cache.dataset(x, list(y))
    with pytest.raises(ValueError, match="leaves none"):
        cache.dataset(x, y, 23, drop_remainder=True)
    with pytest.raises(ValueError, match="was made with augment="):
        TeacherCache(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"views": 2}, ValueError, "views=2 without augment="),
        ({"views": 0}, ValueError, "views must be 1 or more"),
        ({"top": CLASSES}, ValueError, "top=7 of 7 classes"),
        ({"dtype": "int8"}, ValueError, "'float16', 'float32'"),
        ({"layers": ["convolution"]}, ValueError, "no layer 'convolution'"),
        ({"x": [1, 2]}, TypeError, "x must be an array"),
        ({"teacher": "net.keras"}, TypeError, "load_model"),
        ({"teacher": net(activation="softmax"), "top": 2}, ValueError, "ends in softmax"),
        (
            {"augment": lambda image, _: image + tf.cast(tf.random.uniform(()) * 99, "uint8")},
            ValueError,
            "two versions of a sample for one seed",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        cache_teacher(**{"teacher": net(), "x": data()[0], "path": tmp_path / "a", **options})
    assert not (tmp_path / "a" / "cache.json").exists()


def test_values_beyond_float16_are_refused_not_cut(tmp_path):
    x = data()[0].astype("float32") * 1e6
    with pytest.raises(ValueError, match=r"'final_output' has values up to .* dtype='float32'"):
        cache_teacher(net(), x, tmp_path / "a")
    cache = cache_teacher(net(), x, tmp_path / "b", dtype="float32")
    np.testing.assert_allclose(cache.outputs([0]), net().predict(x[:1], verbose=0), rtol=1e-5)
