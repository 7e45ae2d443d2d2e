import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tests.comparing import assert_same_outputs, fingerprint
from tfaccel.reporting import diff
from tfaccel.rewriting.heads import replace_head


def randomized(model, seed=0):
    random = np.random.default_rng(seed)
    model.set_weights(
        [
            random.uniform(0.5, 1.5, w.shape) if w.ndim == 1 else random.normal(0, 0.3, w.shape)
            for w in model.get_weights()
        ]
    )
    return model


def headed(shape, *head, seed=0):
    """A head on features that a 1x1 convolution gives: constant in space if the input is."""
    convolution = {2: layers.Conv1D, 3: layers.Conv2D, 4: layers.Conv3D}[len(shape)]
    body = [keras.Input(shape), convolution(4, 1, activation="relu", name="body")]
    return randomized(keras.Sequential([*body, *head], name="net"), seed)


def vgg_style():
    return [
        layers.Dropout(0.3),
        layers.Flatten(name="flatten"),
        layers.Dropout(0.3),
        layers.Dense(6, activation="relu", name="fc1"),
        layers.BatchNormalization(axis=1, name="norm"),
        layers.Dense(7, use_bias=False, name="fc2"),
        layers.ReLU(name="relu"),
        layers.Dense(3, activation="softmax", name="probs"),
    ]


def constant(shape, count=4, seed=1):
    values = np.random.default_rng(seed).normal(size=(count, *(1,) * (len(shape) - 1), shape[-1]))
    return np.broadcast_to(values, (count, *shape)).astype("float32")


