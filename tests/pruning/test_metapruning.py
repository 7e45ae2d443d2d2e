"""The net that makes weights: what is masked is what is cropped, for any counts."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import tfaccel
from tfaccel.pruning import MobileNetSpace, PruningNet, metaprune

SPACE = MobileNetSpace(
    (8, 8, 2), classes=3, stem=8, blocks=((8, 1), (16, 2), (16, 1)), multiple_of=2, least=0.25
)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def images(size=40, seed=0):
    """Three classes: which of three places is bright."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 3, size)
    x = random.normal(scale=0.3, size=(size, 8, 8, 2)).astype("float32")
    for image, label in zip(x, y, strict=True):
        image[2 * label : 2 * label + 3, 2:6] += 1
    return x, y


@pytest.fixture(scope="module")
def net():
    keras.utils.set_random_seed(1)
    made = PruningNet(SPACE, hidden=8, seed=1)
    made(images(1)[0])
    # Statistics and generated kernels of a trained net, without training one.
    random = np.random.default_rng(2)
    for layer in (made.stem, *made.depthwise, *made.pointwise):
        layer.encode.bias.assign(random.normal(size=8))
        layer.decode.bias.assign(0.1 * random.normal(size=layer.decode.bias.shape))
    return made


CHANNELS = st.tuples(*(st.sampled_from(values) for values in SPACE.choices))


@settings(max_examples=8)
@given(channels=CHANNELS)
def test_masked_is_cropped(net, channels):
    x, _ = images()
    plain = net.materialize(channels, x)
    assert [layer.filters for layer in plain.layers if type(layer) is keras.layers.Conv2D] == list(
        channels
    )
    masked = net(x, training=False, channels=np.array(channels, "int32"))
    np.testing.assert_allclose(plain(x), masked, atol=2e-5)


@given(channels=CHANNELS)
@settings(max_examples=8)
def test_macs_are_those_that_measurement_counts(channels):
    assert SPACE.macs(channels) == tfaccel.measurement.count(SPACE.build(channels)).macs


def test_macs_with_a_strided_stem_and_odd_sizes():
    space = MobileNetSpace((9, 7, 3), stem=4, stem_stride=2, blocks=((8, 2),))
    # 5x4 places of 9·3·4; 3x2 places of 4·9 + 4·8; 8·10.
    assert space.macs((4, 8)) == 20 * 108 + 6 * 68 + 80
    assert tfaccel.measurement.count(space.build((4, 8))).macs == space.macs((4, 8))


def test_choices_and_uniform_scaling():
    assert SPACE.choices == [[2, 4, 6, 8], [2, 4, 6, 8], [*range(4, 17, 2)], [*range(4, 17, 2)]]
    assert SPACE.scaled(0.5) == (4, 4, 8, 8)
    assert SPACE.scaled(1.0) == SPACE.whole == (8, 8, 16, 16)


def test_training_draws_all_counts_in_one_graph():
    made = PruningNet(SPACE, hidden=4, seed=3)
    drawn = np.array([ops.convert_to_numpy(made._draw()) for _ in range(200)])
    for column, values in zip(drawn.T, SPACE.choices, strict=True):
        assert sorted(set(column)) == values
    made.compile("sgd", LOSS)
    made.fit(*images(), batch_size=8, epochs=2, verbose=0)
    assert made.optimizer.iterations.numpy() == 10


def test_generated_weights_rank_thin_and_wide():
    keras.utils.set_random_seed(4)
    made = PruningNet(SPACE, hidden=16, seed=4)
    made.compile(keras.optimizers.Adam(0.01), LOSS, jit_compile=False)
    x, y = images(240)
    made.fit(x, y, batch_size=24, epochs=12, verbose=0)
    held = images(300, seed=9)
    whole = made.score(SPACE.whole, x[:100], held)
    assert whole > 0.8  # chance is 0.33
    result = metaprune(
        made, 0.4 * SPACE.macs(SPACE.whole), x[:100], held, population=8, generations=2, seed=0
    )
    assert result.cost == SPACE.macs(result.genes) <= 0.4 * SPACE.macs(SPACE.whole)
    assert result.score == made.score(result.genes, x[:100], held)
    plain = made.materialize(result.genes, x[:100])
    found = plain.predict(held[0], verbose=0).argmax(axis=1)
    assert abs((found == held[1]).mean() - result.score) <= 1 / 300


def test_any_cost_of_a_model(net):
    asked = []

    def parameters(model):
        asked.append(model)
        return model.count_params()

    x, y = images()
    result = metaprune(net, 700, x, (x, y), cost=parameters, population=3, parents=2, generations=1)
    assert result.cost == SPACE.build(result.genes).count_params() <= 700
    assert all(isinstance(model, keras.Model) for model in asked)


def test_a_net_is_saved_and_loaded(net, tmp_path):
    x, y = images()
    net.save(tmp_path / "net.keras")
    loaded = keras.models.load_model(tmp_path / "net.keras")
    assert loaded.space == SPACE
    channels = (4, 6, 8, 10)
    assert loaded.score(channels, x, (x, y)) == net.score(channels, x, (x, y))


def test_errors_come_first(net):
    x, y = images(4)
    with pytest.raises(ValueError, match=r"channels must be 4 counts.*\(4, 4\)"):
        SPACE.build((4, 4))
    with pytest.raises(ValueError, match="must not exceed"):
        net.score((4, 4, 4, 18), x, (x, y))
    with pytest.raises(ValueError, match="multiples of multiple_of=4, but got 6"):
        MobileNetSpace(stem=6)
    with pytest.raises(TypeError, match="space must be MobileNetSpace"):
        PruningNet("mobilenet")
    with pytest.raises(TypeError, match="net must be PruningNet"):
        metaprune(SPACE.build((4, 4, 4, 4)), 100, x, (x, y))
    with pytest.raises(ValueError, match=r"none costs 10 or less"):
        metaprune(net, 10, x, (x, y), population=2)
