"""Each compressor against its paper's formula, written again in numpy."""

import numpy as np
import pytest

from tests.distributed.simulated_ranks import make_gradients, simulate
from tfaccel.distributed.error_feedback import ErrorFeedback
from tfaccel.distributed.powersgd import LowRank, PowerSGD
from tfaccel.distributed.quantizers import QSGD, EFSignSGD, Int8
from tfaccel.distributed.sparsifiers import RandomK, Threshold, TopK

RANKS = 3


def mean_of(gradients, function):
    return np.mean([function(rank[0]) for rank in gradients], axis=0)


def keep_top(count):
    def keep(gradient):
        flat = gradient.ravel().copy()
        flat[np.argsort(-np.abs(flat))[count:]] = 0
        return flat.reshape(gradient.shape)

    return keep


@pytest.mark.parametrize("selection", ["exact", "sampled"])
def test_top_k_is_of_each_tensor(selection):
    (gradients,) = make_gradients(1, RANKS, [(30, 20), (4,)])
    trace, *_ = simulate(TopK(0.05, selection), [gradients])
    found, small = trace.results[0]
    np.testing.assert_allclose(found, mean_of(gradients, keep_top(30)), rtol=1e-6)
    assert 1 <= np.count_nonzero(small) <= RANKS
    assert trace.calls[0][0][:2] == ("gather", "message")


def test_threshold_sends_what_is_not_below_it():
    (gradients,) = make_gradients(1, RANKS, [(30, 20)])
    trace, *_ = simulate(Threshold(1.25), [gradients])
    wanted = mean_of(gradients, lambda g: np.where(np.abs(g) >= 1.25, g, 0))
    np.testing.assert_allclose(trace.results[0][0], wanted, rtol=1e-6)


