"""What quantize_aware makes of a model, and that the artifact holds what was trained."""

import keras
import numpy as np
import pytest
from keras import layers

import tfaccel
from tests.contracts.tables import convolutional, make_data, nested, sequential
from tests.quantization.networks import calibrate
from tfaccel import architectures as blocks
from tfaccel.core.graph import flat_layers
from tfaccel.export import audit, to_tflite
from tfaccel.measurement.flatbuffer import TFLiteFile
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.quantization import (
    FakeQuantize,
    Scheme,
    freeze_ranges,
    plan,
    quantize_aware,
    scheme_of,
)
from tfaccel.rewriting import fold_batch_norm


@pytest.mark.one_in(3)
@pytest.mark.parametrize("make_model", [convolutional, sequential, nested])
def test_scales_in_the_file_are_the_trained_ones(make_model, tmp_path):
    aware = calibrate(quantize_aware(make_model()))
    path = to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8").path
    tensors = audit(path).quantized_tensors.values()
    single = np.array([t.scales[0] for t in tensors if len(t.scales) == 1])
    for layer in flat_layers(aware):
        if isinstance(layer, FakeQuantize):
            scale = (float(layer.maximum) - float(layer.minimum)) / 255
            assert np.abs(single / scale - 1).min() < 1e-6, layer.name
    per_channel = [np.array(t.scales) for t in tensors if t.dtype == "int8" and len(t.scales) > 1]
    folded = fold_batch_norm(tfaccel.core.bake_weights(freeze_ranges(aware)))
    for layer in flat_layers(folded):
        axes = {layers.Conv2D: (0, 1, 2), layers.DepthwiseConv2D: (0, 1), layers.Dense: (0,)}
        if type(layer) in axes:
            scales = np.abs(np.asarray(layer.kernel)).max(axis=axes[type(layer)]).ravel() / 127
            found = [s for s in per_channel if s.shape == scales.shape]
            assert any(np.allclose(s, scales, rtol=1e-6, atol=0) for s in found), layer.name


def test_weights_in_the_file_are_the_trained_integers(tmp_path):
    """The integers of a kernel, worked out from the raw weights by the definition of rounding."""
    aware = calibrate(quantize_aware(convolutional()))
    file = TFLiteModel(to_tflite(aware, tmp_path / "m.tflite").path, delegates=False)
    stored = [
        np.array(file.view_tensor(t["index"]))
        for t in file.tensor_details()
        if t["dtype"] == np.int8
    ]
    for name in ("_conv_stem", "project"):
        wrapped = aware.get_layer(name)
        weight = np.asarray(wrapped.layer.kernel, "float64")
        step = np.abs(weight).max(axis=(0, 1, 2)) / 127
        # Batch norm behind the stem scales each channel, by a factor that may be negative.
        norm = aware.get_layer("stem_norm") if name == "_conv_stem" else None
        sign = 1 if norm is None else np.sign(np.asarray(norm.gamma))
        integers = (np.rint(weight / step) * sign).transpose(3, 0, 1, 2)
        assert any(s.shape == integers.shape and np.array_equal(s, integers) for s in stored), name


def test_pruned_zeros_stay_zeros_in_the_file(tmp_path):
    pruned = tfaccel.pruning.prune(sequential(), 0.75, include=["conv", "hidden", "logits"])
    aware = quantize_aware(pruned)
    aware.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    aware.fit(*make_data(64), verbose=0, callbacks=[tfaccel.pruning.UpdatePruning()])
    path = to_tflite(aware, tmp_path / "m.tflite").path
    assert TFLiteFile.read(path).sparsity() >= 0.75


def mobile(x):
    x = blocks.conv_bn_activation(x, 8, name="stem", momentum=0.8)
    x = blocks.inverted_residual(x, 8, expansion=2, name="first", momentum=0.8)
    return blocks.inverted_residual(x, 16, expansion=2, strides=2, name="second", momentum=0.8)


def shuffle(x):
    x = blocks.conv_bn_activation(x, 8, activation="relu", name="stem", momentum=0.8)
    x = blocks.shuffle_unit(x, 16, strides=2, name="first", momentum=0.8)
    return blocks.shuffle_unit(x, 16, name="second", momentum=0.8)


@pytest.mark.parametrize("body", [mobile, shuffle])
def test_light_network_is_integers_all_through_and_names_the_same_classes(body, tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = layers.GlobalAveragePooling2D()(body(inputs))
    aware = quantize_aware(keras.Model(inputs, layers.Dense(4)(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    aware.compile(keras.optimizers.Adam(0.01), loss)
    x, y = make_data(256)
    aware.fit(x, y, epochs=6, batch_size=32, verbose=0)
    artifact = to_tflite(aware, tmp_path / "m.tflite", io_dtype="int8")
    assert artifact.float_tensors == ()
    assert artifact.audit.missing == ()
    assert artifact.audit.max_steps <= 1.001
    x, y = make_data(256, seed=5)
    ours = np.asarray(aware(x, training=False)).argmax(-1)
    found = TFLiteModel(artifact.path).predict(x).argmax(-1)
    assert (ours == y).mean() > 0.9  # it has learnt something to agree about
    assert (found == ours).mean() >= 0.98


def test_never_trained_model_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"is not known yet.*Run model\.fit"):
        to_tflite(quantize_aware(sequential()), tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_scheme_of_a_model():
    assert scheme_of(sequential()) is None
    assert scheme_of(quantize_aware(sequential())).name == "int8"


def test_scheme_by_name_config_or_itself():
    scheme = Scheme("int8", 8, 8, trainable=True)
    for given in ("int8", scheme):
        aware = quantize_aware(sequential(), given)
        assert {x.bits for x in aware.layers if isinstance(x, FakeQuantize)} == {8}


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"no quantization scheme 'int7'.*Did you mean 'int8'"):
        quantize_aware(sequential(), "int7")
    with pytest.raises(ValueError, match=r"float16.*needs no training"):
        quantize_aware(sequential(), "float16")
    with pytest.raises(ValueError, match="quantization-aware already"):
        quantize_aware(quantize_aware(sequential()))
    with pytest.raises(ValueError, match=r"exclude='hiden' matches no layer.*'hidden'"):
        quantize_aware(sequential(), exclude="hiden")


@pytest.mark.parametrize("body", [layers.UnitNormalization(), layers.Flatten()])
def test_nothing_to_quantize(body):
    inputs = keras.Input((4, 3))
    lone = keras.Model(inputs, layers.Flatten()(body(inputs)))
    with pytest.raises(ValueError, match=r"nothing to quantize.*(is not covered|hands on)"):
        quantize_aware(lone)


def test_layer_that_keras_has_quantized_is_left_alone():
    model = sequential()
    model.get_layer("hidden").quantize("int8")
    (decision,) = [d for d in plan(model) if d.action == "float"]
    assert decision.name == "hidden"
    assert "Keras has quantized" in decision.reason
