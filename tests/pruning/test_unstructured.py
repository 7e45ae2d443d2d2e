"""prune: what it takes, what it leaves, what it does to weights."""

import warnings

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import tfaccel
from tests.pruning.samples import dense_data, dense_model, image_model, masks_of
from tfaccel.core.transforms import transformed_layers
from tfaccel.pruning import (
    ConstantSparsity,
    PolynomialDecay,
    UpdatePruning,
    prune,
    selection_for,
    update_masks,
)


def pruned_names(model):
    return [layer.name for layer in transformed_layers(model)]


def test_defaults_leave_alone_what_they_should_and_say_why():
    choices = {c.layer.name: (c.chosen, c.reason) for c in selection_for(image_model())}
    assert choices["first"] == (False, "first convolution: few weights, all else rests on them")
    assert choices["norm"][0] is False
    assert "batch normalization" in choices["norm"][1]
    assert choices["depthwise"][0] is False
    assert "depthwise" in choices["depthwise"][1]
    assert choices["second"] == (True, "kernel: 576 weights")
    assert choices["flatten"] == (False, "no weights")
    assert choices["logits"] == (True, "kernel: 540 weights")
    assert pruned_names(prune(image_model(), 0.5)) == ["second", "logits"]


def test_small_and_frozen_layers_are_left_alone_unless_named():
    model = dense_model()
    model.get_layer("hidden").trainable = False
    model.build((None, 12))
    reasons = {c.layer.name: c.reason for c in selection_for(model)}
    assert reasons["hidden"].startswith("frozen")
    tiny = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="tiny"), layers.Dense(64)])
    assert selection_for(tiny)[0].reason == "too small: 16 weights, fewer than 64"
    assert pruned_names(prune(tiny, 0.5, include="tiny")) == ["tiny"]


def test_a_layer_that_is_named_is_pruned_whatever_it_is():
    pruned = prune(image_model(), 0.5, include=["first", "depthwise", "norm"])
    assert pruned_names(pruned) == ["first", "depthwise"]
    assert pruned_names(prune(image_model(), 0.5, exclude="logits")) == ["second"]


def test_weights_inside_composed_layers_are_found():
    inputs = keras.Input((6, 8))
    x = layers.Bidirectional(layers.LSTM(8), name="both")(inputs)
    y = layers.MultiHeadAttention(2, 8, name="attention")(inputs, inputs)
    model = keras.Model(inputs, [x, y])
    keys = {
        layer.name: [k for k, _ in layer.transforms]
        for layer in transformed_layers(prune(model, 0.5))
    }
    assert keys["both"] == [
        f"{way}_lstm/lstm_cell/{kernel}"
        for way in ("forward", "backward")
        for kernel in ("kernel", "recurrent_kernel")
    ]
    assert keys["attention"] == [
        f"{part}/kernel" for part in ("query", "key", "value", "attention_output")
    ]


@given(sparsity=st.floats(0, 0.99), seed=st.integers(0, 10**6))
@settings(max_examples=10)
def test_every_kernel_has_its_sparsity_to_one_weight(sparsity, seed):
    model = dense_model()
    random = np.random.default_rng(seed)
    model.set_weights([random.normal(size=w.shape) for w in model.get_weights()])
    pruned = prune(model, sparsity, include="*")
    update_masks(pruned, 0)
    plain = tfaccel.strip(pruned)
    for layer in plain.layers:
        kernel = keras.ops.convert_to_numpy(layer.kernel)
        assert abs((kernel == 0).sum() - sparsity * kernel.size) <= 0.5 + 1e-4
        kept = np.abs(kernel[kernel != 0])
        original = keras.ops.convert_to_numpy(model.get_layer(layer.name).kernel)
        dropped = np.abs(original[kernel == 0])
        assert dropped.size == 0 or kept.min() > dropped.max()


def test_global_scope_ranks_all_kernels_together():
    model = dense_model()
    hidden, out = model.layers
    hidden.kernel.assign(np.full((12, 16), 5.0))
    out.kernel.assign(np.linspace(0.1, 1, 64).reshape(16, 4))
    pruned = prune(model, 0.2, scope="global")  # 51 of 256
    update_masks(pruned, 0)
    shares = [1 - masks_of_layer.mean() for masks_of_layer in layer_masks(pruned)]
    assert shares == [0.0, 51 / 64]
    by_layer = prune(model, 0.2)
    update_masks(by_layer, 0)
    assert [round(1 - m.mean(), 2) for m in layer_masks(by_layer)] == [0.2, 0.2]


def layer_masks(model):
    return [
        keras.ops.convert_to_numpy(transform.state["mask"])
        for layer in transformed_layers(model)
        for _, transform in layer.transforms
    ]


