"""What quantize makes of a model: close to float, exact in its file, ready to train on."""

import keras
import numpy as np
import pytest
from keras import layers

import tfaccel
from tests.contracts.tables import convolutional, make_data, nested, sequential
from tests.quantization.networks import images, network, steps_apart
from tfaccel import architectures as blocks
from tfaccel.core.graph import flat_layers
from tfaccel.core.transforms import transformed_layers
from tfaccel.export import audit, to_tflite
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.quantization import FakeQuantize, Scheme, quantize_aware, scheme_of
from tfaccel.quantization.calibration import Percentile
from tfaccel.quantization.post_training import choose_calibrator, quantize
from tfaccel.quantization.rounding import AdaRound, Nearest


def mobile(x):
    x = blocks.conv_bn_activation(x, 8, name="stem")
    x = blocks.inverted_residual(x, 8, expansion=2, name="first")
    x = blocks.inverted_residual(x, 16, expansion=2, strides=2, name="second")
    # Flat, so that the outputs follow the input, not its mean.
    return layers.Dense(5, name="logits")(layers.Flatten(name="flat")(x))


def noise(found, expected):
    """Mean squared error, as a share of the variance of each output over the samples."""
    return float(np.mean((np.asarray(found) - expected) ** 2) / np.var(expected, axis=0).mean())


def normalized():
    """A MobileNetV2 of two blocks whose batch norm has the statistics of its data."""
    keras.utils.set_random_seed(8)
    inputs = keras.Input((8, 8, 3), name="image")
    model = keras.Model(inputs, mobile(inputs), name="mobile")
    random = np.random.default_rng(8)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.5
            layer.gamma.assign(random.uniform(0.5, 1.5, layer.gamma.shape))
            layer.beta.assign(random.normal(0, 0.5, layer.beta.shape))
    for seed in range(12):
        model(images(128, seed), training=True)
    return model


@pytest.fixture(scope="module")
def float_model():
    return normalized()


