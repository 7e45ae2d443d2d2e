"""Every scheme against Keras, on models of every shape."""

import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import tfaccel
from tests.contracts.tables import convolutional, make_data, nested, sequential
from tfaccel.export import audit, read_metadata, to_tflite
from tfaccel.measurement.interpreter import TFLiteModel

SCHEMES = ("float32", "float16", "dynamic_int8", "int8")
# Largest error as a share of the largest output; measured at a third of these.
TOLERANCES = {"float32": 1e-5, "float16": 3e-3, "dynamic_int8": 0.06, "int8": 0.1}


def wide():
    """Weights enough that the file's size is that of its weights."""
    keras.utils.set_random_seed(4)
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(64, 3, activation="relu", name="conv_a")(inputs)
    x = layers.Conv2D(128, 3, activation="relu", name="conv_b")(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(layers.Flatten()(x)), name="wide")


def export(model, folder, scheme="float32", **options):
    if scheme == "int8":
        options.setdefault("representative_data", make_data(64, seed=3)[0])
    return to_tflite(model, folder / f"{scheme}.tflite", scheme, **options)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("make_model", [convolutional, sequential, nested])
def test_outputs_are_those_of_keras(make_model, scheme, tmp_path):
    model, x = make_model(), make_data(32, seed=8)[0]
    artifact = export(model, tmp_path, scheme, verify_data=x)
    expected = np.asarray(model(x))
    error = np.abs(TFLiteModel(artifact.path).predict(x) - expected).max()
    assert error <= TOLERANCES[scheme] * np.abs(expected).max()
    assert artifact.verification.max_abs_error == pytest.approx(error, abs=1e-6)
    assert artifact.verification.samples == 32


def test_sizes_are_those_of_the_stored_numbers(tmp_path):
    sizes = {s: export(wide(), tmp_path, s).size_bytes for s in SCHEMES}
    weights = sum(int(np.prod(w.shape)) for w in wide().weights)
    assert 4 * weights < sizes["float32"] < 4 * weights + 5_000
    assert 2 * weights < sizes["float16"] < 2 * weights + 6_000
    assert weights < sizes["dynamic_int8"] < 1.1 * weights + 6_000
    assert weights < sizes["int8"] < 1.1 * weights + 6_000


@pytest.mark.parametrize("io_dtype", ["float32", "int8", "uint8"])
def test_static_int8_is_integers_all_through(io_dtype, tmp_path):
    artifact = export(convolutional(), tmp_path, "int8", io_dtype=io_dtype)
    assert artifact.float_tensors == ()
    file = TFLiteModel(artifact.path)
    assert {str(t.dtype) for t in (*file.inputs, *file.outputs)} == {io_dtype}
    # 8-bit inputs cost at most one step of the output against the file with float ends.
    x = make_data(16, seed=2)[0]
    other = TFLiteModel(export(convolutional(), tmp_path, "int8", io_dtype="int8").path)
    step = other.outputs[0].scale
    assert np.abs(file.predict(x) - other.predict(x)).max() <= step * 1.001


def test_several_inputs_and_outputs_by_name(tmp_path):
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    hidden = layers.Dense(5, activation="tanh", name="hidden")(layers.Concatenate()([a, b]))
    outputs = {"zoo": layers.Dense(2, name="zoo")(hidden), "ant": layers.Dense(3, name="ant")(b)}
    model = keras.Model({"a": a, "b": b}, outputs)
    random = np.random.default_rng(0)
    data = {n: random.normal(size=(9, s)).astype("float32") for n, s in (("a", 4), ("b", 3))}
    artifact = to_tflite(model, tmp_path / "m.tflite", verify_data=data)
    assert artifact.verification.max_abs_error < 1e-5
    file = TFLiteModel(artifact.path)
    assert {t.name for t in file.inputs} == {"a", "b"}
    found = dict(zip([t.name for t in file.outputs], file.predict(data), strict=True))
    for name, expected in model(data).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-5)


def test_integer_inputs_embedding_and_recurrence(tmp_path):
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    x = layers.LSTM(4, unroll=True)(layers.Embedding(11, 3)(tokens))
    model = keras.Model(tokens, layers.Dense(2)(x))
    data = np.random.default_rng(0).integers(0, 11, (8, 6)).astype("int32")
    artifact = to_tflite(model, tmp_path / "m.tflite", verify_data=data)
    assert artifact.verification.max_abs_error < 1e-5