def test_global_groups_of_different_schedules_are_ranked_apart():
    pruned = prune(dense_model(), 0.5, scope="global", include="hidden")
    pruned = prune(pruned, 0.25, scope="global", include="out")
    update_masks(pruned, 0)
    assert [m.mean() for m in layer_masks(pruned)] == [0.5, 0.75]


def test_random_is_reproducible_by_seed():
    def mask(seed, sparsity=0.5):
        pruned = prune(dense_model(), sparsity, criterion="random", seed=seed)
        update_masks(pruned, 0)
        return masks_of(pruned)

    np.testing.assert_array_equal(mask(3), mask(3))
    assert (mask(3) != mask(4)).any()
    assert not (mask(3, 0.8) & ~mask(3, 0.5)).any()
    hidden, out = mask(3)[:192], mask(3)[192:]
    assert (hidden[:64] != out).any()


def test_the_argument_is_not_changed():
    model = dense_model()
    before = [w.copy() for w in model.get_weights()]
    pruned = prune(model, 0.9)
    update_masks(pruned, 0)
    pruned.compile("sgd", "mse")
    pruned.train_on_batch(*dense_data(8))
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_gradient_reaches_pruned_weights_as_if_they_were_zero():
    import tensorflow as tf

    pruned = prune(dense_model(), 0.5)
    update_masks(pruned, 0)
    x, y = dense_data(8)

    def gradients(model, kernels):
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((model(x, training=True) - y) ** 2)
        return tape.gradient(loss, kernels)

    raw = [layer.variable("kernel").value for layer in pruned.layers]
    plain = tfaccel.strip(pruned)
    expected = gradients(plain, [layer.kernel.value for layer in plain.layers])
    for ours, theirs in zip(gradients(pruned, raw), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert (np.array(ours) != 0).mean() > 0.6  # not only those of kept weights


def test_strip_refuses_a_model_whose_schedule_never_ran():
    pruned = prune(dense_model(), ConstantSparsity(0.5, begin_step=10))
    with pytest.raises(ValueError, match=r"'hidden' .*never ran.*UpdatePruning"):
        tfaccel.strip(pruned)
    update_masks(pruned, 9)
    with pytest.raises(ValueError, match="begin_step=10"):
        tfaccel.strip(pruned)
    update_masks(pruned, 10)
    assert (tfaccel.strip(pruned).get_weights()[0] == 0).mean() == 0.5


def test_training_with_nothing_to_move_the_masks_warns():
    pruned = prune(dense_model(), 0.5)
    pruned.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="UpdatePruning"):
        pruned.fit(*dense_data(16), verbose=0)


def test_a_pruned_model_trains_on_without_the_callback_and_without_a_warning(tmp_path):
    pruned = prune(dense_model(), 0.5)
    update_masks(pruned, 0)
    pruned.save(tmp_path / "pruned.keras")
    loaded = keras.saving.load_model(tmp_path / "pruned.keras")
    loaded.compile("sgd", "mse")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.fit(*dense_data(16), verbose=0)
    np.testing.assert_array_equal(masks_of(loaded), masks_of(pruned))
    assert (tfaccel.strip(loaded).get_weights()[0] == 0).mean() == 0.5


def test_saving_keeps_settings_and_outputs_to_the_last_bit(tmp_path):
    schedule = PolynomialDecay(0.1, 0.7, 0, 9, frequency=3)
    pruned = prune(dense_model(), schedule, scope="global", criterion="random", seed=7)
    update_masks(pruned, 4)
    pruned.save(tmp_path / "pruned.keras")
    loaded = keras.saving.load_model(tmp_path / "pruned.keras")
    x, _ = dense_data(8)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), pruned.predict(x, verbose=0))
    for old, new in zip(pruned.layers, loaded.layers, strict=True):
        (_, before), (_, after) = old.transforms[0], new.transforms[0]
        assert after.get_config() == before.get_config()
        assert after.schedule == schedule
        assert after.last_step == 3


