"""QRNN and SRU against the papers' equations in numpy, and what every Keras layer must do."""

import keras
import numpy as np
import pytest
from keras import layers

from tfaccel.architectures.recurrent import QRNN, SRU
from tfaccel.export import to_tflite
from tfaccel.measurement import TFLiteModel, count
from tfaccel.measurement.flatbuffer import TFLiteFile

FEATURES, UNITS, STEPS = 5, 4, 9

LAYERS = {
    "QRNN f": lambda **a: QRNN(UNITS, pooling="f", **a),
    "QRNN fo": lambda **a: QRNN(UNITS, **a),
    "QRNN ifo": lambda **a: QRNN(UNITS, 3, "ifo", **a),
    "SRU": lambda **a: SRU(UNITS, **a),
    "SRU plain gates": lambda **a: SRU(UNITS, recurrent_gates=False, highway_bias=-1.0, **a),
    "SRU unrolled": lambda **a: SRU(UNITS, unroll=True, **a),
}
each = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def sequences(batch=3, steps=STEPS, features=FEATURES, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, steps, features)).astype("float32")


def built(layer, features=FEATURES):
    """With biases that are not zero."""
    keras.utils.set_random_seed(1)
    layer.build((None, STEPS, features))
    random = np.random.default_rng(1)
    layer.set_weights([random.normal(scale=0.7, size=w.shape) for w in layer.get_weights()])
    return layer


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def qrnn(layer, x, initial=None):
    """Eqs. 1 to 5, a step and a tap at a time."""
    kernel, bias = layer.get_weights()
    state = np.zeros((len(x), UNITS)) if initial is None else initial
    outputs, states = [], []
    for step in range(x.shape[1]):
        gates = np.tile(bias, (len(x), 1)).astype(float)
        for tap in range(layer.kernel_size):
            place = step - (layer.kernel_size - 1) + tap
            if place >= 0:
                gates += x[:, place] @ kernel[tap]
        z, f, *rest = np.split(gates, kernel.shape[-1] // UNITS, -1)
        z, f = np.tanh(z), sigmoid(f)
        i = sigmoid(rest[1]) if layer.pooling == "ifo" else 1 - f
        state = f * state + i * z
        states.append(state)
        outputs.append(state if layer.pooling == "f" else sigmoid(rest[0]) * state)
    return np.stack(outputs, 1), np.stack(states, 1)


@pytest.mark.parametrize("pooling", ["f", "fo", "ifo"])
@pytest.mark.parametrize("kernel_size", [1, 2, 4])
def test_qrnn_computes_the_papers_equations(pooling, kernel_size):
    layer = built(QRNN(UNITS, kernel_size, pooling, return_sequences=True, return_state=True))
    x = sequences()
    start = sequences(3, 1, UNITS, 5)[:, 0]
    for initial in (None, start):
        outputs, state = layer(x, initial_state=initial)
        expected, states = qrnn(layer, x, initial)
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state, states[:, -1], rtol=1e-4, atol=1e-5)


def sru(layer, x, initial=None):
    """Eqs. 1 to 4, a step at a time."""
    kernel, bias = np.asarray(layer.kernel), np.asarray(layer.bias)
    parts = np.split(kernel, kernel.shape[1] // UNITS, 1)
    named = {w.name: np.asarray(w) for w in layer.weights}
    v_f, v_r = (named.get(f"{gate}_vector", np.zeros(UNITS)) for gate in ("forget", "reset"))
    assert len(named) == (4 if layer.recurrent_gates else 2)
    b_f, b_r = np.split(bias, 2)
    alpha = np.sqrt(1 + 2 * np.exp(layer.highway_bias))
    state, outputs = np.zeros((len(x), UNITS)) if initial is None else initial, []
    for step in range(x.shape[1]):
        now = x[:, step]
        f = sigmoid(now @ parts[1] + v_f * state + b_f)
        r = sigmoid(now @ parts[2] + v_r * state + b_r)
        state = f * state + (1 - f) * (now @ parts[0])
        highway = now @ parts[3] if len(parts) == 4 else now
        outputs.append(r * state + (1 - r) * alpha * highway)
    return np.stack(outputs, 1), state


@pytest.mark.parametrize("features", [FEATURES, UNITS])
@pytest.mark.parametrize(
    "arguments", [{}, {"unroll": True}, {"recurrent_gates": False, "highway_bias": -1.0}]
)
def test_sru_computes_the_papers_equations(arguments, features):
    layer = built(SRU(UNITS, return_sequences=True, return_state=True, **arguments), features)
    x = sequences(features=features)
    for initial in (None, sequences(3, 1, UNITS, 5)[:, 0]):
        outputs, state = layer(x, initial_state=initial)
        expected, last = sru(layer, x, initial)
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-5)
    matrices = 3 if features == UNITS else 4
    vectors = 0 if arguments.get("recurrent_gates") is False else 2
    assert layer.count_params() == UNITS * (matrices * features + 2 + vectors)


