"""What `prune_channels` keeps: targets, criteria, rounding."""

import keras
import numpy as np
import pytest
from keras import layers

import tfaccel
from tfaccel import architectures, pruning


def chain(widths=(16, 24), seed=0):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((8, 8, 3))
    x = inputs
    for number, width in enumerate(widths):
        x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv_{number}")(x)
        x = layers.BatchNormalization(name=f"norm_{number}")(x)
        x = layers.ReLU()(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x)))


def set_filters(model, name, norms):
    """Gives the filters of a layer chosen norms."""
    layer = model.get_layer(name)
    kernel = np.ones(layer.kernel.shape, "float32")
    layer.kernel.assign(kernel * np.asarray(norms) / kernel[..., 0].size)


def kept_filters(model, smaller, name):
    """Which filters of the first layer are still there, told by their values."""
    before = keras.ops.convert_to_numpy(model.get_layer(name).kernel)
    after = keras.ops.convert_to_numpy(smaller.get_layer(name).kernel)
    return [
        index
        for index in range(before.shape[-1])
        if any(np.array_equal(before[..., index], after[..., k]) for k in range(after.shape[-1]))
    ]


@pytest.mark.parametrize("target", [{"macs": 0.5}, {"parameters": 0.5}, {"channels": 0.5}, 0.5])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_targets_are_reached_and_not_by_far(target, allocation):
    model = chain((24, 32, 48))
    smaller = pruning.prune_channels(model, target, "l2", allocation=allocation, multiple_of=1)
    kind = next(iter(target)) if isinstance(target, dict) else "channels"
    before, after = (
        sum(g.size for g in pruning.read_channels(m).groups)
        if kind == "channels"
        else getattr(tfaccel.measurement.count(m), kind)
        for m in (model, smaller)
    )
    assert 0.45 * before < after <= 0.5 * before


def test_blocks_that_need_not_go_are_given_back():
    # At one share of all, each of the ten convolutions would lose its second block of 8 channels.
    model = chain((16,) * 10)
    smaller = pruning.prune_channels(model, {"macs": 0.7}, "l1", allocation="uniform")
    before, after = (tfaccel.measurement.count(m).macs for m in (model, smaller))
    assert 0.6 * before < after <= 0.7 * before
    kept = [smaller.get_layer(f"conv_{number}").filters for number in range(10)]
    assert kept == sorted(kept, reverse=True)
    assert set(kept) == {8, 16}


def test_a_cost_of_ones_own():
    model = chain()
    asked = []

    def cost(candidate):
        asked.append(candidate)
        return float(candidate.get_layer("conv_1").filters)

    smaller = pruning.prune_channels(model, {"cost": 0.5}, cost=cost, multiple_of=1)
    assert smaller.get_layer("conv_1").filters <= 12
    assert asked[0] is model


def test_what_is_left_is_a_multiple():
    model = architectures.MobileNetV1((32, 32, 3), 5, width=0.5)
    smaller = pruning.prune_channels(model, {"macs": 0.6}, "l1")
    for group in pruning.read_channels(smaller).groups:
        assert group.size % 8 == 0


def test_l1_keeps_the_filters_of_the_largest_norm():
    model = chain((4,))
    set_filters(model, "conv_0", [3, 1, 4, 2])
    smaller = pruning.prune_channels(model, 0.5, "l1", multiple_of=1)
    assert kept_filters(model, smaller, "conv_0") == [0, 2]


def test_fpgm_drops_what_lies_in_the_middle():
    model = chain((5,))
    # On a line, distances to the others sum to 20, 11, 10, 11, 20 times a constant (by hand).
    set_filters(model, "conv_0", [0, 9, 10, 11, 20])
    smaller = pruning.prune_channels(model, 0.8, "fpgm", multiple_of=1)
    assert kept_filters(model, smaller, "conv_0") == [0, 1, 3, 4]


def test_bn_gamma_keeps_the_largest_gammas():
    model = chain((4,))
    model.get_layer("norm_0").gamma.assign([0.1, -2.0, 0.5, 1.0])
    smaller = pruning.prune_channels(model, 0.5, "bn_gamma", multiple_of=1)
    assert kept_filters(model, smaller, "conv_0") == [1, 3]


def test_bn_gamma_needs_batch_norms():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(8)(inputs)))
    with pytest.raises(ValueError, match="can judge no group"):
        pruning.prune_channels(model, 0.5, "bn_gamma")


def linear():
    """y = sum_k a_k x through 4 hidden units: what each is worth can be said exactly."""
    inputs = keras.Input((1,))
    x = layers.Dense(4, use_bias=False, name="hidden")(inputs)
    model = keras.Model(inputs, layers.Dense(1, use_bias=False, name="out")(x))
    model.get_layer("hidden").kernel.assign([[1.0, 2.0, -1.0, 0.5]])
    model.get_layer("out").kernel.assign([[1.0], [0.1], [3.0], [1.0]])
    return model


def test_taylor_is_the_first_order_change_of_the_loss():
    from tfaccel.pruning.channel_criteria import Evidence, Taylor

    model = linear()
    found = pruning.read_channels(model)
    x, y = np.array([[1.0], [2.0]], "float32"), np.array([[0.0], [1.0]], "float32")
    evidence = Evidence(model, found, (x, y), "mean_squared_error")
    # Output = -1.3 x. dL/dhidden_k = 2 (f - y) out_k; gate: hidden_k = kernel_k x; mean over both.
    products = np.array([1.0, 0.2, -3.0, 0.5])
    change = np.mean([2 * (-1.3 - 0) * 1 * products, 2 * (-2.6 - 1) * 2 * products], axis=0)
    np.testing.assert_allclose(Taylor()(found.groups[0], evidence), change**2, rtol=1e-5)


