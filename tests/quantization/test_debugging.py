"""The report says which layer hurts, by how much, and where ranges are."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.quantization.networks import calibrate, images, network
from tfaccel.quantization import debug, quantize, quantize_aware
from tfaccel.quantization.debugging import decibels


def body(x):
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(x)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    x = layers.Conv2D(16, 1, activation="relu", name="pointwise")(x)
    return layers.Dense(4, name="logits")(layers.Flatten(name="flat")(x))


@pytest.fixture(scope="module")
def model():
    return network(body)


@pytest.fixture(scope="module")
def quantized(model):
    return quantize(model, images(64), "w8a8", correct_bias=False)


@pytest.fixture(scope="module")
def report(model, quantized):
    return debug(quantized, images(16, 3), model)


def row(report, name, kind):
    (found,) = (x for x in report.layers if (x.name, x.kind) == (name, kind))
    return found


def ratio(signal, rounded):
    return 10 * np.log10((signal**2).sum() / ((rounded - signal) ** 2).sum())


def test_every_kernel_and_value_has_a_row_in_order(report):
    assert [(x.name, x.kind) for x in report.layers] == [
        ("image", "value"),
        ("stem", "kernel"),
        ("relu", "value"),
        ("pointwise", "kernel"),
        ("pointwise", "value"),
        ("logits", "kernel"),
        ("logits", "value"),
    ]
    assert report.samples == 16
    assert {x.bits for x in report.layers} == {8}


def test_the_input_is_rounded_to_its_grid(report, quantized):
    """The first value worked out by hand: 256 levels of the calibrated range."""
    x = images(16, 3).astype("float64")
    layer = quantized.get_layer("image_quantize")
    low, high = float(layer.minimum), float(layer.maximum)
    step = (high - low) / 255
    zero = np.round(-low / step)
    rounded = (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step
    found = row(report, "image", "value")
    assert found.own_snr_db == found.snr_db == pytest.approx(ratio(x, rounded), abs=0.05)
    assert (found.low, found.high) == pytest.approx((x.min(), x.max()))
    assert (found.grid_low, found.grid_high) == pytest.approx((low, high))
    outside = (x < low) | (x > high)
    assert found.clipped == pytest.approx(outside.mean(), abs=1e-3)


def test_a_kernel_is_judged_by_what_its_layer_gives(report, model, quantized):
    x = images(16, 3)
    flat = np.asarray(keras.Model(model.inputs[0], model.get_layer("flat").output)(x), "float64")
    weight = np.asarray(model.get_layer("logits").kernel, "float64")
    bias = np.asarray(model.get_layer("logits").bias, "float64")
    rounded = np.asarray(quantized.get_layer("logits").layer.kernel, "float64")
    found = row(report, "logits", "kernel")
    expected = ratio(flat @ weight + bias, flat @ rounded + bias)
    assert found.own_snr_db == pytest.approx(expected, abs=0.1)
    assert (found.low, found.high) == pytest.approx((weight.min(), weight.max()))
    # What comes before is rounded too, and adds its part.
    assert found.snr_db < found.own_snr_db


def test_the_outputs_are_those_of_the_two_models(report, model, quantized):
    x = images(16, 3)
    expected, found = (np.asarray(m(x), "float64") for m in (model, quantized))
    assert report.output_snr_db == pytest.approx(ratio(expected, found), abs=0.1)
    assert row(report, "logits", "value").snr_db == pytest.approx(report.output_snr_db)


def test_the_layer_that_hurts_is_named(model, report):
    spoiled = quantize(model, images(64), "w8a8", correct_bias=False)
    spoiled.get_layer("pointwise_quantize").set_range(0.0, 0.05)  # clips nearly all
    bad = debug(spoiled, images(16, 3), model)
    (worst, *_) = bad.worst()
    assert (worst.name, worst.kind) == ("pointwise", "value")
    assert worst.clipped > 0.4
    assert row(bad, "logits", "kernel").own_snr_db == pytest.approx(
        row(report, "logits", "kernel").own_snr_db
    )  # not to blame for what it gets
    text = report.to_text(before=bad)
    assert "own before" in text
    assert f"before {bad.output_snr_db:.1f} dB" in text
    assert "***** pointwise" in str(bad)


def test_a_trained_model_is_its_own_reference(model):
    aware = calibrate(quantize_aware(model, "int4"))
    report = debug(aware, images(8))
    assert row(report, "pointwise", "kernel").bits == 4
    assert 5 < row(report, "pointwise", "kernel").own_snr_db < 40
    weights_alone = quantize_aware(model, "int4_weight_only")
    assert {x.kind for x in debug(weights_alone, images(8)).layers} == {"kernel"}


def test_decibels_without_noise_or_signal():
    assert decibels(1.0, 0.0) == np.inf
    assert decibels(0.0, 1.0) == -np.inf
    assert decibels(1.0, 10.0) == pytest.approx(-10)


def test_nonsense_is_refused(model, quantized):
    with pytest.raises(ValueError, match="needs a quantized model"):
        debug(model, images(8))
    with pytest.raises(ValueError, match="never trained"):
        debug(quantize_aware(model), images(8))
    other = keras.Model(model.inputs, layers.Dense(3, name="logits")(layers.Flatten()(model.input)))
    with pytest.raises(ValueError, match="no layer like"):
        debug(quantized, images(8), other)


def test_layers_that_are_written_as_several_have_rows_of_their_parts():
    def parts(x):
        x = layers.SeparableConv2D(6, 3, name="sep")(x)
        x = layers.Conv2D(6, 1, activation="swish", name="swish")(x)
        x = layers.Reshape((6, 36))(x)
        return layers.Dense(3, name="logits")(layers.LSTM(4, name="lstm")(x))

    model = network(parts)
    found = debug(quantize(model, images(64), correct_bias=False), images(16, 3), model)
    kernels = {x.name: x.own_snr_db for x in found.layers if x.kind == "kernel"}
    assert {"sep_depthwise", "sep", "swish", "logits"} < set(kernels)
    # Eight bits leave some 40 dB; a layer beside the wrong float one would leave next to none.
    assert min(kernels.values()) > 30
    assert found.output_snr_db > 20
