import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tests.comparing import fingerprint
from tfaccel.export import to_tflite
from tfaccel.measurement import count, count_layers, measure
from tfaccel.rewriting.least_squares import SeparableFit, split_channels
from tfaccel.rewriting.sampling import PatchSampler
from tfaccel.rewriting.separation import plan_separable, separable


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def numpy_of(x):
    return keras.ops.convert_to_numpy(x)


def images(count, channels, seed, size=10):
    """Smooth images whose channels hang together, as activations do, about a mean."""
    raw = np.random.default_rng(seed).normal(size=(count, size + 4, size + 4, channels))
    smooth = sum(np.roll(raw, (i, j), axis=(1, 2)) for i in range(3) for j in range(3))
    mixing = np.random.default_rng(99).normal(size=(channels, channels))
    return (smooth[:, 2:-2, 2:-2] @ mixing / 6 + 1).astype("float32")


def network(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((10, 10, 4)),
            layers.Conv2D(12, 3, padding="same", activation="relu", name="first"),
            layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False, name="stride"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.Conv2D(
                16, 3, dilation_rate=2, padding="same", activation="relu", name="dilated"
            ),
            layers.Conv2D(8, 1, name="point"),
            layers.GlobalAveragePooling2D(name="pool"),
            layers.Dense(5, name="logits"),
        ]
    )


# Patches and least squares


@settings(max_examples=40)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 2),
    padding=st.sampled_from(["valid", "same"]),
    sides=st.tuples(st.integers(7, 9), st.integers(7, 9)),
)
def test_patches_times_kernel_are_the_convolution(kernel, strides, dilation, padding, sides):
    if dilation > 1:
        strides = (1, 1)
    layer = layers.Conv2D(
        3, kernel, strides=strides, dilation_rate=dilation, padding=padding, use_bias=False
    )
    x = normal(2, *sides, 2)
    expected = numpy_of(layer(x)).reshape(-1, 3)
    patches = PatchSampler(layer, seed=0).cut(x, 10**6)
    taps = numpy_of(layer.kernel).reshape(-1, 2, 3)
    np.testing.assert_allclose(np.einsum("ptc,tcn->pn", patches, taps), expected, atol=1e-5)
    # Fewer positions are some of these, each once.
    some = PatchSampler(layer, seed=1).cut(x, 5)
    assert len(some) == min(5, len(patches))
    places = {int(np.abs(patches - patch).sum(axis=(1, 2)).argmin()) for patch in some}
    assert len(places) == len(some)


def test_split_is_exact_for_a_separable_kernel():
    kernel = np.einsum("tcm,cmn->tcn", normal(9, 4, 2), normal(4, 2, 6, seed=1))
    depthwise, pointwise = split_channels(kernel, 2)
    np.testing.assert_allclose(np.linalg.norm(depthwise, axis=0), 1.0)
    np.testing.assert_allclose(np.einsum("tcm,cmn->tcn", depthwise, pointwise), kernel, atol=1e-5)
    # At one output per channel, what is lost is each channel's second singular value.
    depthwise, pointwise = split_channels(kernel, 1)
    lost = np.sum((np.einsum("tcm,cmn->tcn", depthwise, pointwise) - kernel) ** 2)
    second = [np.linalg.svd(kernel[:, c], compute_uv=False)[1] for c in range(4)]
    np.testing.assert_allclose(lost, np.sum(np.square(second)), rtol=1e-5)


@settings(max_examples=25)
@given(
    taps=st.integers(1, 6),
    channels=st.integers(1, 5),
    filters=st.integers(1, 6),
    biased=st.booleans(),
    seed=st.integers(0, 999),
)
def test_error_falls_and_is_what_it_says(taps, channels, filters, biased, seed):
    random = np.random.default_rng(seed)
    biased = int(biased)
    multiplier = int(random.integers(1, min(taps, filters) + 1))
    kernel = random.normal(size=(taps, channels, filters))
    x = random.normal(size=(200, taps, channels)) + random.normal(size=channels)
    y = np.einsum("ptc,tcn->pn", x, kernel) + 3.0
    fit = SeparableFit(kernel, bool(biased))
    for start in (0, 70, 140):
        fit.add(x[start : start + 70], y[start : start + 70])
    depthwise, pointwise, bias, errors = fit.solve(*split_channels(kernel, multiplier), 4)
    assert all(after <= before for before, after in itertools.pairwise(errors))
    found = np.einsum("ptc,tcm,cmn->pn", x, depthwise, pointwise) + bias
    power = np.sum((y - y.mean(axis=0) * biased) ** 2)
    np.testing.assert_allclose(np.sum((found - y) ** 2) / power, errors[-1], atol=1e-6)
    assert (bias == 0).all() != bool(biased)
    # Given the depthwise kernel, no pointwise kernel and bias do better than numpy's own solution,
    # and damping costs little.
    through = np.einsum("ptc,tcm->pcm", x, depthwise).reshape(len(x), -1)
    through = np.concatenate([through, np.ones((len(x), biased))], axis=1)
    best = y - through @ np.linalg.lstsq(through, y, rcond=None)[0]
    least = np.sum(best**2) / power
    assert least - 1e-9 <= errors[-1] <= least + 0.02


