"""Bits go where they matter, within the budget, and quantize takes them."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

from tests.quantization.networks import images, network
from tfaccel.core.transforms import transformed_layers
from tfaccel.export import audit, to_tflite
from tfaccel.quantization import allocate_bits, quantize, quantize_aware
from tfaccel.quantization.allocation import choose_within

NUMBER = st.integers(1, 50)
ITEM = st.tuples(NUMBER, NUMBER, NUMBER, NUMBER)


@given(items=st.lists(ITEM, min_size=1, max_size=6), share=st.floats(0, 1))
def test_the_choice_is_the_best_of_all_combinations(items, share):
    costs = [{4: float(a), 8: float(a + b)} for a, b, _, _ in items]
    errors = [{4: float(c + d), 8: float(c)} for _, _, c, d in items]
    least = sum(table[4] for table in costs)
    budget = least + share * (sum(table[8] for table in costs) - least)
    chosen = choose_within(costs, errors, budget)

    def total(tables, picks):
        return sum(table[pick] for table, pick in zip(tables, picks, strict=True))

    allowed = [
        picks
        for picks in itertools.product((4, 8), repeat=len(items))
        if total(costs, picks) <= budget
    ]
    assert total(costs, chosen) <= budget
    assert total(errors, chosen) == min(total(errors, picks) for picks in allowed)


def test_many_items_stay_within_the_budget():
    random = np.random.default_rng(0)
    costs = [{4: a, 8: 2 * a} for a in random.uniform(1, 100, 60)]
    errors = [{4: e, 8: e / 200} for e in random.lognormal(size=60)]
    budget = 1.4 * sum(table[4] for table in costs)
    chosen = choose_within(costs, errors, budget)
    spent = sum(table[bits] for table, bits in zip(costs, chosen, strict=True))
    assert 0.99 * budget < spent <= budget
    # Between the relaxed problem, whose last item may be divided, and the greedy way.
    left, bound, greedy = budget - sum(t[4] for t in costs), 0.0, 0.0
    for n in sorted(range(60), key=lambda n: (errors[n][8] - errors[n][4]) / costs[n][4]):
        part = max(0.0, min(1.0, left / costs[n][4]))
        bound += errors[n][4] - part * (errors[n][4] - errors[n][8])
        greedy += errors[n][8] if part == 1 else errors[n][4]
        left -= costs[n][4]
    found = sum(table[bits] for table, bits in zip(errors, chosen, strict=True))
    assert bound <= found <= greedy


def body(x):
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(x)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Conv2D(16, 1, activation="relu", name="pointwise")(x)
    return layers.Dense(4, name="logits")(layers.Flatten(name="flat")(x))


@pytest.fixture(scope="module")
def model():
    return network(body)


@pytest.fixture(scope="module")
def allocation(model):
    return allocate_bits(model, images(32), {"share": 0.6}, samples=16)


def test_each_layer_is_measured_alone(model, allocation):
    """The error of the last layer, worked out by hand: its kernel rounded to 15 levels."""
    logits = {layer.name: layer for layer in allocation.layers}["logits"]
    assert logits.weights == 6 * 6 * 16 * 4
    x = images(32)[np.sort(np.random.default_rng(0).permutation(32)[:16])]
    features = keras.Model(model.inputs[0], model.get_layer("flat").output)(x)
    kernel = np.asarray(model.get_layer("logits").kernel, "float64")
    expected = np.asarray(model(x), "float64")
    best, chosen = np.inf * np.ones(4), np.zeros_like(kernel)
    for share in np.linspace(0.4, 1, 61):  # the end of the grid of each output, by its own error
        step = share * np.abs(kernel).max(0) / 7
        rounded = np.clip(np.rint(kernel / step), -7, 7) * step
        loss = ((rounded - kernel) ** 2).sum(0)
        better = loss < best
        best = np.where(better, loss, best)
        chosen = np.where(better, rounded, chosen)
    outputs = np.asarray(features, "float64") @ chosen + np.asarray(model.get_layer("logits").bias)
    variance = ((expected - expected.mean(0)) ** 2).sum()
    assert logits.errors[4] == pytest.approx(((outputs - expected) ** 2).sum() / variance, rel=0.02)


def test_the_budget_is_kept_and_the_sum_of_errors_told(allocation):
    assert allocation.cost <= allocation.budget
    stored = {layer.name: layer.weights * layer.bits / 8 for layer in allocation.layers}
    assert allocation.cost == sum(stored.values())
    assert allocation.budget == pytest.approx(0.6 * sum(x.weights for x in allocation.layers))
    assert allocation.predicted_error == pytest.approx(
        sum(layer.errors[layer.bits] for layer in allocation.layers)
    )
    assert 0.2 < allocation.measured_error / allocation.predicted_error < 5
    assert set(allocation.bits.values()) == {4, 8}
    for layer in allocation.layers:
        assert layer.errors[4] > layer.errors[8] > 0
        assert layer.name in str(allocation)


def test_quantize_takes_it_and_the_file_has_those_bits(model, allocation, tmp_path):
    quantized = quantize(model, images(32), allocation)
    found = {w.name: w.transforms[0][1].bits for w in transformed_layers(quantized)}
    assert found == allocation.bits
    path = to_tflite(quantized, tmp_path / "mixed.tflite").path
    kernels = [
        t.dtype
        for t in audit(path).quantized_tensors.values()
        if len(t.scales) > 1 and t.dtype != "int32"
    ]
    assert sorted(kernels) == sorted(f"int{bits}" for bits in allocation.bits.values())


def test_training_takes_it_too(model, allocation):
    aware = quantize_aware(model, per_layer=allocation.per_layer)
    found = {w.name: w.transforms[0][1].bits for w in transformed_layers(aware)}
    assert found == allocation.bits


def test_costs_are_the_users_and_named_layers_stay_out(model):
    def cost(layer, bits):
        return {"stem": 3.0}.get(layer.name, 1.0) * (2 if bits == 4 else 1)  # 4 bits are slower

    found = allocate_bits(model, images(8), {"cost": 6.0}, cost=cost, exclude="logits", samples=8)
    assert found.bits == {"stem": 8, "depthwise": 8, "pointwise": 8}
    assert found.cost == 5.0


def test_the_model_is_not_changed(model):
    before = [np.array(w) for w in model.weights]
    allocate_bits(model, images(8), {"share": 0.5}, samples=8)
    for old, now in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, now)


def test_nonsense_is_refused(model):
    x = images(8)
    with pytest.raises(ValueError, match=r"cheapest bits cost [\d,.]+ and 8 bits [\d,.]+"):
        allocate_bits(model, x, {"share": 0.1})
    for budget in (0.5, {"bytes": 3}, {"share": 0.5, "cost": 1}):
        with pytest.raises(ValueError, match="budget must be"):
            allocate_bits(model, x, budget)
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        allocate_bits(model, x, {"share": 2})
    with pytest.raises(ValueError, match="choices must be one of"):
        allocate_bits(model, x, {"share": 0.5}, choices=(1, 8))
    with pytest.raises(TypeError, match="cost must be"):
        allocate_bits(model, x, {"share": 0.5}, cost="time")
    with pytest.raises(ValueError, match="found no kernel"):
        allocate_bits(model, x, {"share": 0.5}, exclude="*")