def test_a_callable_schedule_serves():
    pruned = prune(dense_model(), lambda step: (step in (2, 5), 0.1 * step))
    update_masks(pruned, 3)
    assert [round(1 - m.mean(), 2) for m in layer_masks(pruned)] == [0.2, 0.2]
    update_masks(pruned, 7)
    assert [round(1 - m.mean(), 2) for m in layer_masks(pruned)] == [0.5, 0.5]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_keeps_masks_on_float32_weights(policy):
    keras.config.set_dtype_policy(policy)
    try:
        pruned = prune(dense_model(), 0.5)
    finally:
        keras.config.set_dtype_policy("float32")
    pruned.compile("sgd", "mse")
    pruned.fit(*dense_data(32), verbose=0, callbacks=[tfaccel.pruning.UpdatePruning()])
    kernel = tfaccel.strip(pruned).layers[0].kernel
    assert kernel.dtype == "float32"
    assert (keras.ops.convert_to_numpy(kernel) == 0).mean() == 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schedule": 1.5}, ValueError, "target_sparsity"),
        ({"schedule": "0.5"}, TypeError, "A schedule is"),
        ({"pattern": "blok"}, ValueError, "no pattern 'blok'"),
        ({"criterion": "l3"}, ValueError, "no criterion 'l3'"),
        ({"scope": "model"}, ValueError, "'layer', 'global'"),
        ({"include": "hiden"}, ValueError, "Did you mean 'hidden'"),
        ({"exclude": "*"}, ValueError, "nothing to prune in 'dense'.*hidden: excluded"),
        ({"seed": "a"}, TypeError, "seed"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        prune(dense_model(), **{"schedule": 0.5, **arguments})


def test_models_without_a_graph_are_refused():
    class Custom(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(TypeError, match="subclassed"):
        prune(Custom(), 0.5)
    with pytest.raises(ValueError, match="built"):
        prune(keras.Sequential([layers.Dense(4)]), 0.5)


def test_pruning_twice_is_refused():
    with pytest.raises(ValueError, match="PruningMask already"):
        prune(prune(dense_model(), 0.5), 0.8)


@pytest.mark.parametrize("pattern", ["2:4", "4x1", "channel"])
def test_a_pattern_survives_saving_and_further_training(pattern, tmp_path):
    pruned = prune(dense_model(), ConstantSparsity(0.5, 0, frequency=3), pattern=pattern)
    pruned.compile(keras.optimizers.Adam(0.05), "mse")
    x, y = dense_data(48)
    pruned.fit(x, y, batch_size=8, verbose=0, callbacks=[UpdatePruning()])
    pruned.save(tmp_path / "pruned.keras")
    loaded = tfaccel.load_model(tmp_path / "pruned.keras")
    before = masks_of(loaded)
    loaded.compile(keras.optimizers.Adam(0.5), "mse")
    loaded.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[UpdatePruning()])
    if pattern != "channel":  # one update does not outweigh a channel that trains
        assert (masks_of(loaded) != before).any()
    kernel = tfaccel.strip(loaded).get_layer("hidden").get_weights()[0] != 0
    if pattern == "2:4":
        assert (kernel.T.reshape(16, 3, 4).sum(axis=2) == 2).all()
    elif pattern == "4x1":
        assert set(kernel.T.reshape(16, 3, 4).sum(axis=2).ravel()) == {0, 4}
    else:
        assert set(kernel.sum(axis=0)) == {0, 12}


@pytest.mark.parametrize("pattern", ["4x1", "channel"])
def test_a_pattern_has_its_share_over_all_kernels(pattern):
    pruned = prune(dense_model(), 0.5, pattern=pattern, scope="global", include="*")
    update_masks(pruned, 0)
    masks = np.concatenate([mask.ravel() for mask in layer_masks(pruned)])
    unit = 16 if pattern == "channel" else 4
    assert abs(masks.mean() - 0.5) * masks.size <= unit / 2


def test_channels_of_the_outputs_stay_unless_named():
    reasons = {c.layer.name: c.reason for c in selection_for(dense_model(), pattern="channel")}
    assert reasons["out"] == "its channels are the model's outputs"
    assert pruned_names(prune(dense_model(), 0.5, pattern="channel")) == ["hidden"]
    assert pruned_names(prune(image_model(), 0.5, pattern="channel")) == ["second"]
    assert pruned_names(prune(dense_model(), 0.5, pattern="channel", include="out")) == ["out"]


def test_a_schedule_must_end_where_n_of_m_does():
    for schedule in (0.8, PolynomialDecay(0.0, 0.4, 0, 10)):
        with pytest.raises(ValueError, match=r"'2:4' makes 0.5 of the weights zero"):
            prune(dense_model(), schedule, pattern="2:4")


def test_attention_is_pruned_two_of_four_along_what_it_sums_over():
    inputs = keras.Input((6, 8))
    outputs = layers.MultiHeadAttention(2, 6, name="attention")(inputs, inputs)
    pruned = prune(keras.Model(inputs, outputs), 0.5, pattern="2:4")
    update_masks(pruned, 0)
    attention = tfaccel.strip(pruned).get_layer("attention")
    query = np.asarray(attention.query_dense.kernel) != 0  # [features, heads, size]
    assert (query.reshape(2, 4, 12).sum(axis=1) == 2).all()
    out = np.asarray(attention.output_dense.kernel) != 0  # [heads, size, features]
    assert (out.reshape(3, 4, 8).sum(axis=1) == 2).all()