def test_channels_that_are_always_zero_do_no_harm():
    kernel = normal(9, 4, 6).astype(float)
    x = normal(300, 9, 4, seed=1).astype(float)
    x[:, :, 2] = 0
    fit = SeparableFit(kernel, True)
    fit.add(x, np.einsum("ptc,tcn->pn", x, kernel))
    parts = fit.solve(*split_channels(kernel, 1), 3)
    assert all(np.isfinite(part).all() for part in parts[:3])
    nothing = SeparableFit(kernel, True)
    nothing.add(0 * x, np.ones((300, 6)))
    _, pointwise, bias, _ = nothing.solve(*split_channels(kernel, 1), 3)
    np.testing.assert_allclose(bias, 1.0)
    np.testing.assert_array_equal(pointwise, split_channels(kernel, 1)[1])


# Models


def relative_error(model, other, x):
    before, after = (numpy_of(m(x)).astype(np.float64) for m in (model, other))
    return np.linalg.norm(after - before) / np.linalg.norm(before)


def data_free(model, depth_multiplier=1):
    """The nearest separable kernels, with nothing fitted: made here, layer by layer."""
    result = separable(model, images(2, 4, 0), depth_multiplier=depth_multiplier)
    for name in ("stride", "dilated"):
        old = model.get_layer(name)
        depthwise, pointwise = split_channels(
            numpy_of(old.kernel).reshape(9, *old.kernel.shape[2:]), depth_multiplier
        )
        part = result.get_layer(f"{name}_depthwise")
        part.set_weights([depthwise.reshape(part.kernel.shape)])
        last = result.get_layer(name)
        last.set_weights(
            [pointwise.reshape(last.kernel.shape), *([old.bias] if old.use_bias else [])]
        )
    return result


@pytest.mark.parametrize("multiplier", [1, 2])
def test_fit_beats_the_nearest_kernel_on_held_out_images(multiplier):
    model = network()
    fitted = separable(model, images(96, 4, 1), depth_multiplier=multiplier)
    pointwise_only = separable(model, images(96, 4, 1), depth_multiplier=multiplier, rounds=0)
    held_out = images(64, 4, 2)
    features = [
        keras.Model(m.inputs[0], m.get_layer("dilated").output)
        for m in (model, data_free(model, multiplier), pointwise_only, fitted)
    ]
    errors = [relative_error(features[0], other, held_out) for other in features[1:]]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.95 * errors[1]