def varied(shape, count=4, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype("float32")


HEADS = {
    "logits": lambda: [layers.Flatten(), layers.Dense(3, name="logits")],
    "no bias": lambda: [layers.Flatten(), layers.Dense(3, use_bias=False)],
    "softmax": lambda: [layers.Flatten(), layers.Dense(3, activation="softmax")],
    "softmax apart": lambda: [layers.Flatten(), layers.Dense(3), layers.Softmax()],
    "vgg": vgg_style,
}


@settings(max_examples=25)
@given(
    shape=st.sampled_from([(5, 2), (3, 4, 2), (1, 3, 2), (2, 3, 2, 2)]),
    head=st.sampled_from(sorted(HEADS)),
    seed=st.integers(0, 2**16),
)
def test_outputs_are_the_same_where_features_are_constant_in_space(shape, head, seed):
    model = headed(shape, *HEADS[head](), seed=seed)
    was = fingerprint(model)
    replaced = replace_head(model)
    x = constant(shape, seed=seed)
    np.testing.assert_allclose(replaced(x), model(x), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(layer, (layers.Flatten, layers.Dense)) for layer in replaced.layers)
    assert fingerprint(model) == was


@pytest.mark.parametrize("head", sorted(HEADS))
def test_a_map_of_one_position_is_exact_for_any_input(head):
    model = headed((1, 1, 2), *HEADS[head]())
    x = varied((1, 1, 2), 8)
    np.testing.assert_allclose(replace_head(model)(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_kernel_is_the_sum_over_positions():
    model = headed((2, 3, 2), layers.Flatten(), layers.Dense(3, name="logits"))
    kernel, bias = model.get_layer("logits").get_weights()
    conv = replace_head(model).get_layer("logits_conv")
    assert type(conv) is layers.Conv2D
    by_hand = sum(kernel[4 * position : 4 * position + 4] for position in range(6))
    np.testing.assert_allclose(conv.kernel[0, 0], by_hand, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(conv.bias, bias)


def test_names_shapes_and_figures():
    model = headed((4, 4, 2), *vgg_style())
    replaced = replace_head(model)
    assert [layer.name for layer in replaced.layers][-7:] == [
        "fc1",
        "norm",
        "fc2",
        "relu",
        "probs_conv",
        "probs_pool",
        "probs",
    ]
    assert replaced.output_shape == model.output_shape
    changes = {change.name: change for change in diff(model, replaced).layers}
    assert changes["fc1"].before.parameters == 16 * 4 * 6 + 6
    assert changes["fc1"].after.parameters == 4 * 6 + 6
    assert changes["fc1"].after.macs == changes["fc1"].before.macs == 16 * 4 * 6
    assert changes["fc2"].after.macs == 16 * changes["fc2"].before.macs
    assert changes["probs_conv"].part_of == changes["probs_pool"].part_of == "probs"
    assert "with probs_conv, probs_pool: 24 -> 24 parameters" in str(diff(model, replaced))


def test_the_replaced_head_takes_images_of_any_size():
    replaced = replace_head(headed((4, 4, 2), *HEADS["vgg"]()))
    anywhere = keras.Input((None, None, 2))
    x = anywhere
    for layer in replaced.layers:
        x = layer(x)
    assert keras.Model(anywhere, x)(varied((7, 9, 2))).shape == (4, 3)


def test_data_brings_the_outputs_closer():
    model = headed((4, 4, 2), *HEADS["softmax"]())
    # Some positions say more than others, and all say much the same.
    weight = np.random.default_rng(3).uniform(0, 2, (4, 4, 1)).astype("float32")
    x, unseen = (
        weight * constant((4, 4, 2), 256, seed) + 0.1 * varied((4, 4, 2), 256, seed)
        for seed in (1, 2)
    )
    was = fingerprint(model)

    def error(other):
        return np.square(np.log(np.asarray(other(unseen)) / np.asarray(model(unseen)))).mean()

    assert error(replace_head(model, x)) < 0.5 * error(replace_head(model))
    assert fingerprint(model) == was


def test_data_fits_by_least_squares_what_numpy_fits():
    model = headed((2, 2, 2), layers.Flatten(), layers.Dense(3, name="logits"))
    x = varied((2, 2, 2), 200)
    conv = replace_head(model, x, ridge=0.0).get_layer("logits_conv")
    body = np.asarray(model.get_layer("body")(x), "float64")
    pooled = np.c_[body.mean(axis=(1, 2)), np.ones(len(x))]
    solution = np.linalg.lstsq(pooled, np.asarray(model(x)), rcond=None)[0]
    np.testing.assert_allclose(conv.kernel[0, 0], solution[:-1], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(conv.bias, solution[-1], rtol=1e-3, atol=1e-3)


def test_data_of_constant_features_changes_nothing():
    model = headed((3, 3, 2), *vgg_style())
    x = constant((3, 3, 2), 6)  # fewer samples than numbers to fit
    np.testing.assert_allclose(replace_head(model, x)(x), model(x), rtol=1e-3, atol=1e-4)


def test_batches_and_several_inputs_are_data_too():
    left, right = keras.Input((3, 3, 2), name="left"), keras.Input((3, 3, 2), name="right")
    y = layers.Flatten()(layers.Concatenate()([left, right]))
    model = randomized(
        keras.Model({"left": left, "right": right}, layers.Dense(3, name="logits")(y))
    )
    x = {"left": varied((3, 3, 2), 70), "right": varied((3, 3, 2), 70, seed=2)}
    whole = replace_head(model, x)
    parts = [({k: v[:50] for k, v in x.items()}, 0), ({k: v[50:] for k, v in x.items()}, 0)]
    for ours, theirs in zip(
        whole.get_weights(), replace_head(model, iter(parts)).get_weights(), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_heads_in_nested_models_and_several_heads():
    body = headed((3, 3, 2), *HEADS["logits"]())
    inputs = keras.Input((3, 3, 2))
    outer = keras.Model(inputs, layers.Softmax()(body(inputs)))
    replaced = replace_head(outer)
    assert isinstance(replaced.layers[1].get_layer("logits_conv"), layers.Conv2D)
    x = constant((3, 3, 2))
    np.testing.assert_allclose(replaced(x), outer(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"none outside of nested models.*Leave data out"):
        replace_head(outer, x)

    features = layers.Conv2D(4, 1)(inputs)
    hidden = layers.Dense(5, activation="relu", name="hidden")(layers.Flatten()(features))
    single = layers.Dense(2, name="single")(layers.Flatten()(features))
    two = [layers.Dense(3, name="a")(hidden), layers.Dense(4, name="b")(hidden), single]
    model = randomized(keras.Model(inputs, two))
    replaced = replace_head(model)
    # Several read what the hidden layer gives, so it is the last before the pooling.
    assert type(replaced.get_layer("hidden_conv")) is layers.Conv2D
    assert type(replaced.get_layer("a")) is layers.Dense
    assert type(replaced.get_layer("single_conv")) is layers.Conv2D
    for ours, theirs in zip(replaced(x), model(x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_replaced_models_are_saved_and_loaded(tmp_path):
    replaced = replace_head(headed((3, 3, 2), *vgg_style()))
    replaced.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_outputs(loaded, replaced, varied((3, 3, 2)))


def test_flags_policies_and_regularizers_are_carried_over():
    dense = layers.Dense(
        3, trainable=False, kernel_regularizer="l2", dtype="mixed_bfloat16", name="logits"
    )
    replaced = replace_head(headed((2, 2, 2), layers.Flatten(), dense))
    conv = replaced.get_layer("logits_conv")
    assert not conv.trainable
    assert conv.dtype_policy.name == "mixed_bfloat16"
    assert isinstance(conv.kernel_regularizer, keras.regularizers.L2)


def no_flatten():
    return headed((3, 3, 2), layers.GlobalAveragePooling2D(), layers.Dense(3))


def flatten_is_the_output():
    return headed((3, 3, 2), layers.Flatten())


def norm_of_each_position():
    return headed((3, 3, 2), layers.Flatten(), layers.BatchNormalization(), layers.Dense(3))


def softmax_of_all_positions():
    return headed((3, 3, 2), layers.Flatten(), layers.Activation("softmax"), layers.Dense(3))


def positions_again():
    head = [layers.Flatten(), layers.Dense(18), layers.Reshape((3, 3, 2)), layers.Flatten()]
    return headed((3, 3, 2), *head)


def channels_first():
    return headed((3, 3, 2), layers.Flatten(data_format="channels_first"), layers.Dense(3))


def read_by_two():
    inputs = keras.Input((3, 3, 2))
    flat = layers.Flatten()(inputs)
    return keras.Model(inputs, layers.Concatenate()([layers.Dense(3)(flat), flat]))


@pytest.mark.parametrize(
    "make",
    [
        no_flatten,
        flatten_is_the_output,
        norm_of_each_position,
        softmax_of_all_positions,
        positions_again,
        channels_first,
        read_by_two,
    ],
)
def test_models_without_such_a_head_are_told_what_was_looked_for(make):
    with pytest.raises(ValueError, match=r"no head to replace\. Looked for: Flatten .* It has "):
        replace_head(make())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="ridge must be 0 or above, but got -1"):
        replace_head(headed((2, 2, 2), *HEADS["logits"]()), ridge=-1)
    with pytest.raises(ValueError, match="no weights yet"):
        replace_head(keras.Sequential([layers.Flatten(), layers.Dense(3)]))
