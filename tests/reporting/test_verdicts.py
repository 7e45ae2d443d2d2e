import keras
import pytest

from tfaccel.pruning import prune, prune_channels, update_masks
from tfaccel.quantization import quantize_aware
from tfaccel.reporting import inspect


def verdicts(model, technique):
    return {
        layer.name: layer.techniques[technique]
        for layer in inspect(model).layers
        if technique in layer.techniques
    }


def network(*middle):
    return keras.Sequential([keras.Input((8, 8, 8)), *middle])


def test_verdicts_are_what_the_technique_then_does():
    """The verdict is compared with the rewritten model, not with the code that gave it."""
    model = network(
        keras.layers.Conv2D(8, 3, name="first"),
        keras.layers.Conv2D(8, 3, name="conv"),
        keras.layers.DepthwiseConv2D(3, name="depthwise"),
        keras.layers.Flatten(name="flatten"),
        keras.layers.Dense(10, name="logits"),
    )
    said = {name for name, verdict in verdicts(model, "prune").items() if verdict.touched}
    done = {layer.name for layer in inspect(prune(model, 0.5)).layers if layer.transforms}
    assert said == done == {"conv", "logits"}

    said = verdicts(model, "quantize_aware")
    done = {layer.name for layer in inspect(quantize_aware(model)).layers if layer.transforms}
    assert done == {"first", "conv", "depthwise", "logits"}
    assert all(said[name].touched for name in done)


def test_pruning_says_why_not():
    said = verdicts(
        network(
            keras.layers.Conv2D(8, 3, name="first"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.ReLU(name="relu"),
        ),
        "prune",
    )

    assert "first convolution" in said["first"].reason
    assert "batch normalization" in said["norm"].reason
    assert said["relu"].reason == "no weights"


def test_quantization_names_what_stays_float():
    said = verdicts(
        network(
            keras.layers.Conv2D(8, 3, name="conv"),
            keras.layers.GroupNormalization(4, name="norm"),
        ),
        "quantize_aware",
    )

    assert not said["norm"].touched
    assert "GroupNormalization" in said["norm"].reason


def test_what_is_done_already_is_said():
    model = network(keras.layers.Conv2D(8, 3, name="first"), keras.layers.Conv2D(8, 3, name="conv"))
    pruned = prune(model, 0.5)
    update_masks(pruned, 0)
    assert verdicts(pruned, "prune")["conv"].reason == "pruned already"

    said = verdicts(quantize_aware(model), "quantize_aware")
    assert said["conv"].reason == "quantization-aware already"


def folding(*middle):
    return verdicts(network(*middle), "fold_batch_norm")


def norm(**how):
    return keras.layers.BatchNormalization(name="norm", **how)


def test_folding_names_both_partners():
    said = folding(keras.layers.Conv2D(8, 3, name="conv"), norm())

    assert said["norm"].touched
    assert said["norm"].reason == "folded into 'conv'"
    assert said["conv"].reason == "takes 'norm' over"


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        ([norm()], "reads the model's input"),
        ([keras.layers.ReLU(name="relu"), norm()], "'relu', which is no convolution"),
        ([keras.layers.Conv2D(8, 3, activation="relu", name="conv"), norm()], "activation of its"),
        ([keras.layers.Conv2D(8, 3, name="conv"), norm(axis=1)], "'conv' (Conv2D) cannot take"),
    ],
)
def test_folding_says_why_not(middle, reason):
    said = folding(*[layer.__class__.from_config(layer.get_config()) for layer in middle])

    assert not said["norm"].touched
    assert reason in said["norm"].reason


def test_folding_sees_other_readers_and_shared_layers():
    inputs = keras.Input((8, 8, 8))
    conv = keras.layers.Conv2D(8, 1, name="conv")
    x = conv(inputs)
    read_twice = keras.Model(inputs, keras.layers.Add()([norm()(x), x]))
    assert "others read" in verdicts(read_twice, "fold_batch_norm")["norm"].reason

    shared = keras.layers.Conv2D(8, 1, name="conv")
    twice = keras.Model(inputs, norm()(shared(shared(inputs))))
    assert "called more than once" in verdicts(twice, "fold_batch_norm")["norm"].reason


def test_folding_names_what_takes_a_norm_before_it():
    said = folding(norm(), keras.layers.Conv2D(8, 3, name="conv"))
    assert said["norm"].reason == "folded into 'conv'"
    assert said["conv"].reason == "takes 'norm' over"


def test_a_row_of_norms_goes_into_one_layer():
    said = folding(
        keras.layers.Conv2D(8, 3, name="conv"),
        norm(),
        keras.layers.BatchNormalization(name="again"),
    )
    assert said["again"].reason == said["norm"].reason == "folded into 'conv'"


def test_channels_are_said_to_go_together_or_to_stay():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(16, 3, padding="same", name="one")(inputs)
    y = keras.layers.Conv2D(16, 3, padding="same", name="two")(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Add()([x, y]))
    model = keras.Model(inputs, keras.layers.Dense(4, name="logits")(x))
    said = verdicts(model, "prune_channels")
    assert said["one"].touched
    assert said["one"].reason == "16 channels, together with two"
    assert not said["logits"].touched
    assert said["logits"].reason.startswith("an output of")
    smaller = prune_channels(model, {"channels": 0.5})
    assert smaller.get_layer("one").filters == smaller.get_layer("two").filters == 8
    pruned = verdicts(prune(model, 0.5), "prune_channels")
    assert "remove channels before" in pruned["two"].reason