def test_activation_and_apoz_are_of_what_is_read():
    from tfaccel.pruning.channel_criteria import Activation, Evidence

    inputs = keras.Input((2,))
    x = layers.Dense(3, activation="relu", name="hidden")(inputs)
    model = keras.Model(inputs, layers.Dense(1)(x))
    model.get_layer("hidden").kernel.assign([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])
    found = pruning.read_channels(model)
    x = np.array([[1.0, 2.0], [3.0, -2.0], [-4.0, 5.0], [2.0, 1.0]], "float32")
    evidence = Evidence(model, found, x)
    np.testing.assert_allclose(Activation("mean")(found.groups[0], evidence), [1.5, 1.0, 2.0])
    np.testing.assert_allclose(
        Activation("nonzero")(found.groups[0], evidence), [3 / 4, 1 / 4, 3 / 4]
    )


def test_random_is_the_seeds():
    model = chain()
    first, again, other = (
        pruning.prune_channels(model, 0.5, "random", seed=seed) for seed in (1, 1, 2)
    )
    same = [np.array_equal(a, b) for a, b in zip(first.weights, again.weights, strict=True)]
    assert all(same)
    assert any(
        a.shape != b.shape or not np.array_equal(a, b)
        for a, b in zip(first.weights, other.weights, strict=True)
    )


def test_a_function_is_a_criterion():
    model = chain((8,))
    smaller = pruning.prune_channels(
        model,
        0.5,
        lambda group, evidence: -np.arange(group.size),
        multiple_of=1,
    )
    assert kept_filters(model, smaller, "conv_0") == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="one score for each channel"):
        pruning.prune_channels(model, 0.5, lambda group, evidence: np.ones(3))


def test_steps_fine_tune_in_between():
    model = chain((16, 16))
    seen = []
    smaller = pruning.prune_channels(
        model,
        {"macs": 0.4},
        steps=3,
        multiple_of=1,
        fine_tune=lambda m: seen.append(tfaccel.measurement.count(m).macs),
    )
    full = tfaccel.measurement.count(model).macs
    assert len(seen) == 3
    for found, wanted in zip(seen, (0.8, 0.6, 0.4), strict=True):
        assert found <= wanted * full
    assert seen[-1] == tfaccel.measurement.count(smaller).macs


def test_excluded_layers_keep_their_channels():
    model = chain()
    smaller = pruning.prune_channels(model, {"macs": 0.6}, exclude="conv_0")
    assert smaller.get_layer("conv_0").filters == 16
    assert smaller.get_layer("conv_1").filters < 24


def test_the_given_model_is_not_changed():
    model = chain()
    before = [keras.ops.convert_to_numpy(v).copy() for v in model.variables]
    pruning.prune_channels(model, 0.5)
    pruning.recalibrate_batch_norm(model, np.ones((4, 8, 8, 3), "float32"))
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_the_smaller_model_saves_and_trains(tmp_path):
    smaller = pruning.prune_channels(chain(), {"macs": 0.5})
    smaller.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype("float32")
    smaller.fit(x, np.arange(8) % 3, verbose=0)
    smaller.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), smaller.predict(x, verbose=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": {"flops": 0.5}}, "target names one of"),
        ({"target": 1.5}, "above 0 and below 1"),
        ({"target": {"cost": 0.5}}, "go together"),
        ({"target": 0.5, "criterion": "l3"}, "There is no channel criterion"),
        ({"target": 0.5, "allocation": "both"}, "allocation must be one of"),
        ({"target": 0.5, "criterion": "taylor"}, "needs data"),
        ({"target": 0.5, "criterion": "apoz"}, "need data"),
        ({"target": {"macs": 0.001}}, "out of reach"),
        ({"target": 0.5, "multiple_of": 0}, "multiple_of must be above 0"),
    ],
)
def test_wrong_arguments_are_told_before_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        pruning.prune_channels(chain(), **arguments)


def test_recalibrated_statistics_are_those_of_the_data():
    model = chain((4,))
    x = np.random.default_rng(0).normal(2.0, 3.0, size=(70, 8, 8, 3)).astype("float32")
    renewed = pruning.recalibrate_batch_norm(model, x)
    before = keras.Model(model.input, model.get_layer("conv_0").output).predict(x, verbose=0)
    norm = renewed.get_layer("norm_0")
    np.testing.assert_allclose(norm.moving_mean, before.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(norm.moving_variance, before.var((0, 1, 2)), rtol=1e-3)


def test_the_penalty_is_of_gamma_and_trains_it_down():
    model = pruning.penalize_batch_norm(chain((4,)), 0.1)
    model(np.zeros((1, 8, 8, 3), "float32"))
    assert float(sum(model.losses)) == pytest.approx(0.1 * 4)  # gammas are one
    with pytest.raises(ValueError, match="no batch normalization"):
        pruning.penalize_batch_norm(linear())


def test_sensitivity_looks_at_one_group_at_a_time():
    model = chain((8, 12))

    def filters(candidate):
        return float(sum(candidate.get_layer(f"conv_{n}").filters for n in range(2)))

    found = pruning.sensitivity(model, filters, kept=(0.5, 0.25))
    assert [record.names for record in found] == [("conv_0",), ("conv_1",)]
    assert found[0].baseline == 20
    assert found[0].kept == {0.5: 16, 0.25: 14}
    assert found[1].kept == {0.5: 14, 0.25: 11}
