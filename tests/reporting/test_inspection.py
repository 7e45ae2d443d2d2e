import json

import keras
import numpy as np
import pytest

import tfaccel
from tfaccel.pruning import prune, update_masks
from tfaccel.quantization import quantize_aware
from tfaccel.reporting import diff, inspect
from tfaccel.rewriting import fold_batch_norm


@pytest.fixture
def model():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, padding="same", use_bias=False, name="first"),
            keras.layers.Conv2D(16, 3, padding="same", use_bias=False, name="conv"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.ReLU(name="relu"),
            keras.layers.GlobalAveragePooling2D(name="average"),
            keras.layers.Dense(5, name="logits"),
        ],
        name="net",
    )


def by_name(items):
    return {item.name: item for item in items.layers}


def test_figures_are_those_counted_by_hand(model):
    found = inspect(model)
    layers = by_name(found)

    assert [layer.name for layer in found.layers] == [layer.name for layer in model.layers]
    assert layers["conv"].parameters == 9 * 4 * 16
    assert layers["conv"].macs == 8 * 8 * 9 * 4 * 16
    assert layers["conv"].output_shape == (8, 8, 16)
    assert layers["logits"].parameters == 16 * 5 + 5
    assert found.parameters == model.count_params()
    assert found.macs == 8 * 8 * 9 * (3 * 4 + 4 * 16) + 16 * 5
    assert found.sparsity == 0.0


def test_sparsity_counts_zeros_of_kernels_only(model):
    kernel, bias = model.get_layer("logits").get_weights()
    kernel[:, :2] = 0
    model.get_layer("logits").set_weights([kernel, bias])
    found = inspect(model)

    assert by_name(found)["logits"].sparsity == pytest.approx(2 / 5)
    assert by_name(found)["norm"].sparsity is None
    total = 9 * 3 * 4 + 9 * 4 * 16 + 16 * 5
    assert found.sparsity == pytest.approx(2 * 16 / total)


def test_masks_count_as_zeros(model):
    pruned = prune(model, 0.5)
    assert inspect(pruned).sparsity == 0.0  # the schedule never ran

    update_masks(pruned, 0)
    conv = by_name(inspect(pruned))["conv"]
    assert conv.sparsity == 0.5
    assert conv.transforms == ("PruningMask(kernel)",)
    assert conv.class_name == "Conv2D"


def test_nested_models_are_flattened(model):
    inputs = keras.Input((8, 8, 3))
    outer = keras.Model(inputs, keras.layers.Dense(2, name="head")(model(inputs)))

    assert {"conv", "head"} <= set(by_name(inspect(outer)))
    assert inspect(outer).parameters == outer.count_params()


def test_everything_fits_into_json(model):
    content = json.loads(json.dumps(inspect(model).to_dict()))

    assert content["layers"][1]["name"] == "conv"
    assert content["layers"][1]["techniques"]["prune"] == {
        "touched": True,
        "reason": "kernel: 576 weights",
    }
    changed = json.loads(json.dumps(diff(model, prune(model, 0.5)).to_dict()))
    assert {layer["change"] for layer in changed["layers"]} == {"same", "changed"}


def test_a_model_does_not_differ_from_itself(model):
    assert {layer.change for layer in diff(model, model).layers} == {"same"}
    assert "All 6 layers are the same." in str(diff(model, model))


def test_a_changed_weight_is_found(model):
    other = keras.models.clone_model(model)
    weights = [weight.copy() for weight in model.get_weights()]
    weights[-1][2] += 0.25
    other.set_weights(weights)

    changed = [layer for layer in diff(model, other).layers if layer.change != "same"]
    assert [layer.name for layer in changed] == ["logits"]
    assert changed[0].notes == ("weights differ by up to 0.25",)


def test_folding_removes_the_norm_and_changes_the_convolution(model):
    layers = by_name(diff(model, fold_batch_norm(model)))

    assert layers["norm"].change == "removed"
    assert layers["norm"].after is None
    assert layers["conv"].notes == ("parameters 576 -> 592",)  # 16 biases
    assert layers["first"].change == "same"


def test_what_is_added_stands_behind_its_predecessor(model):
    names = [layer.name for layer in diff(model, quantize_aware(model)).layers]

    assert names.index("relu_quantize") == names.index("relu") + 1
    added = by_name(diff(model, quantize_aware(model)))["relu_quantize"]
    assert added.change == "added"
    assert added.before is None


def test_an_activation_that_changed_is_found():
    def network(first, second):
        return keras.Sequential(
            [
                keras.Input((4, 3)),
                keras.layers.LSTM(2, recurrent_activation=first, name="lstm"),
                keras.layers.Dense(2, activation=second, name="dense"),
            ]
        )

    other = network("hard_sigmoid", "hard_swish")
    model = network("sigmoid", "swish")
    other.set_weights(model.get_weights())
    changes = by_name(diff(model, other))
    assert changes["lstm"].notes == ("activation tanh, sigmoid -> tanh, hard_sigmoid",)
    assert changes["dense"].notes == ("activation silu -> hard_silu",)


def test_only_what_stands_before_a_changed_layer_comes_with_it():
    def network(*names):
        return keras.Sequential(
            [keras.Input((4,)), *(keras.layers.Dense(4, name=name) for name in names)]
        )

    changes = by_name(diff(network("a", "b", "c"), network("b_x", "a", "b_in", "c_y", "b", "b_z")))
    assert {name: change.part_of for name, change in changes.items() if change.part_of} == {
        "b_in": "b"
    }


def test_models_are_not_changed(model):
    before = model.get_weights()
    inspect(model)
    diff(model, model)

    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("function", [inspect, lambda model: diff(model, model)])
def test_a_model_without_a_graph_is_refused(function):
    class Own(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(TypeError, match="subclassed"):
        function(Own())
    with pytest.raises(ValueError, match="has no weights yet"):
        function(keras.Sequential([keras.layers.Dense(2)]))
    with pytest.raises(TypeError, match=r"keras\.Model"):
        function("model.keras")


def test_the_front_door_leads_here():
    assert tfaccel.inspect is inspect
    assert tfaccel.diff is diff