def test_later_layers_make_up_for_earlier_ones():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((10, 10, 6))])
    for name in "abcd":
        model.add(layers.Conv2D(12, 3, padding="same", activation="relu", name=name))
    train, held_out = images(96, 6, 1), images(64, 6, 2)
    together = separable(model, train)
    # The same, each layer fitted to what the given model has in front of it.
    apart = separable(model, train)
    for name in "bcd":
        alone = separable(model, train, include=name)
        for part in (f"{name}_depthwise", name):
            apart.get_layer(part).set_weights(alone.get_layer(part).get_weights())
    assert relative_error(model, together, held_out) < 0.97 * relative_error(model, apart, held_out)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("strides", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_separable_convolution_is_found_again(padding, strides, dilation):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((10, 10, 4))
    conv = layers.Conv2D(
        8,
        3,
        strides=strides,
        dilation_rate=dilation,
        padding=padding,
        activation="tanh",
        name="conv",
    )
    model = keras.Model(inputs, conv(inputs))
    kernel = np.einsum("tcm,cmn->tcn", normal(9, 4, 2), normal(4, 2, 8, seed=1)) / 4
    conv.set_weights([kernel.reshape(3, 3, 4, 8), normal(8)])
    found = separable(model, images(16, 4, 1), include="conv", depth_multiplier=2)
    assert relative_error(model, found, images(4, 4, 2)) < 1e-4
    depthwise = found.layers[1]
    assert depthwise.name == "conv_depthwise"
    assert (depthwise.strides, depthwise.dilation_rate) == ((strides,) * 2, (dilation,) * 2)
    assert depthwise.padding == padding
    assert found.layers[2].activation is keras.activations.tanh


def test_shared_and_nested_layers_are_fitted_to_all_their_calls():
    keras.utils.set_random_seed(0)
    shared = layers.Conv2D(6, 3, padding="same", activation="relu", name="shared")
    inside = keras.Input((10, 10, 6))
    inner = keras.Model(inside, shared(inside), name="inner")
    inputs = keras.Input((10, 10, 6))
    model = keras.Model(inputs, shared(inner(inner(inputs))))
    rewritten = separable(model, images(32, 6, 1), include="shared")
    assert rewritten.get_layer("shared") is rewritten.get_layer("inner").get_layer("shared")
    (row,) = plan_separable(model, include="shared")
    assert row.macs_before == count(model).macs == 3 * 100 * 9 * 36
    assert row.macs_after == count(rewritten).macs == 3 * 100 * (9 * 6 + 36)
    assert row.parameters_after == count(rewritten).parameters
    held_out = images(32, 6, 2)
    keras.utils.set_random_seed(1)
    noise = separable(model, normal(32, 10, 10, 6), include="shared")
    assert relative_error(model, rewritten, held_out) < relative_error(model, noise, held_out)


@pytest.mark.parametrize(("zero", "full"), [("a", "b"), ("b", "a")])
def test_every_call_is_fitted_to(zero, full):
    shared = layers.Conv2D(6, 3, padding="same", use_bias=False, name="shared")
    inputs = {name: keras.Input((10, 10, 4), name=name) for name in "ab"}
    model = keras.Model(inputs, {name: shared(x) for name, x in inputs.items()})
    # Nothing is to be learned from what one of the calls reads.
    x = {zero: np.zeros((64, 10, 10, 4), "float32"), full: images(64, 4, 1)}
    rewritten = separable(model, x, include="shared")
    single = keras.Model(inputs[full], shared(inputs[full]))
    alone = separable(single, x[full], include="shared")
    held_out = {name: images(32, 4, 2) for name in "ab"}
    wanted = numpy_of(single(held_out[full]))
    together = numpy_of(rewritten(held_out)[full])
    assert np.linalg.norm(together - wanted) < 1.05 * np.linalg.norm(
        numpy_of(alone(held_out[full])) - wanted
    )


def test_records_say_what_the_rewritten_model_has():
    model = network()
    rewritten = separable(model, images(8, 4, 0), depth_multiplier=2)
    after = {layer.name: layer for layer in count_layers(rewritten)}
    rows = {row.name: row for row in plan_separable(model, depth_multiplier=2)}
    assert [name for name, row in rows.items() if row.method] == ["stride", "dilated"]
    for name in ("stride", "dilated"):
        mine = after[name], after[f"{name}_depthwise"]
        assert rows[name].macs_after == sum(layer.macs for layer in mine)
        assert rows[name].parameters_after == sum(layer.parameters for layer in mine)
        assert "separable 2, keeps" in str(rows[name])
    assert sum(row.macs_after for row in rows.values()) == count(rewritten).macs
    assert "first convolution" in rows["first"].reason
    assert "k x k" in rows["point"].reason


def test_argument_is_left_alone_and_a_seed_repeats():
    model, x = network(), images(40, 4, 0)
    before = fingerprint(model)
    one, two = (separable(model, x, samples=16, positions=200, seed=3) for _ in range(2))
    assert fingerprint(model) == before
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert type(one) is keras.Sequential
    assert all(type(layer).__module__.startswith("keras.") for layer in one.layers)


def test_what_cannot_be_separated_is_left_alone_with_a_reason():
    inputs = keras.Input((18, 18, 4))
    x = layers.Conv2D(8, 3, name="first")(inputs)
    x = layers.Conv2D(8, 3, groups=2, name="grouped")(x)
    x = layers.Conv2D(8, 3, strides=(1, 2), padding="same", name="uneven")(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Conv2D(1, 3, name="narrow")(x)
    x = layers.Conv2D(8, (1, 3), name="row")(x)
    model = keras.Model(inputs, layers.Dense(2, name="dense")(x))
    told = {row.name: row.reason for row in plan_separable(model)}
    for name, words in {
        "first": "first convolution",
        "grouped": "grouped",
        "uneven": "strides differ",
        "depthwise": "depthwise",
        "narrow": "saves no MACs",
        "row": "",
        "dense": "k x k",
    }.items():
        assert words in told[name]
        assert bool(words) == bool(told[name])
    result = separable(model, normal(4, 18, 18, 4))
    assert result.get_layer("row_depthwise").kernel_size == (1, 3)
    with pytest.raises(ValueError, match=r"nothing to rewrite.*saves no MACs"):
        separable(model, normal(4, 18, 18, 4), include="narrow")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth_multiplier": 0}, "depth_multiplier must be above 0"),
        ({"rounds": -1}, "rounds must be"),
        ({"positions": 0}, "positions must be above 0"),
        ({"samples": 0}, "samples must be above 0"),
        ({"include": "nothing"}, "matches no layer"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        separable(network(), images(2, 4, 0), **arguments)


def test_file_round_trip_training_and_export(tmp_path):
    model, x = network(), images(32, 4, 0)
    rewritten = separable(model, x)
    rewritten.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), rewritten(x))
    rewritten.compile(keras.optimizers.Adam(3e-3), "mse")
    history = rewritten.fit(x, numpy_of(model(x)), epochs=15, verbose=0).history["loss"]
    assert history[-1] < 0.7 * history[0]
    artifact = to_tflite(rewritten, tmp_path / "float.tflite", verify_data=x)
    assert measure(artifact.path, runs=1).macs == count(rewritten).macs
    to_tflite(rewritten, tmp_path / "int8.tflite", "int8", representative_data=x)
