"""TFMOT's code for quantization-aware training runs with another import line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import tfaccel
import tfaccel.compat.tfmot as tfmot
from tests.compat import quantization_jobs
from tfaccel.core.graph import flat_layers
from tfaccel.core.transforms import TransformedLayer, transformed_layers
from tfaccel.export import audit
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.quantization import FakeQuantize, FakeQuantizeWeights

quantization = tfmot.quantization.keras
LastValueQuantizer = quantization.quantizers.LastValueQuantizer
MovingAverageQuantizer = quantization.quantizers.MovingAverageQuantizer
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data(size=64):
    random = np.random.default_rng(0)
    x = random.normal(size=(size, 20)).astype("float32")
    return x, x[:, :3].argmax(axis=1).astype("int64")


def network(mark=lambda layer: layer, hidden=layers.Dense):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((20,))
    x = mark(hidden(16, activation="relu", name="hidden"))(inputs)
    return keras.Model(inputs, layers.Dense(3, name="logits")(layers.Flatten(name="flat")(x)))


def fit(model):
    model.compile("adam", LOSS, jit_compile=False)
    model.fit(*data(), batch_size=16, epochs=2, verbose=0)
    return model


def roundings(model):
    return {layer.name: layer for layer in flat_layers(model) if isinstance(layer, FakeQuantize)}


def kernels(model):
    """The transform of each kernel, by layer."""
    return {
        layer.name: transform
        for layer in transformed_layers(model)
        for _, transform in layer.transforms
        if isinstance(transform, FakeQuantizeWeights)
    }


class EightBits(quantization.QuantizeConfig):
    """A config as TFMOT's guide has it: kernel and activation in 8 bits."""

    bits = 8

    def get_weights_and_quantizers(self, layer):
        quantizer = LastValueQuantizer(
            num_bits=self.bits, symmetric=True, narrow_range=False, per_axis=False
        )
        return [(layer.kernel, quantizer)]

    def get_activations_and_quantizers(self, layer):
        quantizer = MovingAverageQuantizer(
            num_bits=8, symmetric=False, narrow_range=False, per_axis=False
        )
        return [(layer.activation, quantizer)]

    def set_quantize_weights(self, layer, quantize_weights):
        layer.kernel = quantize_weights[0]

    def set_quantize_activations(self, layer, quantize_activations):
        layer.activation = quantize_activations[0]

    def get_output_quantizers(self, layer):
        return []

    def get_config(self):
        return {}


class FourBits(EightBits):
    bits = 4


class NoActivation(EightBits):
    def get_activations_and_quantizers(self, layer):
        return []

    def set_quantize_activations(self, layer, quantize_activations):
        pass


class Own(layers.Dense):
    """A layer of the user's."""


# The guide's ways, in words of our own


@pytest.fixture(scope="module")
def whole():
    return fit(quantization.quantize_model(network()))


def test_a_whole_model_is_trained_and_exported_in_integers(whole, tmp_path):
    artifact = tfaccel.export.to_tflite(whole, tmp_path / "whole.tflite", io_dtype="int8")
    assert artifact.scheme == "int8"
    assert artifact.float_tensors == ()
    x, _ = data(16)
    found, expected = TFLiteModel(artifact.path).predict(x), whole.predict(x, verbose=0)
    step = next(t.scale for t in TFLiteModel(artifact.path).outputs)
    assert np.abs(found - expected).max() <= 1.01 * step


def test_the_given_model_is_not_changed():
    base = network()
    before = [np.array(w) for w in base.get_weights()]
    fit(quantization.quantize_model(base))
    for old, now in zip(before, base.get_weights(), strict=True):
        np.testing.assert_array_equal(old, now)


def test_some_layers_by_clone_model():
    base = network()

    def only_hidden(layer):
        if layer.name == "hidden":
            return quantization.quantize_annotate_layer(layer)
        return layer

    annotated = keras.models.clone_model(base, clone_function=only_hidden)
    x, _ = data(8)
    np.testing.assert_allclose(annotated(x), base(x), rtol=1e-6)
    aware = fit(quantization.quantize_apply(annotated))
    assert list(kernels(aware)) == ["hidden"]
    assert type(aware.get_layer("logits")) is layers.Dense


@pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`")
def test_layers_in_a_definition():
    functional = network(quantization.quantize_annotate_layer)
    aware = quantization.quantize_apply(functional)
    assert {name: t.bits for name, t in kernels(aware).items()} == {"hidden": 8}

    sequential = keras.Sequential(
        [
            quantization.quantize_annotate_layer(layers.Dense(16, input_shape=(20,), name="first")),
            layers.Dense(3, name="last"),
        ]
    )
    assert list(kernels(quantization.quantize_apply(sequential))) == ["first"]


@pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`")
def test_a_layer_of_the_users_with_a_config_saved_and_loaded(tmp_path):
    own = quantization.quantize_annotate_layer(Own(16, input_shape=(20,), name="own"), EightBits())
    annotated = quantization.quantize_annotate_model(
        keras.Sequential([own, layers.Flatten(), layers.Dense(3, name="logits")])
    )
    with quantization.quantize_scope({"EightBits": EightBits, "Own": Own}):
        aware = fit(quantization.quantize_apply(annotated))
        aware.save(tmp_path / "aware.keras")
        annotated.save(tmp_path / "annotated.keras")
        loaded = keras.models.load_model(tmp_path / "aware.keras")
        again = quantization.quantize_apply(keras.models.load_model(tmp_path / "annotated.keras"))
    x, _ = data(8)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), aware.predict(x, verbose=0))
    assert kernels(aware).keys() == kernels(again).keys() == {"own", "logits"}
    # The runtime has no operator for the user's layer: it is computed in float, rounded weights.
    stripped = tfaccel.strip(aware).get_layer("own")
    assert type(stripped) is Own
    levels = np.asarray(stripped.kernel) / np.abs(stripped.kernel).max(axis=0) * 127
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
    assert tfaccel.export.to_tflite(aware, tmp_path / "own.tflite").float_tensors != ()


def test_a_layer_in_four_bits_and_all_others_in_eight(tmp_path):
    def mark(layer):
        return quantization.quantize_annotate_layer(layer, FourBits())

    annotated = quantization.quantize_annotate_model(network(mark))
    with quantization.quantize_scope({"FourBits": FourBits}):
        aware = fit(quantization.quantize_apply(annotated))
    assert {name: t.bits for name, t in kernels(aware).items()} == {"hidden": 4, "logits": 8}
    path = tfaccel.export.to_tflite(aware, tmp_path / "four.tflite").path
    found = audit(path).quantized_tensors.values()
    assert sorted(t.dtype for t in found if len(t.scales) > 1 and t.dtype != "int32") == [
        "int4",
        "int8",
    ]


def test_skipping_an_activation():
    def mark(layer):
        return quantization.quantize_annotate_layer(layer, NoActivation())

    aware = quantization.quantize_apply(network(mark))
    assert list(kernels(aware)) == ["hidden"]
    assert roundings(aware) == {}
    whole = quantization.quantize_apply(quantization.quantize_annotate_model(network(mark)))
    assert set(kernels(whole)) == {"hidden", "logits"}
    # The next layer computes in integers, so that what it reads is rounded all the same.
    assert "hidden_quantize" in roundings(fit(whole))


def test_the_guide_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(tfaccel.__file__).parent.parent / "docs" / "migrating_from_tfmot.md"
    code = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    x, y = data(32)
    names = {"keras": keras, "tfaccel": tfaccel, "tfmot": tfmot, "x": x, "y": y}
    names["model"] = network()
    for block in code[2:]:
        exec(compile(block.replace("epochs=", "verbose=0, epochs="), page.name, "exec"), names)  # noqa: S102
    assert len(code) == 4  # the first two are of pruning
    assert (tmp_path / "int8.tflite").exists()
    found = {name: transform.bits for name, transform in kernels(names["mixed"]).items()}
    assert found == {"hidden": 4, "logits": 8}


# How ranges are found


