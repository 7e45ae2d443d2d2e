"""Every rewrite on every model."""

import functools
import json

import keras
import numpy as np
import pytest

import tfaccel
from tests.contracts.tables import MODELS, REWRITES, make_data
from tfaccel.core import keras_private
from tfaccel.core.artifacts import load_model

every_rewrite = pytest.mark.parametrize("name", REWRITES)
# Each kind of layer is trained in all ways once; `test_gives_the_layers_it_says` tells the kinds.
every_kind = pytest.mark.parametrize(
    "name", [name for name, rewrite in REWRITES.items() if rewrite.like is None]
)
every_new_kind = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] if rewrite.like else [])
        for name, rewrite in REWRITES.items()
    ],
)
every_model = pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)


def outputs_of(model):
    return np.asarray(model(make_data(8)[0], training=False))


def all_layers(model):
    return list(keras_private.sublayers(model))


def kinds(model):
    """The classes of a model's layers, and of what is done to their weights."""
    layers = all_layers(model)
    transforms = [t for x in layers for _, t in getattr(x, "transforms", ())]
    return {(type(x).__module__, type(x).__name__) for x in (*layers, *transforms)}


def fingerprint(model):
    weights = [np.array(v) for v in model.variables]
    calls = [(x.name, len(x._inbound_nodes), x.trainable) for x in all_layers(model)]
    return weights, calls, model.get_config()


def train(model, rewrite, *, jit=False, steps=1, epochs=1):
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit,
        steps_per_execution=steps,
    )
    x, y = make_data()
    history = model.fit(
        x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=rewrite.callbacks()
    )
    return history.history["loss"]


@functools.cache
def trained(name, model="convolutional"):
    """A rewritten model after training, with its losses: made once, looked at by several tests."""
    rewritten = REWRITES[name].apply(MODELS[model]())
    return rewritten, train(rewritten, REWRITES[name], epochs=6)


@pytest.mark.one_in(2)
@every_model
@every_rewrite
def test_argument_is_not_changed(name, make_model):
    rewrite, model = REWRITES[name], make_model()
    weights, calls, config = fingerprint(model)
    rewritten = rewrite.apply(model)
    assert rewritten is not model
    after, calls_after, config_after = fingerprint(model)
    for old, new in zip(weights, after, strict=True):
        np.testing.assert_array_equal(old, new)
    assert calls_after == calls
    assert config_after == config
    assert not set(map(id, all_layers(model))) & set(map(id, all_layers(rewritten)))


@pytest.mark.one_in(2)
@every_model
@every_rewrite
def test_names_and_weights_are_carried_over(name, make_model):
    rewrite, model = REWRITES[name], make_model()
    rewritten = rewrite.apply(model)
    assert rewritten.name == model.name
    assert [t.name for t in rewritten.inputs] == [t.name for t in model.inputs]
    kernel = np.asarray(model.get_layer("logits").kernel)
    if not rewrite.keeps_weights:
        assert kernel.shape in [tuple(v.shape) for v in rewritten.weights]
    elif rewrite.keeps_shapes:
        found = [np.asarray(v) for v in rewritten.weights if v.shape == kernel.shape]
        assert any(np.array_equal(value, kernel) for value in found)
    else:
        smaller = np.asarray(rewritten.get_layer("logits").kernel)
        assert 0 < len(smaller) < len(kernel)
        assert {tuple(row) for row in smaller} <= {tuple(row) for row in kernel}
    if rewrite.keeps_outputs is not None:
        difference = np.abs(outputs_of(rewritten) - outputs_of(model)).max()
        assert difference <= rewrite.keeps_outputs


@every_new_kind
def test_survives_save_and_load_to_the_last_bit(name, tmp_path):
    model, _ = trained(name, "nested")
    model.save(tmp_path / "model.keras")
    loaded = load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(outputs_of(loaded), outputs_of(model))
    ours = [x for x in all_layers(model) if type(x).__module__.startswith("tfaccel")]
    again = [x for x in all_layers(loaded) if type(x).__module__.startswith("tfaccel")]
    assert [json.dumps(x.get_config()) for x in again] == [json.dumps(x.get_config()) for x in ours]