@pytest.mark.one_in(5)
@pytest.mark.parametrize("rounding", ["nearest", AdaRound(steps=50), "gptq"], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_file_computes_what_the_quantized_model_does(float_model, scheme, rounding, tmp_path):
    quantized = quantize(float_model, images(64), scheme, rounding=rounding)
    assert scheme_of(quantized).name == scheme
    artifact = to_tflite(quantized, tmp_path / "m.tflite", io_dtype="int8")
    assert artifact.scheme == scheme
    assert artifact.float_tensors == ()
    apart = steps_apart(artifact.path, quantized, images(32, 9))
    # The step of a bias is that of its kernel times the input's: 18 times as coarse at 4 bits.
    assert apart.mean() < {"int8": 1, "int4": 2}[scheme]
    assert apart.max() < {"int8": 4, "int4": 8}[scheme]


@pytest.mark.parametrize(
    ("scheme", "rounding", "most"), [("int8", "nearest", 0.01), ("int4", "gptq", 0.06)]
)
def test_unseen_samples_are_computed_nearly_as_in_float(float_model, scheme, rounding, most):
    unseen = images(64, 5)
    quantized = quantize(float_model, images(128), scheme, rounding=rounding)
    assert noise(quantized(unseen), np.asarray(float_model(unseen))) < most


def test_kernels_of_four_bits_are_stored_in_four_bits(float_model, tmp_path):
    quantized = quantize(float_model, images(32), "int4")
    path = to_tflite(quantized, tmp_path / "m.tflite").path
    details = {
        name: tensor
        for name, tensor in audit(path).quantized_tensors.items()
        if len(tensor.scales) > 1
    }
    kernels = [t.dtype for t in details.values() if t.dtype != "int32"]
    # The first and the last layer keep 8 bits; of the others, the two blocks have 3 and 3.
    assert sorted(kernels) == ["int4"] * 6 + ["int8"] * 2
    eight = to_tflite(quantize(float_model, images(32)), tmp_path / "8.tflite").size_bytes
    held = sum(np.prod(w.layer.kernel.shape) for w in transformed_layers(quantized)[1:-1])
    assert eight - path.stat().st_size == pytest.approx(held / 2, rel=0.3)


def test_the_scales_of_the_file_are_those_of_the_grid(float_model, tmp_path):
    quantized = quantize(float_model, images(32), "int4", rounding="gptq")
    path = to_tflite(quantized, tmp_path / "m.tflite").path
    stored = [
        np.array(t.scales) for t in audit(path).quantized_tensors.values() if t.dtype == "int4"
    ]
    for wrapped in transformed_layers(quantized)[1:-1]:
        transform = wrapped.transforms[0][1]
        assert transform.bits == 4
        scale = np.asarray(transform.scale(wrapped.layer.kernel)).ravel()
        same = [s for s in stored if s.shape == scale.shape]
        assert any(np.allclose(s, scale, rtol=1e-5) for s in same), wrapped.name


@pytest.mark.one_in(2)
@pytest.mark.parametrize("make_model", [convolutional, sequential, nested])
def test_a_calibrated_model_is_close_to_the_float_one_and_exports(make_model, tmp_path):
    model = make_model()
    x, _ = make_data(64)
    quantized = quantize(model, x)
    assert noise(quantized(x), np.asarray(model(x))) < 0.02
    assert all(f.calibrated for f in flat_layers(quantized) if isinstance(f, FakeQuantize))
    path = to_tflite(quantized, tmp_path / "m.tflite").path
    assert noise(TFLiteModel(path).predict(x), np.asarray(model(x))) < 0.02


def test_the_given_model_is_not_changed_and_two_runs_are_equal(float_model):
    before = [np.asarray(w).copy() for w in float_model.weights]
    x = images(40)
    first, second = (quantize(float_model, x, "int4", rounding="gptq", seed=3) for _ in range(2))
    for old, weight in zip(before, float_model.weights, strict=True):
        np.testing.assert_array_equal(weight, old)
    np.testing.assert_array_equal(first(x), second(x))


def test_it_can_be_saved_loaded_and_trained_on(float_model, tmp_path):
    x = images(64)
    target = np.asarray(float_model(x))
    quantized = quantize(float_model, x, "int4", rounding="nearest")
    quantized.save(tmp_path / "m.keras")
    loaded = tfaccel.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(x), quantized(x))
    before = noise(loaded(x), target)
    loaded.compile(keras.optimizers.Adam(1e-3), "mse")
    loaded.fit(x, target, epochs=15, batch_size=16, verbose=0)
    assert noise(loaded(x), target) < 0.7 * before


def test_the_mean_error_is_taken_back(float_model):
    x = images(128)
    expected = np.asarray(float_model(x)).mean(0)
    shifts = {
        how: np.abs(
            np.asarray(quantize(float_model, x, "int4", correct_bias=how)(x)).mean(0) - expected
        )
        for how in ("none", "empirical", "analytic")
    }
    assert shifts["empirical"].max() < 0.5 * shifts["none"].max()
    # Batch norm's statistics are made up in this model: the analytic one has only to do something.
    assert not np.allclose(shifts["analytic"], shifts["none"])


def test_the_calibrator_is_chosen_by_the_error_of_the_outputs():
    def body(x):
        return layers.Dense(3, name="logits")(layers.Flatten(name="flat")(x))

    model = network(body)
    x = images(128)
    outlier = x.copy()
    outlier[0, 0, 0, 0] = 3000.0  # one value that would take the whole grid, seen in one batch
    model.get_layer("logits").kernel.assign(
        np.where(np.arange(192)[:, None] == 0, 0, model.get_layer("logits").kernel)
    )
    aware = quantize_aware(model)
    batches = [[outlier[i : i + 32]] for i in range(0, 128, 32)]
    assert choose_calibrator(aware, batches) != tfaccel.quantization.calibration.MinMax()
    quantized = quantize(model, outlier, calibrator="auto", seed=1)
    assert noise(quantized(x[32:]), np.asarray(model(x[32:]))) < 0.05


