import itertools

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

from tests.distributed.pipeline_models import skipping
from tfaccel.distributed.cutting import Calls, partition
from tfaccel.distributed.layer_times import measure_layers
from tfaccel.distributed.stages import build_stage, carry_back, plan_stages


def cuts_of(model):
    return {cut.after: cut for cut in Calls(model).cuts()}


def test_what_crosses_a_cut():
    """By hand: the input b is no tensor to send, and `first` is read by `join` at the end."""
    cuts = cuts_of(skipping())
    producers = {
        name: {tensor.name for tensor in cut.tensors} for name, cut in cuts.items() if name != "out"
    }
    first = next(iter(producers["first"]))
    assert len(producers["first"]) == 1
    assert len(producers["second"]) == 2
    assert first in producers["second"]
    assert len(producers["sum"]) == 2  # first and sum
    assert all(first in producers[name] for name in ("second", "sum", "third"))


def test_an_output_of_an_early_stage_is_passed_on_to_the_last():
    inputs = keras.Input((4,))
    early = layers.Dense(2, name="early")(inputs)
    late = layers.Dense(2, name="late")(early)
    model = keras.Model(inputs, [early, layers.Dense(2, name="last")(late)])
    calls = Calls(model)
    stages = plan_stages(calls, calls.positions_of(["early", "late"]))
    assert [len(stage.sent) for stage in stages] == [1, 2, 0]
    last = build_stage(calls, stages[2])
    assert last.output_names == ["early", "last"]  # what losses of named outputs are found by


@given(
    costs=st.lists(st.integers(0, 9), min_size=2, max_size=8),
    parts=st.integers(1, 4),
    data=st.data(),
)
def test_partition_is_the_best_there_is(costs, parts, data):
    places = data.draw(st.sets(st.integers(1, len(costs) - 1)))
    sizes = {place: data.draw(st.integers(0, 5)) for place in places}
    choices = list(itertools.combinations(sorted(places), parts - 1))
    if not choices:
        return

    def quality(cuts):
        bounds = [0, *cuts, len(costs)]
        worst = max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))
        return worst, sum(sizes[cut] for cut in cuts)

    assert quality(partition(costs, sizes, parts)) == min(map(quality, choices))


def test_stages_in_a_row_are_the_model_and_layers_keep_their_weights():
    model = skipping()
    calls = Calls(model)
    stages = plan_stages(calls, calls.positions_of(["second", "third"]))
    random = np.random.default_rng(0)
    data = [
        keras.ops.convert_to_tensor(random.normal(size=(5, width)), "float32") for width in (6, 3)
    ]
    values = []
    for stage in stages:
        stage_model = build_stage(calls, stage)
        values = stage_model([*values, *(data[place] for place in stage.data)])
        values = keras.tree.flatten(values)
        stage_model.trainable_variables[0].assign_add(
            np.ones(stage_model.trainable_variables[0].shape)
        )
        carry_back(stage, stage_model)
    for value, expected in zip(values, skipping()(data), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    moved = model.get_layer("first").kernel - skipping().get_layer("first").kernel
    np.testing.assert_allclose(moved, 1, rtol=1e-5)


def test_layers_without_weights_may_be_called_on_both_sides():
    inputs, relu = keras.Input((4,)), layers.ReLU(name="relu")
    x = relu(layers.Dense(4, name="one")(inputs))
    model = keras.Model(inputs, relu(layers.Dense(4, name="two")(x)))
    assert all(cut.why_not is None for cut in Calls(model).cuts())


def test_nested_models_are_one_piece():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Dense(4)], name="inner")
    model = keras.Sequential([keras.Input((4,)), inner, layers.Dense(2, name="out")])
    assert list(cuts_of(model)) == ["inner"]


def test_every_layer_is_timed():
    seconds = measure_layers(skipping(), samples=2)
    assert seconds.keys() == {"first", "second", "sum", "aside", "third", "join", "out"}
    assert all(time > 0 for time in seconds.values())


@pytest.mark.parametrize("samples", [0, "many"])
def test_samples_to_time_with_are_checked(samples):
    with pytest.raises((ValueError, TypeError), match="samples must be an int from 1"):
        measure_layers(skipping(), samples)
