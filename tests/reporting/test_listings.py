import keras
import pytest

from tfaccel.pruning import prune, update_masks
from tfaccel.reporting import diff, inspect


@pytest.fixture
def model():
    return keras.Sequential(
        [
            keras.Input((8, 8, 8)),
            keras.layers.Conv2D(8, 3, name="first"),
            keras.layers.Conv2D(8, 3, name="conv"),
            keras.layers.Flatten(name="flatten"),
        ],
        name="net",
    )


def line_of(text, name):
    return next(line for line in text.splitlines() if f" {name} " in line)


def test_an_inspection_is_a_table_with_reasons(model):
    text = str(inspect(model))

    assert "net" in text
    conv = line_of(text, "conv")
    for wanted in ("Conv2D", "4 x 4 x 8", "584", "9,216", "yes"):
        assert wanted in conv
    assert "prune leaves alone:" in text
    assert "  first convolution: few weights, all else rests on them: first" in text


def test_a_difference_shows_only_what_differs(model):
    pruned = prune(model, 0.5)
    update_masks(pruned, 0)
    text = str(diff(model, pruned))

    assert "zeros 0.0% -> 50.0%" in line_of(text, "conv")
    assert "transforms none -> PruningMask(kernel)" in line_of(text, "conv")
    assert "2 layers are the same." in text
    assert "before (net)" in text


def test_long_lists_of_names_are_cut():
    layers = [keras.layers.ReLU(name=f"relu_{i}") for i in range(6)]
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(64), *layers])

    assert "relu_0, relu_1, relu_2, relu_3 and 2 more" in str(inspect(model))