def test_a_pruned_model_keeps_its_zeros():
    pruned = tfaccel.pruning.prune(sequential(), 0.5, include=["conv", "hidden", "logits"])
    pruned.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    pruned.fit(*make_data(64), verbose=0, callbacks=[tfaccel.pruning.UpdatePruning()])
    for rounding in ("nearest", AdaRound(steps=20), "gptq"):
        quantized = quantize(pruned, make_data(32)[0], rounding=rounding)
        for name in ("hidden", "logits"):
            kernel = np.asarray(quantized.get_layer(name).layer.kernel)
            assert (kernel == 0).mean() >= 0.5


def test_excluded_layers_stay_in_float(float_model):
    quantized = quantize(float_model, images(16), exclude="logits", equalize=True)
    assert isinstance(quantized.get_layer("logits"), layers.Dense)
    np.testing.assert_array_equal(
        quantized.get_layer("logits").bias, float_model.get_layer("logits").bias
    )


def test_nonsense_is_refused(float_model):
    x = images(8)
    with pytest.raises(ValueError, match=r"no calibrator 'minmaxx'.*Did you mean 'minmax'"):
        quantize(float_model, x, calibrator="minmaxx")
    with pytest.raises(ValueError, match="no quantization scheme"):
        quantize(float_model, x, "int5x")
    with pytest.raises(ValueError, match=r"needs no calibration: .*scheme='float16'"):
        quantize(float_model, x, "float16")
    with pytest.raises(ValueError, match="needs data for the inputs"):
        quantize(float_model, x[:, :4])
    with pytest.raises(ValueError, match="correct_bias must be one of"):
        quantize(float_model, x, correct_bias="yes")
    with pytest.raises(ValueError, match="quantized already"):
        quantize(quantize_aware(float_model), x)
    with pytest.raises(ValueError, match="found nothing to quantize"):
        quantize(float_model, x, exclude="*")
    with pytest.raises(TypeError, match="subclassed"):
        quantize(type("Own", (keras.Model,), {})(), x)


def test_a_rounding_that_leaves_the_grid_is_refused(float_model):
    class Halves(Nearest):
        sequential = True

        def round_weight(self, problem):
            rounded = super().round_weight(problem)
            return np.where(np.abs(rounded) == np.abs(rounded).max(1, keepdims=True), 0.0, rounded)

    with pytest.raises(ValueError, match=r"rounded kernel of 'stem\w*' is off its grid"):
        quantize(float_model, images(8), "int4", rounding=Halves())


def test_a_scheme_of_ones_own(float_model):
    three = Scheme("three", 3, 8, end_bits=6)
    quantized = quantize(float_model, images(16), three, calibrator=Percentile(99.9))
    bits = [wrapped.transforms[0][1].bits for wrapped in transformed_layers(quantized)]
    assert bits == [6, *[3] * 6, 6]


def test_a_layer_that_is_called_again_and_again_is_fitted_to_all_its_calls():
    """Nearest does not look at inputs; what does must not be worse for having seen one call."""

    def body(x):
        shared = layers.Dense(16, activation="relu", name="shared")
        x = layers.Dense(16, name="begin")(layers.Flatten(name="flat")(x))
        return layers.Dense(3, name="logits")(shared(shared(shared(x))))

    model = network(body)
    x, unseen = images(256), images(256, 7)
    expected = np.asarray(model(unseen))
    found = {
        str(how): noise(quantize(model, x, "w3a8", rounding=how)(unseen), expected)
        for how in ("nearest", "gptq", "adaround")
    }
    assert found["gptq"] < 1.1 * found["nearest"]
    assert found["adaround"] < 1.1 * found["nearest"]


def test_few_samples_choose_a_calibrator_by_what_is_held_out():
    def body(x):
        return layers.Dense(3, name="logits")(layers.Flatten(name="flat")(x))

    model = network(body)
    x = images(32)
    x[0, 0, 0, 0] = 3000.0  # in a part that no range may be judged by
    model.get_layer("logits").kernel.assign(
        np.where(np.arange(192)[:, None] == 0, 0, model.get_layer("logits").kernel)
    )
    chosen = choose_calibrator(quantize_aware(model), [[x]])
    assert chosen != tfaccel.quantization.calibration.MinMax()