@pytest.mark.parametrize("bias", [0.0, -2.0])
def test_sru_keeps_the_variance_at_the_start(bias):
    # Section 3.2: with alpha = sqrt(1 + 2 exp(b)) the outputs vary as much as the inputs.
    keras.utils.set_random_seed(0)
    layer = SRU(256, highway_bias=bias, bias_initializer="ones", return_sequences=True)
    x = sequences(64, 20, 256)
    outputs = np.asarray(layer(x))[:, 10:]
    # Without the scale 0.4 for a bias of 0.
    assert 0.8 < outputs.var() < 1.15
    # b belongs to the highway's gate alone.
    np.testing.assert_array_equal(layer.bias[:256], np.ones(256))
    np.testing.assert_array_equal(layer.bias[256:], np.full(256, bias))


@each
def test_masked_steps_are_as_if_they_were_not_there(make):
    layer = built(make(return_sequences=True, return_state=True))
    x = sequences()
    mask = np.ones((3, STEPS), bool)
    mask[0, 6:] = mask[1, :4] = False
    dirty = x.copy()
    dirty[~mask] = 1e3
    outputs, state = layer(dirty, mask=mask)
    for row, part in ((0, slice(0, 6)), (1, slice(4, None)), (2, slice(None))):
        alone, last = layer(x[row : row + 1, part])
        np.testing.assert_allclose(outputs[row, part], alone[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state[row], last[0], rtol=1e-4, atol=1e-5)
    only_last = make()
    only_last.build((None, STEPS, FEATURES))
    only_last.set_weights(layer.get_weights())
    expected = np.stack([outputs[0, 5], outputs[1, -1], outputs[2, -1]])
    np.testing.assert_allclose(only_last(dirty, mask=mask), expected, rtol=1e-5)


@each
def test_a_state_outlasts_masked_steps(make):
    layer = built(make(return_sequences=True, return_state=True))
    x, start = sequences(), sequences(3, 1, UNITS, 5)[:, 0]
    mask = np.ones((3, STEPS), bool)
    mask[0, :4] = False
    mask[1] = False
    dirty = x.copy()
    dirty[~mask] = np.nan
    outputs, state = layer(dirty, initial_state=start, mask=mask)
    alone, last = layer(x[:1, 4:], initial_state=start[:1])
    np.testing.assert_allclose(outputs[0, 4:], alone[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state[0], last[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state[1], start[1], rtol=1e-6)


@each
def test_backwards_and_bidirectional(make):
    forward, backward = built(make(return_sequences=True)), make(return_sequences=True)
    backward.build((None, STEPS, FEATURES))
    backward.set_weights(forward.get_weights())
    backward.go_backwards = True
    x = sequences()
    np.testing.assert_allclose(backward(x), forward(x[:, ::-1]), rtol=1e-5)
    both = layers.Bidirectional(make(return_sequences=True))
    y = np.asarray(both(x))
    assert y.shape == (3, STEPS, 2 * UNITS)
    moved = x.copy()
    moved[:, -1] += 1  # reaches the first step backwards only
    change = np.abs(np.asarray(both(moved)) - y)[:, 0]
    assert change[:, :UNITS].max() == 0
    assert change[:, UNITS:].max() > 0


def test_zoneout_keeps_states_in_training_only():
    layer = built(QRNN(UNITS, zoneout=0.4, return_sequences=True, pooling="f", seed=3))
    plain = built(QRNN(UNITS, return_sequences=True, pooling="f"))
    x = sequences(400, 12)
    np.testing.assert_array_equal(layer(x, training=False), plain(x))
    outputs = np.asarray(layer(x, training=True))
    kept = np.isclose(outputs[:, 1:], outputs[:, :-1], rtol=1e-5, atol=1e-7).mean()
    # 400 * 11 * 4 draws: a standard error of 0.004.
    assert kept == pytest.approx(0.4, abs=0.02)
    again = np.asarray(layer(x, training=True))
    assert not np.array_equal(outputs, again)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "SRU unrolled"])
def test_an_open_number_of_steps(name):
    layer = built(LAYERS[name](return_sequences=True, return_state=True))
    inputs = keras.Input((None, FEATURES))
    start = keras.Input((UNITS,))
    model = keras.Model([inputs, start], layer(inputs, initial_state=start))
    model.compile("sgd", "mse", jit_compile=True)
    state = sequences(3, 1, UNITS, 5)[:, 0]
    for steps in (1, 4, 9):
        x = sequences(steps=steps)
        found = model.predict([x, state], verbose=0)
        for ours, theirs in zip(found, layer(x, initial_state=state), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.one_in(5)
@each
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_learns_to_remember_the_first_step(make, jit):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((STEPS, FEATURES))
    x = make(return_sequences=True)(inputs)
    x = make()(x)
    model = keras.Model(inputs, layers.Dense(1)(x))
    model.compile(keras.optimizers.Adam(0.03), "mse", jit_compile=jit)
    x = sequences(64)
    history = model.fit(x, x[:, 0, :1], batch_size=32, epochs=25, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]


@each
def test_survives_save_and_load(make, tmp_path):
    inputs = keras.Input((None, FEATURES))
    layer = make(return_state=True, go_backwards=True, kernel_regularizer="l2", name="light")
    if getattr(layer, "unroll", False):
        inputs = keras.Input((STEPS, FEATURES))
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    for ours, theirs in zip(loaded(sequences()), model(sequences()), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert loaded.get_layer("light").get_config() == layer.get_config()


@pytest.mark.one_in(2)
@each
def test_half_precision(make):
    layer = built(make(return_sequences=True))
    half = make(return_sequences=True, dtype="mixed_bfloat16")
    half.build((None, STEPS, FEATURES))
    half.set_weights(layer.get_weights())
    y = half(sequences())
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    np.testing.assert_allclose(keras.ops.cast(y, "float32"), layer(sequences()), atol=0.1, rtol=0.1)


@each
def test_shapes_and_macs(make):
    layer = make(return_sequences=True, return_state=True)
    shapes = layer.compute_output_shape((None, STEPS, FEATURES))
    assert shapes == ((None, STEPS, UNITS), (None, UNITS))
    inputs = keras.Input((STEPS, FEATURES))
    model = keras.Model(inputs, layer(inputs))
    assert [tuple(t.shape) for t in model.outputs] == list(shapes)
    # Every weight of the kernel is used once in each step.
    assert count(model).macs == STEPS * int(np.prod(layer.kernel.shape))
    start = keras.Input((UNITS,))
    model = keras.Model([inputs, start], make()(inputs, initial_state=start))
    assert count(model).macs == STEPS * int(np.prod(layer.kernel.shape))


@pytest.mark.one_in(2)
@each
def test_tflite(make, tmp_path):
    inputs = keras.Input((8, FEATURES))
    x = layers.Dense(3)(built(make())(inputs))
    model = keras.Model(inputs, x)
    data = sequences(64, 8)
    expected = np.asarray(model(data))
    floats = to_tflite(model, tmp_path / "f.tflite").path
    np.testing.assert_allclose(TFLiteModel(floats).predict(data), expected, atol=1e-4)
    layer = model.layers[1]
    if isinstance(layer, SRU) and layer.recurrent_gates and not layer.unroll:
        with pytest.raises(ValueError, match="without loops"):
            to_tflite(model, tmp_path / "i.tflite", "int8", representative_data=data)
        return
    artifact = to_tflite(model, tmp_path / "i.tflite", "int8", representative_data=data)
    assert artifact.float_tensors == ()
    error = np.abs(TFLiteModel(artifact.path).predict(data) - expected) / expected.std()
    assert error.mean() < 0.05
    assert "WHILE" not in {x.name for x in TFLiteFile.read(artifact.path).operators()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QRNN(0), "units must be above 0"),
        (lambda: QRNN(3, 0), "kernel_size must be above 0"),
        (lambda: QRNN(3, pooling="of"), "pooling must be one of 'f', 'fo', 'ifo'"),
        (lambda: QRNN(3, zoneout=1.0), "zoneout must be a fraction"),
        (lambda: QRNN(3, name="q")(np.zeros((2, 3))), r"'q' takes \[batch, time, features\]"),
        (lambda: SRU(3, name="s")(keras.Input((4, None))), "known number of features"),
        (lambda: SRU(3, unroll=True)(keras.Input((None, 2))), "needs a known number of steps"),
        (lambda: SRU(3, highway_bias=-1.0, use_bias=False), "-1.0 with use_bias=False"),
        (
            lambda: QRNN(3, name="q")(sequences(), initial_state=np.zeros((3, 2))),
            r"'q' takes an initial_state \[batch, 3\], but got the shape \(3, 2\)",
        ),
        (
            lambda: SRU(3, name="s")(sequences(), initial_state=[np.zeros((3, 3))] * 2),
            "'s' has one state, but got 2",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QRNN(2.5), "units must be int or integer, but got 2.5"),
        (lambda: SRU("4"), "units must be int or integer, but got '4'"),
        (lambda: QRNN(3, 1.5), "kernel_size must be int or integer, but got 1.5"),
        (lambda: SRU(3, highway_bias="0"), "highway_bias must be a number"),
    ],
)
def test_wrong_types_are_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()
