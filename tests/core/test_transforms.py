"""TransformedLayer around every kind of layer, and through everything that training does."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.core.transform_samples import Affine, Neutral, Scaled, Shifted, all_weights, only_kernels
from tfaccel.core.artifacts import load_model
from tfaccel.core.stripping import bake_weights, strip
from tfaccel.core.transforms import (
    TransformedLayer,
    transform_model,
    transformed_layers,
    weight_keys,
)

IMAGE, SEQUENCE, VOLUME, TOKENS = (6, 6, 3), (5, 4), (4, 4, 4, 2), (5,)


def _attention(layer):
    def call(inputs):
        return layer(inputs, value=inputs, use_causal_mask=True)

    return call


CASES = {
    "dense": (SEQUENCE, lambda: layers.Dense(3, name="x")),
    "conv1d": (SEQUENCE, lambda: layers.Conv1D(3, 2, name="x")),
    "conv2d": (IMAGE, lambda: layers.Conv2D(3, 3, name="x")),
    "conv2d_grouped": (IMAGE, lambda: layers.Conv2D(6, 3, groups=3, name="x")),
    "conv3d": (VOLUME, lambda: layers.Conv3D(3, 2, name="x")),
    "conv2d_transpose": (IMAGE, lambda: layers.Conv2DTranspose(3, 3, name="x")),
    "depthwise": (IMAGE, lambda: layers.DepthwiseConv2D(3, name="x")),
    "separable": (IMAGE, lambda: layers.SeparableConv2D(4, 3, name="x")),
    "embedding": (TOKENS, lambda: layers.Embedding(11, 3, name="x")),
    "lstm": (SEQUENCE, lambda: layers.LSTM(3, name="x")),
    "gru": (SEQUENCE, lambda: layers.GRU(3, return_sequences=True, name="x")),
    "bidirectional": (SEQUENCE, lambda: layers.Bidirectional(layers.LSTM(2), name="x")),
    "time_distributed": (SEQUENCE, lambda: layers.TimeDistributed(layers.Dense(3), name="x")),
    "attention": (SEQUENCE, lambda: _attention(layers.MultiHeadAttention(2, 3, name="x"))),
    "grouped_attention": (
        SEQUENCE,
        lambda: _attention(layers.GroupQueryAttention(3, 2, 1, name="x")),
    ),
    "batch_norm": (IMAGE, lambda: layers.BatchNormalization(name="x")),
    "custom": (SEQUENCE, lambda: Affine(3, name="x")),
}


def make_model(case, *, tail=True):
    shape, make = CASES[case]
    keras.utils.set_random_seed(7)
    inputs = keras.Input(shape, dtype="int32" if case == "embedding" else "float32")
    x = make()(inputs)
    if tail:
        x = layers.Dense(2, name="out")(layers.Flatten(name="flat")(x))
    return keras.Model(inputs, x, name=case)


def make_data(model, size=8, seed=3):
    random = np.random.default_rng(seed)
    shape = (size, *model.inputs[0].shape[1:])
    if model.inputs[0].dtype == "int32":
        x = random.integers(0, 11, shape).astype("int32")
    else:
        x = random.normal(size=shape).astype("float32")
    return x, random.normal(size=(size, *model.outputs[0].shape[1:])).astype("float32")


def train(model, *, epochs=2, jit=False, **options):
    x, y = make_data(model)
    # A learning rate that moves the weights, so that a lost gradient would show.
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", jit_compile=jit, **options)
    return model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0).history["loss"]


def run(model):
    return np.asarray(model(make_data(model)[0]))


@pytest.mark.one_in(6)
@pytest.mark.parametrize("case", CASES)
def test_neutral_transforms_change_no_digit_of_training(case):
    plain = make_model(case)
    before = [np.array(w) for w in plain.get_weights()]
    wrapped = transform_model(plain, all_weights(Neutral))
    assert {layer.name for layer in transformed_layers(wrapped)} == {"x", "out"}
    assert train(wrapped) == train(plain)
    stripped = strip(wrapped)
    for ours, theirs, start in zip(
        stripped.get_weights(), plain.get_weights(), before, strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
        # The key bias of attention has no gradient in theory; all else must have moved.
        assert start.size <= 6 or not np.array_equal(start, theirs)


@pytest.mark.parametrize("case", CASES)
def test_layer_sees_the_transformed_weight(case):
    plain = make_model(case, tail=False)
    wrapped = transform_model(plain, all_weights(Scaled))
    halved = keras.models.clone_model(plain)
    halved.set_weights(
        [
            w * (0.5 if v.trainable else 1)
            for w, v in zip(plain.get_weights(), plain.weights, strict=True)
        ]
    )
    assert not np.allclose(run(halved), run(plain))
    np.testing.assert_array_equal(run(wrapped), run(halved))
    for plain_again in (strip(wrapped), bake_weights(wrapped)):
        assert not transformed_layers(plain_again)
        np.testing.assert_array_equal(run(plain_again), run(halved))


@pytest.mark.one_in(6)
@pytest.mark.parametrize("case", CASES)
def test_saved_in_mid_training_goes_on_as_if_not_stopped(case, tmp_path):
    through = transform_model(make_model(case), all_weights(Scaled))
    halted = transform_model(make_model(case), all_weights(Scaled))
    losses = train(through, epochs=4)
    first = train(halted, epochs=2)
    halted.save(tmp_path / "halfway.keras")
    resumed = load_model(tmp_path / "halfway.keras", compile=True)
    x, y = make_data(resumed)
    second = resumed.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]
    assert first + second == losses
    for ours, theirs in zip(resumed.get_weights(), through.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def everything(policy="float32"):
    """One model with most kinds of layers, a shared one, a nested one, dropout and batch norm."""
    keras.utils.set_random_seed(5)
    keras.config.set_dtype_policy(policy)
    try:
        image, other = keras.Input(IMAGE, name="image"), keras.Input(IMAGE, name="other")
        shared = layers.Conv2D(4, 3, padding="same", name="shared")
        a, b = shared(image), shared(other)
        x = layers.BatchNormalization(name="norm")(a + b)
        x = layers.SeparableConv2D(4, 3, activation="relu", name="separable")(x)
        inner_in = keras.Input((4, 4, 4))
        inner_out = layers.BatchNormalization(name="inner_norm")(
            layers.DepthwiseConv2D(3, name="inner_depthwise")(inner_in)
        )
        x = keras.Model(inner_in, inner_out, name="nested")(x)
        x = layers.Reshape((4, 4), name="rows")(x)
        x = layers.Dropout(0.3, seed=11, name="dropout")(x)
        x = layers.MultiHeadAttention(2, 2, dropout=0.1, seed=4, name="attention")(x, x)
        x = layers.LSTM(3, name="lstm")(x)
        return keras.Model([image, other], layers.Dense(2, dtype="float32", name="out")(x))
    finally:
        keras.config.set_dtype_policy("float32")


def fit_everything(model, *, jit=False, steps_per_execution=1, epochs=2):
    random = np.random.default_rng(0)
    x = [random.normal(size=(16, *IMAGE)).astype("float32") for _ in range(2)]
    y = random.normal(size=(16, 2)).astype("float32")
    model.compile(
        keras.optimizers.SGD(0.01), "mse", jit_compile=jit, steps_per_execution=steps_per_execution
    )
    return model.fit(x, y, batch_size=2, epochs=epochs, shuffle=False, verbose=0).history["loss"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("steps", [1, 4])
def test_state_inside_survives_the_scope(jit, steps):
    plain, wrapped = everything(), transform_model(everything(), all_weights(Neutral))
    expected = fit_everything(plain, jit=jit, steps_per_execution=steps)
    tolerance = {"rtol": 1e-5} if jit else {"rtol": 0}
    losses = fit_everything(wrapped, jit=jit, steps_per_execution=steps)
    np.testing.assert_allclose(losses, expected, **tolerance)
    statistics = [v for v in plain.non_trainable_variables if "moving" in v.path]
    assert len(statistics) == 4
    for ours, theirs in zip(strip(wrapped).weights, plain.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4 if jit else 0, atol=1e-6 if jit else 0)
    for seed, expected_seed in zip(_seeds(wrapped), _seeds(plain), strict=True):
        np.testing.assert_array_equal(seed, expected_seed)


def _seeds(model):
    return [np.array(v) for v in model.non_trainable_variables if "seed" in v.path]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_casts_after_the_transform(policy):
    plain, wrapped = everything(policy), transform_model(everything(policy), all_weights(Neutral))
    assert {v.dtype for v in wrapped.trainable_variables} == {"float32"}
    attention = next(x for x in transformed_layers(wrapped) if x.name == "attention")
    assert attention.layer.compute_dtype == policy.removeprefix("mixed_")
    # TensorFlow fuses half-precision kernels differently when a weight passes through the scope
    # (4e-5 measured); bfloat16 is equal to the last digit.
    tolerance = 1e-3 if policy == "mixed_float16" else 0
    np.testing.assert_allclose(fit_everything(wrapped), fit_everything(plain), rtol=tolerance)


def test_transform_sees_full_precision_under_a_mixed_policy():
    # 1 + 2**-12 is lost in bfloat16; (w - 1) * 2**12 shows whether the transform saw it.
    @keras.saving.register_keras_serializable("tfaccel_tests")
    class Magnified(Neutral):
        def __call__(self, weight, training=None):
            return (weight - 1.0) * 2.0**12

    inputs = keras.Input((1,))
    model = keras.Model(
        inputs, layers.Dense(1, use_bias=False, dtype="mixed_bfloat16", name="d")(inputs)
    )
    model.set_weights([np.full((1, 1), 1 + 2.0**-12, "float32")])
    wrapped = transform_model(model, lambda _: {"kernel": Magnified()})
    assert float(np.asarray(wrapped(np.ones((1, 1))))[0, 0]) == 1.0


def test_masks_pass_through_the_wrapper():
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(9, 3, mask_zero=True, name="tokens")(inputs)
    x = layers.LSTM(2, return_sequences=True, name="lstm")(x)
    model = keras.Model(inputs, layers.GlobalAveragePooling1D(name="mean")(x))
    wrapped = transform_model(model, all_weights(Neutral))
    padded = np.array([[1, 2, 0, 0], [3, 4, 5, 6]], "int32")
    np.testing.assert_array_equal(np.asarray(wrapped(padded)), np.asarray(model(padded)))
    # With the mask, padding counts for nothing.
    short = np.asarray(wrapped(padded[:1, :2]))
    np.testing.assert_allclose(np.asarray(wrapped(padded))[:1], short, rtol=1e-5)


def test_activity_losses_are_carried_out_once():
    inputs = keras.Input((4,))
    dense = layers.Dense(3, activity_regularizer="l2", kernel_regularizer="l2", name="d")
    model = keras.Model(inputs, dense(inputs))
    wrapped = transform_model(model, all_weights(Neutral))
    x = np.ones((2, 4), "float32")
    model(x), wrapped(x)
    np.testing.assert_array_equal(sum(map(float, wrapped.losses)), sum(map(float, model.losses)))


def test_transforms_of_one_weight_run_by_stage_not_by_time():
    model = make_model("dense")
    late = transform_model(
        model, lambda layer: {"kernel": Shifted()} if layer.name == "x" else None
    )
    both = transform_model(late, lambda layer: {"kernel": Scaled()} if layer.name == "x" else None)
    (layer,) = transformed_layers(both)
    assert [type(t) for _, t in layer.transforms] == [Scaled, Shifted]
    kernel = np.asarray(model.get_layer("x").kernel)
    np.testing.assert_allclose(strip(both).get_layer("x").kernel, kernel * 0.5 + 1, rtol=1e-6)


def test_added_transform_keeps_the_state_of_the_first():
    model = transform_model(make_model("dense"), only_kernels(Scaled))
    for layer in transformed_layers(model):
        mask = layer.transforms[0][1].state["mask"]
        mask.assign(np.arange(mask.value.numpy().size).reshape(mask.shape) % 2)
    both = transform_model(model, only_kernels(lambda: Shifted(0.0)))
    np.testing.assert_array_equal(run(both), run(model))


def test_clone_model_gives_the_same_structure():
    wrapped = transform_model(make_model("conv2d"), all_weights(Scaled))
    clone = keras.models.clone_model(wrapped)
    clone.set_weights(wrapped.get_weights())
    np.testing.assert_array_equal(run(clone), run(wrapped))
    assert clone.get_layer("x") is not wrapped.get_layer("x")


def test_export_serves_the_transformed_weights(tmp_path):
    import tensorflow as tf

    wrapped = transform_model(make_model("conv2d"), all_weights(Scaled))
    wrapped.export(tmp_path / "saved", verbose=False)
    saved = tf.saved_model.load(tmp_path / "saved")
    served = saved.serve(make_data(wrapped)[0])
    np.testing.assert_allclose(served, run(wrapped), atol=1e-6)


def test_keys_do_not_depend_on_automatic_names():
    first, second = Affine(2), Affine(2)
    for layer in (first, second):
        layer.build((None, 3))
    assert first.inner.name != second.inner.name
    assert list(weight_keys(first)) == list(weight_keys(second))
    assert sorted(weight_keys(first)) == ["dense/bias", "dense/kernel", "gain"]


def test_keys_of_wrapped_recurrent_layers():
    layer = layers.Bidirectional(layers.LSTM(2))
    layer.build((None, 5, 4))
    assert "forward_lstm/lstm_cell/kernel" in weight_keys(layer)
    assert len(weight_keys(layer)) == 6


def test_unknown_key_unbuilt_layer_and_second_use_are_errors():
    dense = layers.Dense(2, name="d")
    with pytest.raises(ValueError, match="needs a built layer, but 'd' has no weights"):
        TransformedLayer(dense, [])
    dense.build((None, 3))
    with pytest.raises(ValueError, match="no weight 'gamma'; it has bias, kernel"):
        TransformedLayer(dense, [("gamma", Neutral())])
    with pytest.raises(ValueError, match="has a Neutral already"):
        TransformedLayer(dense, [("kernel", Neutral()), ("kernel", Neutral())])
    used = Scaled()
    TransformedLayer(dense, [("kernel", used)])
    with pytest.raises(ValueError, match="belongs to another weight already"):
        TransformedLayer(dense, [("bias", used)])


def test_subclassed_model_is_refused():
    class Own(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(TypeError, match=r"subclassed Own, which has no graph.*keras.Model\(inputs"):
        transform_model(Own(), all_weights(Neutral))


def test_gradient_accumulation_and_ema():
    def fit(model):
        model.compile(
            keras.optimizers.Adam(0.01, gradient_accumulation_steps=2, use_ema=True), "mse"
        )
        x, y = make_data(model)
        return model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0).history["loss"]

    plain = make_model("conv2d")
    wrapped = transform_model(plain, all_weights(Neutral))
    assert fit(wrapped) == fit(plain)


def _cells():
    return layers.RNN([layers.LSTMCell(3), layers.LSTMCell(2)], name="x")


def _inner_model():
    return layers.TimeDistributed(keras.Sequential([layers.Dense(3), layers.Dense(2)]), name="x")


@pytest.mark.parametrize("make", [_cells, _inner_model])
def test_layers_that_hold_unnamed_layers_are_wrapped_and_loaded(make, tmp_path):
    keras.utils.set_random_seed(2)
    inputs = keras.Input(SEQUENCE)
    model = keras.Model(inputs, make()(inputs))
    wrapped = transform_model(model, all_weights(Scaled))
    (layer,) = transformed_layers(wrapped)
    assert len(layer.transforms) == len(model.trainable_variables)
    halved = keras.models.clone_model(model)
    halved.set_weights([w * 0.5 for w in model.get_weights()])
    np.testing.assert_array_equal(run(wrapped), run(halved))
    np.testing.assert_array_equal(run(strip(wrapped)), run(halved))
    wrapped.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(run(load_model(tmp_path / "m.keras")), run(halved))


def test_stateful_recurrence_goes_on_from_batch_to_batch():
    inputs = keras.Input(batch_shape=(8, *SEQUENCE))
    model = keras.Model(inputs, layers.GRU(3, stateful=True, name="x")(inputs))
    wrapped = transform_model(model, all_weights(Neutral))
    first = run(model)
    np.testing.assert_array_equal(run(wrapped), first)
    second = run(model)
    assert not np.array_equal(second, first)
    np.testing.assert_array_equal(run(wrapped), second)


def test_layer_shared_by_nested_models_stays_shared():
    shared = layers.Dense(4, name="shared")
    halves = []
    for name in ("left", "right"):
        inner = keras.Input((4,))
        halves.append(keras.Model(inner, shared(inner) * 2.0, name=name))
    inputs = keras.Input((4,))
    model = keras.Model(inputs, halves[0](inputs) + halves[1](inputs))
    wrapped = transform_model(model, all_weights(Scaled))
    for made, count in ((wrapped, 1), (strip(wrapped), 0), (bake_weights(wrapped), 0)):
        assert len(made.trainable_variables) == 2
        assert len(transformed_layers(made)) == count
    np.testing.assert_array_equal(run(strip(wrapped)), run(wrapped))
