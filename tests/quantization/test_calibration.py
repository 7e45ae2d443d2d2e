"""Ranges that calibration finds, against hand computations and other implementations."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

from tests.quantization.networks import images, network
from tfaccel.quantization.calibration import (
    CALIBRATORS,
    Entropy,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Percentile,
    Statistics,
    kl_divergence,
    observe,
    set_ranges,
    squared_error,
)
from tfaccel.quantization.fake_quantization import FakeQuantize
from tfaccel.quantization.training import quantize_aware
from tfaccel.rewriting.sampling import gather_batches


def statistics_of(values, bins=2048):
    counts, _ = np.histogram(values, bins)
    return Statistics(np.array([values.min()]), np.array([values.max()]), counts)


def small(x):
    x = layers.Conv2D(4, 3, name="conv")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Flatten()(x)
    return layers.Dense(3, name="logits")(x)


def test_what_is_observed_is_what_the_float_model_computes():
    model = network(small)
    x = images(70)
    aware = quantize_aware(model)
    seen = observe(aware, gather_batches(aware, x, 70, 0, "test"))
    parts = keras.Model(model.input, [model.get_layer("relu").output, model.output])
    relu, logits = (np.asarray(value) for value in parts(x))
    by_name = {layer.name: statistics for layer, statistics in seen.items()}
    for name, values in (("image", x), ("relu", relu), ("logits", logits)):
        found = by_name[f"{name}_quantize"]
        assert len(found.minima) == 3  # batches of 32, 32 and 6
        np.testing.assert_allclose(found.minima[0], values[:32].min(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.maxima[2], values[64:].max(), rtol=1e-5)
        counts, _ = np.histogram(values, 2048, (found.low, found.high))
        assert found.counts.sum() == values.size
        # Values at a bound may fall to either side of it.
        assert np.abs(np.cumsum(found.counts) - np.cumsum(counts)).max() <= values.size / 1000


def test_minmax_and_moving_average_by_hand():
    seen = Statistics(np.array([-1.0, -3.0]), np.array([2.0, 4.0]), np.array([1, 1]))
    assert MinMax().range_of(seen, 8) == (-3.0, 4.0)
    low, high = MovingAverage(0.75).range_of(seen, 8)
    assert (low, high) == (-1.5, 2.5)  # 3/4 (-1) + 1/4 (-3); 3/4 2 + 1/4 4


@given(seed=st.integers(0, 2**31 - 1), share=st.floats(90, 100))
def test_percentile_is_numpys_within_a_bin(seed, share):
    values = np.random.default_rng(seed).normal(size=5000)
    low, high = Percentile(share).range_of(statistics_of(values), 8)
    bin_width = np.ptp(values) / 2048
    expected = np.percentile(values, [100 - share, share], method="inverted_cdf")
    gaps = np.abs(np.subtract([low, high], expected))
    # Beside a gap in the data a quantile may be anywhere in the gap.
    near = np.abs(values[:, None] - [low, high]).min(axis=0)
    assert (np.minimum(gaps, near) <= 2 * bin_width).all()


def brute_force_error(values, low, high, bits):
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    integers = np.clip(np.round(values / scale) + zero, 0, 2**bits - 1)
    return float(np.mean(((integers - zero) * scale - values) ** 2))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_squared_error_of_a_histogram_is_that_of_the_values(bits):
    values = np.random.default_rng(1).normal(size=200_000)
    seen = statistics_of(values)
    for candidate in ((-2.0, 3.0), (-0.5, 0.25)):
        expected = brute_force_error(values, *candidate, bits)
        assert squared_error(seen, candidate, bits) == pytest.approx(expected, rel=0.03)


def test_mse_finds_the_clipping_that_is_known_for_a_normal_distribution():
    """Banner et al. 2019, optimal clipping of a normal distribution: 2.55 sigma at 4 bits."""
    values = np.random.default_rng(2).normal(size=1_000_000)
    low, high = MeanSquaredError().range_of(statistics_of(values), 4)
    assert -low == pytest.approx(2.55, abs=0.25)
    assert high == pytest.approx(2.55, abs=0.25)


def test_no_range_has_less_squared_error_than_the_one_that_mse_finds():
    values = np.random.default_rng(3).laplace(size=100_000)
    seen = statistics_of(values)
    best = squared_error(seen, MeanSquaredError().range_of(seen, 4), 4)
    grid = [(-a, b) for a in np.linspace(0.5, 8, 16) for b in np.linspace(0.5, 8, 16)]
    assert best <= min(squared_error(seen, candidate, 4) for candidate in grid) * 1.02


def test_divergence_by_hand():
    """8 bins, 4 levels of two bins: within each level mass is spread evenly over used bins."""
    seen = Statistics(np.array([0.0]), np.array([8.0]), np.array([4, 2, 1, 0, 3, 3, 1, 2]))
    p = np.array([4, 2, 1, 0, 3, 3, 1, 2]) / 16
    q = np.array([3, 3, 1, 0, 3, 3, 1.5, 1.5]) / 16
    used = p > 0
    expected = np.sum(p[used] * np.log(p[used] / q[used]))
    assert kl_divergence(seen, (0.0, 8.0), 2) == pytest.approx(expected)
    # Clipped to 4: the nine beyond fall to the last bin inside, which Q does not know of.
    p = np.array([4, 2, 1, 9]) / 16
    q = np.array([4, 2, 1, 1e-12 * 7]) / 7
    expected = np.sum(p * np.log(p / q))
    assert kl_divergence(seen, (0.0, 4.0), 2) == pytest.approx(expected, rel=1e-6)


def test_entropy_leaves_lone_outliers_out_and_keeps_a_flat_distribution_whole():
    random = np.random.default_rng(4)
    outliers = statistics_of(np.concatenate([random.normal(size=100_000), [40.0]]))
    low, high = Entropy().range_of(outliers, 8)
    assert 2 < high < 20
    assert low > -20
    flat = statistics_of(random.uniform(-1, 1, 100_000))
    low, high = Entropy().range_of(flat, 8)
    assert (low, high) == (pytest.approx(-1, abs=0.02), pytest.approx(1, abs=0.02))


def test_entropy_is_not_misled_by_the_zeros_of_a_relu():
    values = np.abs(np.random.default_rng(5).normal(size=100_000))
    few = Entropy().range_of(statistics_of(np.concatenate([values, [0.0]])), 8)
    many = Entropy().range_of(statistics_of(np.concatenate([values, np.zeros(900_000)])), 8)
    assert many == pytest.approx(few)
    assert many[1] > 2.5


@pytest.mark.parametrize("name", CALIBRATORS.names())
def test_a_value_that_is_always_the_same_gets_a_range(name):
    same = Statistics(np.array([0.0]), np.array([0.0]), np.zeros(0, np.int64))
    layer = FakeQuantize()
    set_ranges({layer: same}, CALIBRATORS.get(name))
    assert layer.calibrated
    np.testing.assert_array_equal(np.asarray(layer(np.zeros(3, "float32"))), 0)


@pytest.mark.parametrize("name", CALIBRATORS.names())
def test_calibrators_survive_their_config(name):
    calibrator = CALIBRATORS.get(name)
    config = keras.saving.serialize_keras_object(calibrator)
    assert CALIBRATORS.get(config) == calibrator


def test_ranges_contain_zero():
    layer = FakeQuantize()
    positive = Statistics(np.array([2.0]), np.array([5.0]), np.ones(4, np.int64))
    set_ranges({layer: positive}, MinMax())
    assert (float(layer.minimum), float(layer.maximum)) == (0.0, 5.0)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="percentile must be in"):
        Percentile(40)
    with pytest.raises(ValueError, match="momentum"):
        MovingAverage(1.0)
    with pytest.raises(ValueError, match=r"no calibrator 'kl'.*entropy"):
        CALIBRATORS.get("kl")
    aware = quantize_aware(network(small))
    poisoned = images(4)
    poisoned[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        observe(aware, gather_batches(aware, poisoned, 4, 0, "test"))