NAMES = ["_conv_stem", "with space", "a/b", "ünïcode", "1st", "x:0", "-dash"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", NAMES)
def test_any_layer_and_model_name_converts(name, tmp_path):
    safe = name.replace("/", "|") if "/" in name else name
    inputs = keras.Input((4,), name="in put" if " " in name else "image")
    model = keras.Model(inputs, layers.Dense(2, name=safe)(inputs), name=safe)
    artifact = to_tflite(model, tmp_path / "m.tflite", verify_data=np.ones((3, 4), "float32"))
    assert artifact.verification.max_abs_error < 1e-6


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_model_exports_in_float32(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    try:
        model = sequential()
    finally:
        keras.config.set_dtype_policy("float32")
    reference = sequential()
    reference.set_weights(model.get_weights())
    x = make_data(8)[0]
    path = to_tflite(model, tmp_path / "m.tflite").path
    np.testing.assert_allclose(TFLiteModel(path).predict(x), reference(x), atol=1e-5)
    assert model.get_layer("conv").compute_dtype == policy.removeprefix("mixed_")


def test_any_batch_size_on_demand(tmp_path):
    path = to_tflite(sequential(), tmp_path / "m.tflite", batch_size=None).path
    assert TFLiteModel(path).inputs[0].dynamic_batch
    fixed = to_tflite(sequential(), tmp_path / "m.tflite", batch_size=4).path
    assert TFLiteModel(fixed).inputs[0].shape == (4, 8, 8, 3)


def test_reads_a_keras_file_and_batches_of_a_dataset(tmp_path):
    import tensorflow as tf

    sequential().save(tmp_path / "model.keras")
    x, y = make_data(40)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    artifact = to_tflite(
        tmp_path / "model.keras",
        tmp_path / "m.tflite",
        "int8",
        representative_data=batches,
        verify_data=batches,
    )
    assert artifact.verification.samples == 40
    assert artifact.verification.top1_agreement >= 0.9


def test_facts_inside_the_file(tmp_path):
    artifact = to_tflite(
        sequential(),
        tmp_path / "m.tflite",
        labels=["ä", "b", "c", "d"],
        metadata={"recipe": {"epochs": 3}},
    )
    facts = read_metadata(artifact.path)
    assert facts["labels"] == ["ä", "b", "c", "d"]
    assert facts["metadata"] == {"recipe": {"epochs": 3}}
    assert facts["tfaccel"] == tfaccel.__version__
    assert (facts["scheme"], len(facts["source_sha256"])) == ("float32", 64)
    other = sequential()
    other.set_weights([w + 1 for w in other.get_weights()])
    again = read_metadata(to_tflite(other, tmp_path / "n.tflite").path)
    assert again["source_sha256"] != facts["source_sha256"]


def test_facts_that_json_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="metadata must be made of what JSON can hold"):
        to_tflite(sequential(), tmp_path / "m.tflite", metadata={"bad": object()})
    assert not list(tmp_path.iterdir())


@settings(max_examples=8)
@given(
    st.lists(st.sampled_from(["conv", "depthwise", "pool", "bn", "relu"]), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(0, 1000),
)
def test_random_chains_agree(tmp_path_factory, kinds, width, seed):
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((8, 8, 3))
    for kind in kinds:
        x = {
            "conv": layers.Conv2D(width, 3, padding="same"),
            "depthwise": layers.DepthwiseConv2D(3, padding="same"),
            "pool": layers.MaxPooling2D(2, padding="same"),
            "bn": layers.BatchNormalization(),
            "relu": layers.ReLU(),
        }[kind](x)
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))
    data = make_data(4, seed)[0]
    path = tmp_path_factory.mktemp("chain") / "m.tflite"
    assert to_tflite(model, path, verify_data=data).verification.max_abs_error < 1e-4


# What goes wrong