@pytest.mark.one_in(2)
@every_kind
def test_training_goes_on_after_load_as_if_not_stopped(name, tmp_path):
    rewrite = REWRITES[name]
    _, losses = trained(name)
    halted = rewrite.apply(MODELS["convolutional"]())
    first = train(halted, rewrite)
    halted.save(tmp_path / "halfway.keras")
    resumed = load_model(tmp_path / "halfway.keras", compile=True)
    x, y = make_data()
    second = resumed.fit(
        x, y, batch_size=8, shuffle=False, verbose=0, callbacks=rewrite.callbacks()
    ).history["loss"]
    assert first + second == losses[:2]


@pytest.mark.parametrize(
    "make_model",
    [
        pytest.param(make, id=name, marks=[pytest.mark.exhaustive] if name == "sequential" else [])
        for name, make in MODELS.items()
    ],
)
@every_new_kind
def test_strips_to_plain_keras(name, make_model):
    model, _ = trained(name, make_model.__name__)
    plain = tfaccel.strip(model)
    assert {type(x).__module__.split(".")[0] for x in all_layers(plain)} == {"keras"}
    assert [t.name for t in plain.inputs] == [t.name for t in model.inputs]
    if REWRITES[name].strips_exactly:
        np.testing.assert_allclose(outputs_of(plain), outputs_of(model), atol=1e-6)


@every_model
@pytest.mark.parametrize("name", [name for name, rewrite in REWRITES.items() if rewrite.like])
def test_gives_the_layers_it_says(name, make_model):
    like = REWRITES[name].like
    found = kinds(REWRITES[name].apply(make_model()))
    if like == "keras":
        assert {module.split(".")[0] for module, _ in found} == {"keras"}
    else:
        assert found <= kinds(REWRITES[like].apply(make_model()))


@every_new_kind
def test_trains(name):
    _, losses = trained(name)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@pytest.mark.one_in(2)
@every_kind
def test_trains_compiled_by_xla(name):
    model = REWRITES[name].apply(MODELS["convolutional"]())
    losses = train(model, REWRITES[name], jit=True, epochs=6)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@pytest.mark.one_in(3)
@every_kind
def test_steps_per_execution_changes_nothing(name):
    one, _ = trained(name)
    four = REWRITES[name].apply(MODELS["convolutional"]())
    train(four, REWRITES[name], steps=4, epochs=6)
    np.testing.assert_allclose(outputs_of(four), outputs_of(one), atol=1e-4)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@every_kind
def test_trains_in_mixed_precision(name, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = REWRITES[name].apply(MODELS["convolutional"]())
    finally:
        keras.config.set_dtype_policy("float32")
    losses = train(model, REWRITES[name], epochs=4)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@every_new_kind
def test_exports(name, tmp_path):
    model, _ = trained(name)
    x, _ = make_data(64, seed=9)
    artifact = tfaccel.export.to_tflite(model, tmp_path / "model.tflite", verify_data=x)
    assert artifact.path.stat().st_size == artifact.size_bytes
    assert artifact.verification.top1_agreement >= 0.95


@every_rewrite
def test_refuses_what_it_cannot_rewrite(name):
    rewrite = REWRITES[name]
    if not rewrite.refuses_alike:
        pytest.skip("refuses as the library does whose name it has")

    class Own(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(TypeError, match=r"subclassed Own.*keras\.Model\(inputs, outputs\)"):
        rewrite.apply(Own())
    with pytest.raises(ValueError, match="has no weights yet"):
        rewrite.apply(keras.Sequential([keras.layers.Dense(2)]))
    with pytest.raises(TypeError, match=r"needs a keras\.Model, but got str"):
        rewrite.apply("model.keras")
