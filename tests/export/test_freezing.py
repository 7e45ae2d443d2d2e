"""What a network's form becomes in the file: names, ends, loops, precision, batch size."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.export import networks
from tests.export.networks import samples
from tfaccel.export import to_tflite, verify
from tfaccel.export.freezing import end_names, name_scopes, save_inference, to_float32
from tfaccel.measurement.interpreter import TFLiteModel
from tfaccel.quantization import quantize_aware

SCHEMES = ("float32", "float16", "dynamic_int8", "int8")


def export(model, folder, scheme=None, **options):
    return to_tflite(model, folder / "m.tflite", scheme, **options)


def names(path):
    file = TFLiteModel(path)
    return [info.name for info in file.inputs], [info.name for info in file.outputs]


WORDS = np.random.default_rng(0).integers(0, 50, (64, 7))
PAIR = {"left": samples(64, 4), "right": samples(64, 3, seed=2)}
FORMS = {
    "several": (networks.several, [samples(64, 4), samples(64, 3, seed=2)]),
    "keyed": (networks.keyed, PAIR),
    "nested": (networks.nested, samples(64, 8, 8, 4)),
    "embedding": (networks.embedding, WORDS),
    "attention": (networks.attention, samples(64, 6, 8)),
}


@pytest.mark.one_in(7)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("make_model", "data"), FORMS.values(), ids=FORMS)
def test_every_form_agrees_with_keras(make_model, data, scheme, tmp_path):
    ranges = {"representative_data": data} if scheme == "int8" else {}
    model = make_model()
    verification = export(model, tmp_path, scheme, verify_data=data, **ranges).verification
    tolerance = {"float32": 1e-6, "float16": 2e-3, "dynamic_int8": 0.02, "int8": 0.06}[scheme]
    assert verification.samples == 64
    assert verification.max_abs_error <= tolerance * verification.largest_output
    if make_model is not networks.attention:  # its outputs are no classes
        assert verification.top1_agreement >= (0.95 if "int8" in scheme else 1.0)


def test_outputs_belong_to_their_names(tmp_path):
    model = networks.several()
    path = export(model, tmp_path).path
    assert names(path) == (["z_left", "a_right"], ["z_out", "a_out"])
    data = FORMS["several"][1]
    for ours, expected in zip(TFLiteModel(path).predict(data), model(data), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_keys_of_a_dict_are_the_names(tmp_path):
    model = networks.keyed()
    path = export(model, tmp_path).path
    assert names(path) == (["left", "right"], ["classes", "value"])
    ours = dict(zip(names(path)[1], TFLiteModel(path).predict(PAIR), strict=True))
    for name, expected in model(PAIR).items():
        np.testing.assert_allclose(ours[name], expected, atol=1e-5)


def test_names_of_one_network_are_the_same_in_every_file(tmp_path):
    aware = quantize_aware(networks.plain())
    aware.compile("sgd", "mse")
    aware.fit(samples(16, 12, 12, 3), np.zeros((16, 5)), verbose=0)
    ends = end_names(networks.plain())
    assert ends == (["image"], ["logits"])
    for model in (networks.plain(), aware, quantize_aware(networks.plain())):
        assert end_names(model) == ends
    assert names(export(aware, tmp_path, io_dtype="int8").path) == ends
    file = TFLiteModel(tmp_path / "m.tflite", delegates=False)
    assert {"image", "logits"} <= {tensor["name"] for tensor in file.tensor_details()}


@pytest.mark.parametrize("name", ["class", "self", "1st", "in put", "größe", "_private", "a:b"])
def test_any_input_name_is_kept(name, tmp_path):
    inputs = keras.Input((4,), name=name)
    model = keras.Model(inputs, layers.Dense(2, name=f"{name} out")(inputs))
    path = export(model, tmp_path, verify_data=samples(4, 4)).path
    assert names(path) == ([name], [f"{name} out"])


def test_layers_whose_safe_names_are_equal(tmp_path):
    x = inputs = keras.Input((4,), name="x")
    for name in ("a b", "a:b", "a_b"):
        x = layers.Dense(4, name=name)(x)
    model = networks.randomized(keras.Model(inputs, x))
    assert export(model, tmp_path, verify_data=samples(4, 4)).verification.max_abs_error < 1e-5
    assert [x.name for x in model.layers[1:]] == ["a b", "a:b", "a_b"]
    scopes = name_scopes(keras.models.clone_model(model))
    assert {"'a b' (Dense)", "'a:b' (Dense)", "'a_b' (Dense)"} <= set(scopes.values())


def test_tensor_that_is_two_outputs_or_an_input_as_well(tmp_path):
    inputs = keras.Input((4,), name="x")
    y = layers.Dense(3, name="y")(inputs)
    model = keras.Model(inputs, [y, inputs, y])
    artifact = export(model, tmp_path, verify_data=samples(4, 4))
    assert artifact.verification.max_abs_error < 1e-6
    assert sorted(names(artifact.path)[1]) == ["x", "y", "y_1"]


def test_unused_input_stays(tmp_path):
    used, unused = keras.Input((4,), name="used"), keras.Input((2,), name="unused")
    # Its values do not matter, so the converter could do without.
    y = layers.Dense(2, name="y")(used) + keras.ops.zeros_like(unused)
    model = keras.Model([used, unused], y)
    artifact = export(model, tmp_path, verify_data=[samples(4, 4), samples(4, 2)])
    assert names(artifact.path)[0] == ["used", "unused"]


def test_what_belongs_to_training_is_left_out(tmp_path):
    x = inputs = keras.Input((8, 8, 3), name="image")
    x = layers.GaussianNoise(1.0)(layers.RandomFlip()(x))
    x = layers.BatchNormalization(name="alone")(x)  # follows nothing that it could be folded into
    x = layers.Dropout(0.5)(layers.Flatten()(x))
    model = networks.randomized(keras.Model(inputs, layers.Dense(3)(x)))
    x = samples(16, 8, 8, 3)
    assert export(model, tmp_path, verify_data=x).verification.max_abs_error < 1e-5


RECURRENT = {
    "lstm": lambda: networks.recurrent(layers.LSTM),
    "gru": lambda: networks.recurrent(layers.GRU),
    "unrolled_gru": lambda: networks.recurrent(layers.GRU, unroll=True),
    "bidirectional": lambda: keras.Sequential(
        [keras.Input((6, 4)), layers.Bidirectional(layers.LSTM(3)), layers.Dense(2)]
    ),
    "any_length": lambda: keras.Sequential(
        [keras.Input((None, 4)), layers.SimpleRNN(3), layers.Dense(2)]
    ),
    "masked": lambda: keras.Sequential(
        [keras.Input((6, 4)), layers.Masking(0.0), layers.LSTM(3), layers.Dense(2)]
    ),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("make_model", RECURRENT.values(), ids=RECURRENT)
def test_recurrent_layers_agree(make_model, tmp_path):
    x = samples(8, 6, 4)
    x[:4, 3:] = 0.0
    assert export(make_model(), tmp_path, verify_data=x).verification.max_abs_error < 1e-5


def test_unrolled_recurrence_becomes_integers(tmp_path):
    model, x = networks.recurrent(layers.LSTM, unroll=True), samples(64, 6, 4)
    artifact = export(model, tmp_path, "int8", representative_data=x, verify_data=x)
    assert artifact.verification.top1_agreement >= 0.9


def test_integer_input_stays_integer_where_the_rest_is_quantized(tmp_path):
    options = {"representative_data": WORDS, "io_dtype": "int8"}
    file = TFLiteModel(export(networks.embedding(), tmp_path, "int8", **options).path)
    assert [str(info.dtype) for info in (*file.inputs, *file.outputs)] == ["int32", "int8"]


POLICIES = ["mixed_bfloat16", "float16", "float64"]


@pytest.mark.parametrize("policy", POLICIES)
def test_any_precision_becomes_float32(policy, tmp_path):
    reference = networks.attention()
    keras.config.set_dtype_policy(policy)
    try:
        model = networks.attention()
    finally:
        keras.config.set_dtype_policy("float32")
    model.set_weights(reference.get_weights())
    plain = to_float32(model)
    assert {x.compute_dtype for x in plain.layers} == {"float32"}
    assert to_float32(plain) is plain
    x = samples(8, 6, 8)
    # Compared in float32: half precision alone would put Keras itself further off.
    artifact = export(model, tmp_path, verify_data=x)
    assert artifact.verification.max_abs_error < 1e-5
    assert verify(artifact.path, model, x) == artifact.verification
    # What is left is the precision in which the weights were kept.
    kept = {"float16": 0.02}.get(policy, 1e-4)
    np.testing.assert_allclose(TFLiteModel(artifact.path).predict(x), reference(x), atol=kept)


def test_fixed_batch_size_of_the_model_is_kept(tmp_path):
    model = keras.Sequential([keras.Input(batch_shape=(4, 6)), layers.Dense(3)], name="four")
    artifact = export(model, tmp_path, verify_data=samples(10, 6))
    assert TFLiteModel(artifact.path).inputs[0].shape == (4, 6)
    assert artifact.verification.max_abs_error < 1e-5
    with pytest.raises(ValueError, match="'four' takes batches of 4, so batch_size cannot be 3"):
        export(model, tmp_path, batch_size=3)
    with pytest.raises(ValueError, match="must hold samples, 4 at least, but got 3"):
        export(model, tmp_path, "int8", representative_data=samples(3, 6))


def test_weights_are_no_constants_of_the_graph(tmp_path):
    """As constants they would be copied over and over: a VGG took 19 GB to convert."""
    model = keras.Sequential([keras.Input((256,)), layers.Dense(1024, name="d")])
    save_inference(model, tmp_path, 1)
    weights = 4 * model.count_params()
    assert (tmp_path / "saved_model.pb").stat().st_size < 0.1 * weights
    (data,) = (tmp_path / "variables").glob("*.data-*")
    assert data.stat().st_size >= weights
