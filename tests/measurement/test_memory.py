import keras
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

from tests.measurement.tflite_samples import classifier, convert
from tfaccel.measurement import measure_peak_memory
from tfaccel.measurement.memory import covered


def chain(*steps):
    return keras.Sequential([keras.Input((16, 16, 4)), *steps])


@pytest.mark.parametrize(
    ("scheme", "width", "steps", "numbers"),
    [
        # LiteRT keeps the input, 16 * 16 * 4 numbers, all the time.
        ("float32", 4, [layers.MaxPooling2D(), layers.MaxPooling2D()], 1024 + 256 + 64),
        ("int8", 1, [layers.MaxPooling2D(), layers.MaxPooling2D()], 1024 + 256 + 64),
        # Padded to 32 * 32 * 4, pooled to 8 * 8 * 4: the peak. What comes after takes the place of
        # the padded image.
        (
            "float32",
            4,
            [
                layers.ZeroPadding2D(8),
                layers.MaxPooling2D(4),
                layers.ZeroPadding2D(4),
                layers.MaxPooling2D(4),
            ],
            1024 + 4096 + 256,
        ),
    ],
)
def test_peak_is_what_lives_at_a_time(scheme, width, steps, numbers, tmp_path):
    path = convert(chain(*steps), tmp_path / "m.tflite", scheme=scheme)
    assert measure_peak_memory(path) == pytest.approx(width * numbers, abs=64)


def test_weights_are_not_included(tmp_path):
    model = keras.Sequential([keras.Input((64,)), layers.Dense(1000)])
    path = convert(model, tmp_path / "m.tflite")
    assert path.stat().st_size > 4 * 64 * 1000
    assert measure_peak_memory(path) == pytest.approx(4 * (64 + 1000), abs=256)


def test_integers_take_a_quarter(tmp_path):
    floats = measure_peak_memory(convert(classifier(), tmp_path / "f.tflite"))
    integers = measure_peak_memory(convert(classifier(), tmp_path / "i.tflite", scheme="int8"))
    assert integers < 0.4 * floats


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), max_size=8))
def test_covered_counts_each_place_once(pairs):
    spans = [(begin, begin + length) for begin, length in pairs]
    places = {place for begin, end in spans for place in range(begin, end)}
    assert covered(spans) == len(places)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    path = convert(classifier(), tmp_path / "m.tflite")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="cut off"):
        measure_peak_memory(path)