class Wanted(EightBits):
    """Takes any quantizer for the activation."""

    def __init__(self, quantizer=None, *, outputs=()):
        self._activation, self._outputs = quantizer, list(outputs)

    def get_activations_and_quantizers(self, layer):
        return [(layer.activation, self._activation)] if self._activation else []

    def get_output_quantizers(self, layer):
        return self._outputs


def hidden_rounding(config):
    annotated = network(lambda layer: quantization.quantize_annotate_layer(layer, config))
    return roundings(quantization.quantize_apply(annotated))["hidden_quantize"]


def test_ranges_are_found_as_the_quantizer_says():
    batches = [np.array([[0.0, 4.0]], "float32"), np.array([[0.0, 2.0]], "float32")]
    options = {"per_axis": False, "symmetric": False, "narrow_range": False}
    expected = [
        (LastValueQuantizer(8, **options), 2.0),
        (quantization.quantizers.AllValuesQuantizer(8, **options), 4.0),
        (MovingAverageQuantizer(8, **options), 0.99 * 4 + 0.01 * 2),
        (quantization.quantizers.FixedQuantizer(8, 0.0, 6.0, False), None),
    ]
    for quantizer, maximum in expected:
        for config in (Wanted(quantizer), Wanted(outputs=[quantizer])):
            rounding = hidden_rounding(config)
            for batch in batches:
                rounding(batch, training=True)
            if maximum is None:
                assert rounding.fixed_range == (0.0, 6.0)
            else:
                assert float(rounding.maximum) == pytest.approx(maximum), quantizer
                assert float(rounding.minimum) == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Wanted(LastValueQuantizer(8, True, False, False)), "one range for the whole tensor"),
        (Wanted(LastValueQuantizer(8, False, False, True)), "all levels"),
        (Wanted(LastValueQuantizer(12, False, False, False)), "12 bits"),
        (
            Wanted(
                LastValueQuantizer(8, False, False, False),
                outputs=[LastValueQuantizer(4, False, False, False)],
            ),
            "rounds a value once",
        ),
        (Wanted("no quantizer"), "rounds an activation by a str"),
        (Wanted(outputs=[None, None]), "2 outputs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_activations_that_the_runtime_does_not_have(config, message):
    with pytest.raises(ValueError, match=message):
        hidden_rounding(config)


def config_for_weights(read):
    class Weights(EightBits):
        def get_weights_and_quantizers(self, layer):
            return read(layer)

    return Weights()


def test_weights_that_the_runtime_does_not_have():
    average = MovingAverageQuantizer(8, False, True, True)
    last = LastValueQuantizer(8, False, True, True)
    for read, message in (
        (lambda layer: [(layer.kernel, average)], "Use a LastValueQuantizer"),
        (lambda layer: [(layer.bias, last)], "rounds bias"),
        (lambda layer: [(layer.depthwise_kernel, last)], "does not have: .*layer.kernel there"),
        (lambda layer: [], "rounds the output and not the kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            hidden_rounding(config_for_weights(read))


def test_few_bits_are_for_relus():
    def mark(layer):
        config = Wanted(MovingAverageQuantizer(4, False, False, False))
        return quantization.quantize_annotate_layer(layer, config)

    assert roundings(quantization.quantize_apply(network(mark)))["hidden_quantize"].bits == 4
    inputs = keras.Input((20,))
    linear = keras.Model(inputs, mark(layers.Dense(3, name="linear"))(inputs))
    with pytest.raises(ValueError, match="'linear' cannot have 4 bits"):
        quantization.quantize_apply(linear)


# What is refused


def test_wrong_arguments_say_what_is_right():
    with pytest.raises(ValueError, match="found no annotated layer"):
        quantization.quantize_apply(network())
    with pytest.raises(ValueError, match="keep their names"):
        quantization.quantize_model(network(), quantized_layer_name_prefix="q_")
    with pytest.raises(ValueError, match="subclassed"):
        quantization.quantize_model(type("Subclassed", (keras.Model,), {})())
    with pytest.raises(ValueError, match="quantize_annotate_model"):
        quantization.quantize_annotate_layer(network())
    with pytest.raises(ValueError, match="QuantizeConfig"):
        quantization.quantize_annotate_layer(layers.Dense(2), "config")
    with pytest.raises(ValueError, match="disable_per_axis"):
        quantization.default_8bit.Default8BitQuantizeScheme(disable_per_axis=True)
    with pytest.raises(ValueError, match="scheme must be"):
        quantization.quantize_apply(quantization.quantize_annotate_model(network()), "int8")


def test_a_layer_that_is_not_covered_is_an_error_as_with_tfmot():
    inputs = keras.Input((20,))
    model = keras.Model(inputs, layers.Dense(3)(layers.ELU(name="elu")(inputs)))
    with pytest.raises(RuntimeError, match="elu: ELU is not covered"):
        quantization.quantize_model(model)
    own = keras.Model(inputs, Own(3, name="own")(inputs))
    with pytest.raises(RuntimeError, match="own: Own is not covered"):
        quantization.quantize_model(own)


def test_lambdas_stay_in_float_with_a_warning():
    inputs = keras.Input((20,))
    double = layers.Lambda(lambda x: 2 * x, output_shape=(20,), name="double")
    model = keras.Model(inputs, layers.Dense(3, name="logits")(double(inputs)))
    with pytest.warns(UserWarning, match="'double' stays in float"):
        aware = quantization.quantize_model(model)
    assert list(kernels(aware)) == ["logits"]


def test_n_bits():
    scheme = quantization.experimental.default_n_bit.DefaultNBitQuantizeScheme(
        num_bits_weight=4, num_bits_activation=6
    )
    annotated = quantization.quantize_annotate_model(network())
    aware = quantization.quantize_apply(annotated, scheme)
    assert {t.bits for t in kernels(aware).values()} == {4}
    assert roundings(aware)["hidden_quantize"].bits == 6


def test_pruning_and_quantization_stand_on_one_layer():
    pruned = tfaccel.pruning.prune(network(), 0.5, include="hidden")
    tfaccel.pruning.update_masks(pruned, 0)
    aware = quantization.quantize_model(pruned)
    wrapped = aware.get_layer("hidden")
    assert isinstance(wrapped, TransformedLayer)
    kernel = tfaccel.strip(fit(aware)).get_layer("hidden").kernel
    assert (np.asarray(kernel) == 0).mean() >= 0.5


def test_a_model_that_is_not_built_is_annotated_and_refused_later():
    late = keras.Sequential([layers.Dense(16, name="late"), layers.Dense(3)])
    annotated = quantization.quantize_annotate_model(late)
    with pytest.raises(ValueError, match="needs a built model"):
        quantization.quantize_apply(annotated)
    annotated.build((None, 20))
    assert len(kernels(quantization.quantize_apply(annotated))) == 2


# Against TFMOT itself


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    file = tmp_path_factory.mktemp("tfmot") / "found.json"
    command = [sys.executable, "-W", "ignore", str(Path(quantization_jobs.__file__)), str(file)]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads(file.read_text())


@pytest.mark.parametrize("bits", quantization_jobs.BITS)
def test_kernels_are_rounded_as_tfmot_rounds_them(bits, theirs):
    ours = FakeQuantizeWeights((-1,), bits).finalize(quantization_jobs.KERNEL)
    np.testing.assert_allclose(ours, theirs["kernels"][str(bits)], rtol=1e-5, atol=1e-6)


def test_models_of_tf_keras_are_handed_over(theirs):
    found = theirs["handed over"]
    assert found["whole"] == ["QuantizeLayer", "QuantizeWrapperV2", "QuantizeWrapperV2"]
    assert "QuantizeWrapperV2" in found["some"]
    assert "Dense" in found["some"]
    assert found["bits"] == 4


def test_names_are_where_tfmot_has_them():
    assert {
        "QuantizeConfig",
        "default_8bit",
        "experimental",
        "quantize_annotate_layer",
        "quantize_annotate_model",
        "quantize_apply",
        "quantize_model",
        "quantize_scope",
        "quantizers",
    } <= set(quantization.__all__)
    assert set(quantization.quantizers.__all__) == {
        "AllValuesQuantizer",
        "FixedQuantizer",
        "LastValueQuantizer",
        "MovingAverageQuantizer",
        "Quantizer",
    }
