"""A model that is there gets a mixed-precision policy, and keeps its weights and its outputs."""

import keras
import numpy as np
import pytest
from keras import layers

import tfaccel
from tests.contracts.tables import convolutional, make_data, nested, sequential
from tfaccel.core.graph import flat_layers
from tfaccel.quantization import mixed_precision, quantize_aware

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compute_types(model):
    return {layer.name: layer.compute_dtype for layer in flat_layers(model)}


@pytest.mark.parametrize("make_model", [convolutional, sequential, nested])
def test_layers_compute_in_half_and_hold_their_weights_in_full(make_model):
    model = make_model()
    half = mixed_precision(model)
    types = compute_types(half)
    assert types.pop("logits") == "float32"
    assert set(types.values()) == {"bfloat16"}
    for old, now in zip(model.weights, half.weights, strict=True):
        assert now.dtype == old.dtype
        np.testing.assert_array_equal(now, old)
    x, _ = make_data(16)
    expected = np.asarray(model(x))
    # A bfloat16 has 8 bits of precision: 2^-9 of rounding in each of some layers.
    assert np.abs(np.asarray(half(x)) - expected).max() < 0.05 * np.abs(expected).max()
    assert half.outputs[0].dtype == "float32"


def test_the_way_back_gives_the_same_model():
    model = convolutional()
    x, _ = make_data(8)
    back = mixed_precision(mixed_precision(model, "mixed_float16"), "float32")
    np.testing.assert_array_equal(back(x), model(x))
    assert back.dtype_policy.name == "float32"


@pytest.mark.parametrize(("policy", "scaled"), [("mixed_float16", True), ("mixed_bfloat16", False)])
def test_keras_scales_the_loss_where_gradients_would_vanish(policy, scaled):
    half = mixed_precision(sequential(), policy)
    half.compile("sgd", LOSS, jit_compile=False)
    assert isinstance(half.optimizer, keras.optimizers.LossScaleOptimizer) == scaled
    before = [np.array(w) for w in half.trainable_weights]
    half.fit(*make_data(32), verbose=0)
    pairs = zip(half.trainable_weights, before, strict=True)
    moved = [np.abs(np.asarray(w) - b).max() for w, b in pairs]
    assert all(0 < step < np.inf for step in moved)


def test_what_gives_the_outputs_stays_in_float32_behind_operations_too():
    inputs = keras.Input((4,), name="given")
    x = layers.Dense(4, name="hidden")(inputs)
    outputs = keras.ops.softmax(layers.Dense(3, name="logits")(x))
    inner = keras.Model(inputs, outputs, name="inner")
    outer = keras.Model(inputs, inner(layers.Dense(4, name="before")(inputs)))
    types = compute_types(mixed_precision(outer))
    assert types["logits"] == "float32"
    assert types["hidden"] == types["before"] == "bfloat16"


def test_layers_are_left_alone_by_name():
    half = mixed_precision(sequential(), exclude="hidden")
    assert compute_types(half)["hidden"] == "float32"
    only = compute_types(mixed_precision(sequential(), include="logits"))
    assert {name for name, kind in only.items() if kind == "bfloat16"} == {"logits"}


def test_a_pruned_and_a_quantization_aware_model_export(tmp_path):
    x, y = make_data(32)
    pruned = tfaccel.pruning.prune(sequential(), 0.5, include="hidden")
    aware = mixed_precision(quantize_aware(pruned))
    assert compute_types(aware)["logits"] == "float32"
    aware.compile("sgd", LOSS, jit_compile=False)
    aware.fit(x, y, verbose=0, callbacks=[tfaccel.pruning.UpdatePruning()])
    artifact = tfaccel.export.to_tflite(aware, tmp_path / "aware.tflite")
    assert artifact.scheme == "int8"
    assert artifact.float_tensors == ()


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match=r"policy must be one .*'bfloat16'.*lost in 16 bits"):
        mixed_precision(sequential(), "bfloat16")
    with pytest.raises(ValueError, match="matches no layer"):
        mixed_precision(sequential(), exclude="hiden")
    with pytest.raises(TypeError, match="subclassed"):
        mixed_precision(type("Own", (keras.Model,), {})())
