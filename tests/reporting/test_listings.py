import keras
import pytest

from tfaccel.pruning import prune, update_masks
from tfaccel.reporting import diff, inspect
from tfaccel.rewriting.folding import fold_batch_norm
from tfaccel.rewriting.replacement import replace_layers


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


def cells_of(text, name):
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]
    return next(row for row in rows if row[0] == name)


def test_a_difference_has_figures_before_and_after():
    layers = [
        keras.layers.Conv2D(8, 3, use_bias=False, name="conv"),
        keras.layers.BatchNormalization(name="norm"),
    ]
    model = keras.Sequential([keras.Input((8, 8, 8)), *layers], name="net")
    text = str(diff(model, fold_batch_norm(model)))
    # 8 biases more, 4 times 8 numbers less; 36 positions, 9 taps, 8 channels to 8.
    assert cells_of(text, "conv")[-2:] == ["576 -> 584", "20,736"]
    assert cells_of(text, "norm")[1:] == ["removed", "BatchNormalization", "32 ->", "0 ->"]
    assert cells_of(text, "change")[1:3] == ["-3.9%", "+0.0%"]  # 608 -> 584


def test_layers_that_replaced_one_are_told_together(model):
    def split(old):
        config = {"use_bias": False, "padding": "valid"}
        return [
            keras.layers.Conv2D(2, (3, 1), name="conv_in", **config),
            keras.layers.Conv2D(old.filters, (1, 3)),
        ]

    text = str(diff(model, replace_layers(model, "conv", split)))
    # 6 x 6 positions in, 4 x 6 after the first, 4 x 4 after the second.
    assert cells_of(text, "conv_in") == [
        "conv_in",
        "added",
        "Conv2D; for conv",
        "-> 48",
        f"-> {4 * 6 * 3 * 8 * 2:,}",
    ]
    name, change, what, parameters, macs = cells_of(text, "conv")
    assert (name, change, parameters) == ("conv", "changed", "584 -> 56")
    assert macs == f"9,216 -> {4 * 4 * 3 * 2 * 8:,}"
    assert what == "Conv2D; with conv_in: 584 -> 104 parameters, 9,216 -> 1,920 MACs"
    assert "2 layers are the same." in text


def test_unknown_figures_are_called_so():
    class Own(keras.layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.kernel = self.add_weight(shape=(4, 8))

        def compute_output_shape(self, shape):
            return (*shape[:-1], 8)

        def call(self, inputs):  # what it computes, nobody can tell without numbers
            return keras.ops.matmul(inputs, self.kernel) * float(keras.ops.sum(inputs))

    inputs = keras.Input((4,))
    unknown = keras.Model(inputs, Own(name="own")(inputs), name="unknown")
    plain = keras.Model(inputs, keras.layers.Dense(8, name="own")(inputs), name="plain")
    assert cells_of(str(diff(plain, unknown)), "own")[-1] == "32 -> unknown"
    assert cells_of(str(diff(plain, unknown)), "change")[1:3] == ["-20.0%", ""]  # 40 -> 32