BAD = {
    "suffix": ({"path": "m.lite"}, "writes a .tflite file"),
    "scheme": ({"scheme": "int9"}, "no quantization scheme 'int9'"),
    "io": ({"io_dtype": "int16"}, "io_dtype must be one of"),
    "io_of_float": ({"io_dtype": "int8"}, "needs scheme='int8', but the scheme is 'float32'"),
    "no_ranges": ({"scheme": "int8"}, "Pass representative_data="),
    "needless": ({"representative_data": np.ones((2, 8, 8, 3))}, "needs no ranges"),
    "empty": (
        {"scheme": "int8", "representative_data": np.ones((0, 8, 8, 3))},
        "must hold samples",
    ),
    "shape": ({"verify_data": np.ones((5, 7))}, r"takes \['any', 8, 8, 3\], but got \[5, 7\]"),
    "batch": ({"batch_size": 0}, "batch_size must be above 0"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_write_nothing(options, message, tmp_path):
    path = (
        tmp_path / options.pop("path", "m.tflite") if "path" in options else tmp_path / "m.tflite"
    )
    with pytest.raises(ValueError, match=message):
        to_tflite(sequential(), path, options.pop("scheme", None), **options)
    assert not list(tmp_path.iterdir())


def test_trained_model_refuses_another_scheme(tmp_path):
    aware = tfaccel.quantization.quantize_aware(sequential())
    with pytest.raises(ValueError, match=r"was trained for 'int8', but got scheme='float16'"):
        to_tflite(aware, tmp_path / "m.tflite", "float16")


def test_operator_that_litert_lacks_is_named_with_its_layer(tmp_path):
    inputs = keras.Input((3, 3), name="image")
    x = layers.Dense(3, name="before")(inputs)

    @keras.saving.register_keras_serializable("tfaccel_tests")
    class Determinant(layers.Layer):
        def call(self, inputs):
            return keras.ops.det(inputs)

    model = keras.Model(inputs, Determinant(name="determinant")(x), name="odd")
    path = tmp_path / "m.tflite"
    path.write_bytes(b"older file")
    with pytest.raises(ValueError, match=r"'odd' does not convert to float32.*Determinant.*LiteRT"):
        to_tflite(model, path)
    assert path.read_bytes() == b"older file"
    assert [f.name for f in tmp_path.iterdir()] == ["m.tflite"]


def test_file_with_wrong_outputs_is_not_kept(tmp_path, monkeypatch):
    from tfaccel.export import conversion

    other = sequential()
    other.set_weights([w * 3 for w in other.get_weights()])
    monkeypatch.setattr(conversion, "prepare", lambda model: other)
    with pytest.raises(ValueError, match=r"was not kept: as float32 its outputs are up to"):
        to_tflite(sequential(), tmp_path / "m.tflite", verify_data=make_data(8)[0])
    assert not list(tmp_path.iterdir())


def test_audit_names_float_islands(tmp_path):
    path = export(convolutional(), tmp_path, "float32").path
    found = audit(path)
    assert found.quantized_tensors == {}
    assert len(found.float_tensors) > 5


def test_nothing_appears_on_the_terminal(tmp_path):
    script = """
        import sys
        import keras, numpy as np
        import tfaccel
        from keras import layers
        inputs = keras.Input((8, 8, 3))
        x = layers.Conv2D(4, 3, name="_conv_stem")(inputs)
        x = layers.BatchNormalization()(x)
        model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))
        x = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype("float32")
        aware = tfaccel.quantization.quantize_aware(model)
        aware.compile("sgd", "mse")
        aware.fit(x, np.zeros((16, 2)), verbose=0)
        sys.stdout.flush(), sys.stderr.flush()
        print("BEGIN", flush=True)
        print("BEGIN", file=sys.stderr, flush=True)
        for scheme in ("float32", "float16", "dynamic_int8"):
            tfaccel.export.to_tflite(model, f"{sys.argv[1]}/{scheme}.tflite", scheme, verify_data=x)
        tfaccel.export.to_tflite(model, f"{sys.argv[1]}/a.tflite", "int8", representative_data=x)
        tfaccel.export.to_tflite(aware, f"{sys.argv[1]}/b.tflite", io_dtype="int8", verify_data=x)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert done.stdout.partition("BEGIN")[2].strip() == ""
    assert done.stderr.partition("BEGIN")[2].strip() == ""


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": None}, TypeError, "path must be str or PathLike, but got None"),
        ({"model": None}, TypeError, r"to_tflite\(\) needs a keras.Model, but got NoneType"),
        ({"labels": 3}, TypeError, "labels must be a list of strings, but got 3"),
        ({"labels": "abcd"}, TypeError, "labels must be a list of strings"),
        ({"metadata": "abc"}, TypeError, "metadata must be Mapping, but got 'abc'"),
    ],
)
def test_wrong_types_are_one_clear_error(arguments, error, message, tmp_path):
    values = {"model": sequential(), "path": tmp_path / "m.tflite", **arguments}
    with pytest.raises(error, match=message):
        to_tflite(**values)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_read_only_is_found_before_the_work(tmp_path, monkeypatch):
    # Root may write anywhere, so the answer of the system is given here.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="is read-only"):
        to_tflite(sequential(), tmp_path / "new" / "m.tflite")
    assert not list(tmp_path.iterdir())