def test_random_k_is_the_same_places_on_all_ranks_and_others_each_step():
    gradients = make_gradients(3, RANKS, [(30, 20), (400,)])
    trace, other, _ = simulate(RandomK(0.1, seed=5), gradients)
    chosen = []
    for step, result in enumerate(trace.results):
        flat = np.concatenate([r.ravel() for r in result])
        mean = np.concatenate([np.mean([r[i] for r in gradients[step]], 0).ravel() for i in (0, 1)])
        places = np.flatnonzero(flat)
        assert len(places) == 100
        np.testing.assert_allclose(flat[places], mean[places], rtol=1e-5, atol=1e-7)
        chosen.append(set(places))
        # Values alone travel, in a ring.
        assert trace.calls[step] == other.calls[step] == [("mean", "values", 100)]
    assert len(chosen[0] & chosen[1]) < 40
    again, *_ = simulate(RandomK(0.1, seed=6), gradients[:1])
    assert set(np.flatnonzero(again.results[0][1])) != set(np.flatnonzero(trace.results[0][1]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_qsgd_rounds_to_neighbouring_levels_without_bias(bits):
    """Alistarh et al. 2017, eq. 1: n sign(v) l/s, l a neighbour of |v|/n s; E = v."""
    repeats, gradient = 400, np.random.default_rng(0).normal(size=128).astype(np.float32)
    (trace,) = simulate(QSGD(bits, bucket=64), [[[np.tile(gradient, (repeats, 1))]]])
    s = 2 ** (bits - 1) - 1
    norms = np.repeat(np.linalg.norm(gradient.reshape(2, 64), axis=1), 64)
    exact = np.abs(gradient) / norms * s
    found = trace.results[0][0]
    levels = np.abs(found) / norms * s
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
    assert (np.abs(levels - exact) < 1 + 1e-3).all()
    assert ((found == 0) | (np.sign(found) == np.sign(gradient))).all()
    # The variance of each element: f (1 - f) (n/s)^2, f the fraction of its level.
    fraction = exact - np.floor(exact)
    deviation = np.sqrt(fraction * (1 - fraction) / repeats) * norms / s
    assert (np.abs(found.mean(axis=0) - gradient) <= 5 * deviation + 1e-5).all()
    codes = repeats * 128 * bits // 8
    assert trace.calls[0] == [("gather", "codes", codes + repeats * 2 * 4)]


def test_qsgd_rounds_on_each_rank_on_its_own():
    gradient = np.full((64,), 0.3, np.float32)
    (trace,) = simulate(QSGD(2, 64), [[[gradient]]])
    pair = simulate(QSGD(2, 64), [[[gradient], [gradient]]])
    assert not np.array_equal(trace.results[0][0], pair[0].results[0][0])
    np.testing.assert_array_equal(pair[0].results[0][0], pair[1].results[0][0])


def test_int8_rounds_to_the_nearest_level_of_the_largest():
    (gradients,) = make_gradients(1, RANKS, [(10, 10)])
    trace, *_ = simulate(Int8(8, bucket=40), [gradients])

    def quantize(gradient):
        parts = np.split(gradient.ravel(), [40, 80])
        scales = [np.abs(part).max() / 127 for part in parts]
        return np.concatenate(
            [np.rint(p / s) * s for p, s in zip(parts, scales, strict=True)]
        ).reshape(10, 10)

    np.testing.assert_allclose(trace.results[0][0], mean_of(gradients, quantize), atol=1e-6)
    zeros = simulate(Int8(), [[[np.zeros(5, np.float32)]]])
    assert zeros[0].results[0][0].tolist() == [0.0] * 5


def test_ef_sign_sgd_is_the_papers_algorithm():
    """Karimireddy et al. 2019: p = g + e, sent ||p||_1/d sign(p), e = p - sent; 2 tensors."""
    gradients = make_gradients(4, RANKS, [(10, 7), (9,)], seed=1)
    trace, *_ = simulate(EFSignSGD(), gradients)
    errors = [[np.zeros((10, 7)), np.zeros(9)] for _ in range(RANKS)]
    for step, own in enumerate(gradients):
        for i in range(2):
            sent = []
            for rank in range(RANKS):
                p = own[rank][i] + errors[rank][i]
                sent.append(np.abs(p).mean() * np.sign(p))
                errors[rank][i] = p - sent[-1]
            np.testing.assert_allclose(
                trace.results[step][i], np.mean(sent, axis=0), rtol=1e-4, atol=1e-5
            )
    assert trace.calls[0] == [("gather", "codes", 10 + 2 * 4)]  # 79 bits, 2 scales


def reference_powersgd(gradients, q, rank):
    """Algorithms 1 and 2 of Vogels et al. 2019 for one matrix, in float64."""
    errors = [np.zeros_like(gradients[0][0][0], np.float64) for _ in gradients[0]]
    results = []
    for step in gradients:
        deltas = [own[0] + e for own, e in zip(step, errors, strict=True)]
        p = np.mean([d.reshape(-1, d.shape[-1]) @ q for d in deltas], axis=0)
        basis, triangle = np.linalg.qr(p)
        basis *= np.sign(np.diag(triangle))  # as Gram-Schmidt has it
        own_q = [d.reshape(-1, d.shape[-1]).T @ basis for d in deltas]
        q = np.mean(own_q, axis=0)
        results.append((basis @ q.T).reshape(deltas[0].shape))
        errors = [d - (basis @ o.T).reshape(d.shape) for d, o in zip(deltas, own_q, strict=True)]
    return results


def test_powersgd_is_the_papers_algorithm():
    gradients = make_gradients(4, RANKS, [(3, 3, 5, 20)], seed=2)
    start = np.random.default_rng(7).normal(size=(20, 2))
    trace, *_ = simulate(PowerSGD(2, seed=7), gradients)
    for found, wanted in zip(trace.results, reference_powersgd(gradients, start, 2), strict=True):
        np.testing.assert_allclose(found[0], wanted, rtol=1e-3, atol=1e-4)
    # P is 45 x 2 and Q 20 x 2, each in a ring.
    assert trace.calls == [[("mean", "p", 90), ("mean", "q", 40)]] * 4


def test_powersgd_finds_a_gradient_of_low_rank_and_sends_small_ones_whole():
    random = np.random.default_rng(3)
    low = (random.normal(size=(50, 2)) @ random.normal(size=(2, 40))).astype(np.float32)
    bias = random.normal(size=40).astype(np.float32)
    tiny = random.normal(size=(3, 3)).astype(np.float32)
    (trace,) = simulate(LowRank(2), [[[low, bias, tiny]]])
    for found, wanted in zip(trace.results[0], (low, bias, tiny), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    assert trace.calls[0] == [("mean", "p", 100 + 40 + 9), ("mean", "q", 80)]


def test_powersgd_of_zeros_is_zero():
    (trace,) = simulate(ErrorFeedback(LowRank(2)), [[[np.zeros((20, 20), np.float32)]]])
    assert not trace.results[0][0].any()
