"""Layer pairs of small networks whose answer is plain to see."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.distillation.test_hints import feature
from tfaccel.distillation.attention_transfer import AttentionTransfer
from tfaccel.distillation.distiller import Distiller
from tfaccel.distillation.hints import HintLoss
from tfaccel.distillation.pairing import at_pairs, pair_layers


def residual(blocks, name, size=16):
    """A residual network; each stage halves the resolution, by padding and striding."""
    inputs = x = keras.Input((size, size, 3), name="image")
    for stage, count in enumerate(blocks):
        x = layers.ZeroPadding2D(1, name=f"{name}{stage}_pad")(x)
        x = layers.Conv2D(4, 3, strides=2, name=f"{name}{stage}_down")(x)
        for block in range(count):
            at = f"{name}{stage}_{block}"
            y = layers.Conv2D(4, 3, padding="same", name=f"{at}_a")(x)
            y = layers.Conv2D(4, 3, padding="same", name=f"{at}_b")(y)
            x = layers.ReLU(name=f"{at}_out")(x + y)
    x = layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_pool")(x)
    x = layers.Flatten()(x)
    return keras.Model(inputs, layers.Dense(3)(x), name=name)


def encoder(count, name, length=6):
    inputs = keras.Input((length,), dtype="int32")
    x = layers.Embedding(10, 4, name=f"{name}_embedding")(inputs)
    for block in range(count):
        x = layers.Add(name=f"{name}{block}")([x, layers.Dense(4, name=f"{name}{block}_inner")(x)])
    return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)), name=name)


def test_by_resolution_the_last_layers_before_it_shrinks():
    pairs = pair_layers(residual([2, 1, 1], "t"), residual([1, 0], "s"))
    assert pairs == [("t0_1_out", "s0_0_out"), ("t1_0_out", "s1_down")]


def test_by_resolution_a_network_of_other_input_size_meets_where_sizes_do():
    pairs = pair_layers(residual([1, 1], "t", size=32), residual([1, 1], "s", size=16))
    assert pairs == [("t1_0_out", "s0_0_out")]


def test_by_stage_parts_end_where_all_paths_meet():
    # Half of 1 + 4 · 3 layers is 6, inside the second block, whose end is nearer than that of the
    # first; half of 1 + 2 · 3 is 3, the last of the first block but one.
    teacher, student = residual([4], "t"), residual([2], "s")
    assert pair_layers(teacher, student, by="stage", stages=1) == [("t0_3_out", "s0_1_out")]
    pairs = pair_layers(teacher, student, by="stage", stages=2)
    assert pairs == [("t0_1_out", "s0_0_out"), ("t0_3_out", "s0_1_out")]


def test_by_stage_a_network_that_is_all_branches_is_cut_where_it_must():
    inputs = keras.Input((4, 4, 2))
    branches = [layers.Conv2D(2, 1, name=f"branch{i}")(inputs) for i in range(4)]
    model = keras.Model(inputs, layers.Flatten()(sum(branches)))
    pairs = pair_layers(model, model, by="stage", stages=4)
    assert sorted(a for a, _ in pairs) == [f"branch{i}" for i in range(4)]


def test_by_stage_in_a_plain_chain_parts_are_of_equal_length():
    def chain(count):
        parts = [layers.Conv1D(2, 1, name=f"c{i}") for i in range(count)]
        return keras.Sequential([keras.Input((5, 2)), *parts, layers.Flatten(), layers.Dense(2)])

    for stages in (1, 2, 3, 4):
        pairs = pair_layers(chain(12), chain(4), by="stage", stages=stages)
        assert pairs == [
            (f"c{12 * (i + 1) // stages - 1}", f"c{4 * (i + 1) // stages - 1}")
            for i in range(stages)
        ]


def test_sequences_pair_too():
    teacher, student = encoder(4, "t"), encoder(2, "s")
    assert pair_layers(teacher, student) == [("t3", "s1")]
    assert pair_layers(teacher, student, by="stage", stages=2)[-1] == ("t3", "s1")


def test_every_pair_can_be_looked_at_and_distilled():
    teacher, student = residual([2, 1], "t"), residual([1, 1], "s")
    pairs = pair_layers(teacher, student)
    losses = [*at_pairs(HintLoss(regressor="linear"), pairs), *at_pairs(AttentionTransfer(), pairs)]
    assert [(a.teacher_layer_name, a.student_layer_name) for a in losses] == pairs * 2
    assert losses[0].regressor == "linear"
    distiller = Distiller(teacher, student, losses=losses)
    distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = distiller.fit(feature(8, 16, 16, 3), np.zeros(8), verbose=0).history
    assert np.isfinite(history["distillation_loss"]).all()
    assert len(distiller.heads) == 2


def test_a_nested_model_is_one_layer_and_a_layer_called_twice_none():
    inputs = keras.Input((8, 8, 3))
    twice = layers.Conv2D(3, 3, padding="same", name="twice")
    x = twice(twice(inputs))
    body = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3, name="inner", padding="same")], name="body"
    )
    nested = keras.Model(inputs, layers.Flatten()(body(x)))
    plain = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(2, 1, name="conv")])
    assert pair_layers(nested, plain) == [("body", "conv")]
    only_twice = keras.Model(inputs, layers.Flatten()(x))
    with pytest.raises(ValueError, match="No resolution is in both"):
        pair_layers(only_twice, plain)


def test_no_pair_is_an_error_that_shows_what_there_is():
    with pytest.raises(ValueError, match=r"'t' has \[\(4, 4\)\].*'s' has \[\(8, 8\)\].*stage"):
        pair_layers(residual([1], "t", size=8), residual([1], "s", size=16))
    free = keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(2, 3)])
    with pytest.raises(ValueError, match="sizes that are None do not count"):
        pair_layers(free, free)
    with pytest.raises(ValueError, match=r"20 stages.*student 's' has 4. Take fewer"):
        pair_layers(residual([9], "t"), residual([1], "s"), by="stage", stages=20)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"by": "name"}, ValueError, "by must be one of"),
        ({"by": "stage"}, ValueError, "give stages="),
        ({"stages": 2}, ValueError, "give stages="),
        ({"by": "stage", "stages": 0}, ValueError, "1 or more"),
        ({"by": "stage", "stages": 2.0}, TypeError, "stages"),
        ({"teacher": "teacher.keras"}, TypeError, "load_model"),
    ],
)
def test_arguments_are_checked(arguments, error, match):
    model = residual([1], "m")
    with pytest.raises(error, match=match):
        pair_layers(**{"teacher": model, "student": model, **arguments})


def test_only_losses_of_features_have_layers():
    with pytest.raises(TypeError, match="loss must be FeatureLoss"):
        at_pairs(keras.distillation.LogitsDistillation(), [("a", "b")])
