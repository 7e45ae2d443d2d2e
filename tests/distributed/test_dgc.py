import numpy as np
import pytest

from tests.distributed.simulated_ranks import make_gradients, simulate
from tfaccel.distributed.dgc import DGC

EXACT = {"value_bits": 32, "dense_bits": 32}


def reference(gradients, momentum, counts, clip=None, nesterov=False):
    """Algorithm 4 of Lin et al. 2018 with exact top-k per tensor: means and states of each step.

    `counts` says how many elements of each tensor are sent; None for a tensor that is sent whole.
    """
    ranks = len(gradients[0])
    shapes = [g.shape for g in gradients[0][0]]
    u = [[np.zeros(s) for s in shapes] for _ in range(ranks)]
    v = [[np.zeros(s) for s in shapes] for _ in range(ranks)]
    means = []
    for step in gradients:
        total = [np.zeros(s) for s in shapes]
        for rank, own in enumerate(step):
            norm = np.sqrt(sum((g.astype(float) ** 2).sum() for g in own))
            factor = 1.0 if clip is None else min(1.0, clip * ranks**-0.5 / norm)
            for i, gradient in enumerate(own):
                g = factor * gradient
                u[rank][i] = momentum * u[rank][i] + g
                v[rank][i] = v[rank][i] + (g + momentum * u[rank][i] if nesterov else u[rank][i])
                if counts[i] is None:
                    mask = np.ones(g.shape, bool)
                else:
                    order = np.argsort(-np.abs(v[rank][i]).ravel())[: counts[i]]
                    mask = np.zeros(g.size, bool)
                    mask[order] = True
                    mask = mask.reshape(g.shape)
                    u[rank][i] = u[rank][i] * ~mask  # momentum factor masking
                total[i] += v[rank][i] * mask / ranks
                v[rank][i] = v[rank][i] * ~mask
        means.append(total)
    return means, u, v


SHAPES = [(9,), (40, 50), (64, 32)]
COUNTS = [None, 20, 20]  # 1 % of 2,000 and of 2,048


@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("nesterov", [False, True])
def test_masking_and_momentum_correction_over_steps(clip, nesterov):
    gradients = make_gradients(6, 3, SHAPES, seed=4)
    compressor = DGC(0.9, 0.99, clip_norm=clip, nesterov=nesterov, **EXACT)
    traces = simulate(compressor, gradients)
    means, u, v = reference(gradients, 0.9, COUNTS, clip, nesterov)
    for step, wanted in enumerate(means):
        for found, mean in zip(traces[0].results[step], wanted, strict=True):
            np.testing.assert_allclose(found, mean, rtol=1e-4, atol=1e-5)
    order = [1, 2, 0]  # large tensors stand first
    for rank, trace in enumerate(traces):
        for name, state in (("velocity", u), ("accumulated", v)):
            wanted = np.concatenate([state[rank][i].ravel() for i in order])
            np.testing.assert_allclose(trace.states[-1][name], wanted, rtol=1e-4, atol=1e-5)
        assert trace.states[-1]["step"] == 6


def test_by_hand():
    """Two steps of one tensor, of which a thousandth, one element, is sent; two ranks alike."""
    first, second = np.zeros((32, 32), np.float32), np.zeros((32, 32), np.float32)
    first[0, :2], second[0, :2] = [4.0, 3.0], [1.0, 1.0]
    trace, _ = simulate(DGC(0.5, 0.999, **EXACT), [[[first]] * 2, [[second]] * 2])
    # u = v = (4, 3): 4 is sent, u = v = (0, 3). Then u = (1, 2.5), v = (1, 5.5): 5.5 is sent.
    assert trace.results[0][0][0, :2].tolist() == [4.0, 0.0]
    assert trace.states[0]["velocity"][:2].tolist() == [0.0, 3.0]
    assert trace.states[0]["accumulated"][:2].tolist() == [0.0, 3.0]
    assert trace.results[1][0][0, :2].tolist() == [0.0, 5.5]
    assert trace.states[1]["velocity"][:2].tolist() == [1.0, 0.0]
    assert trace.states[1]["accumulated"][:2].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("value_bits", "dense_bits"), [(4, 8), (2, 2), (8, 32), (32, 4)])
def test_without_momentum_sent_and_kept_are_all_gradients(value_bits, dense_bits):
    gradients = make_gradients(8, 2, SHAPES, seed=5)
    compressor = DGC(0.0, 0.98, value_bits=value_bits, dense_bits=dense_bits)
    traces = simulate(compressor, gradients)
    sent = [sum(r[i] for r in traces[0].results) for i in range(3)]
    kept = np.mean([t.states[-1]["accumulated"] for t in traces], axis=0)
    parts = np.split(kept, np.cumsum([2000, 2048]))
    for i, part in zip([1, 2, 0], parts, strict=True):
        given = sum(np.mean([rank[i] for rank in step], axis=0) for step in gradients)
        np.testing.assert_allclose(sent[i] + part.reshape(SHAPES[i]), given, rtol=1e-4, atol=1e-4)
    if dense_bits == 32:
        assert np.abs(parts[2]).max() == 0
    else:
        assert np.abs(parts[2]).max() > 0


def test_small_tensors_and_vectors_are_whole():
    shapes = [(2000,), (31, 33), (32, 32)]  # 1,023 elements are few, 1,024 are not
    (gradients,) = make_gradients(1, 1, shapes)
    trace, _ = simulate(DGC(0.9, 0.999, **EXACT), [gradients * 2])
    for i, wanted in enumerate((2000, 1023, 1)):
        assert np.count_nonzero(trace.results[0][i]) == wanted


def test_warm_up_has_the_papers_stages():
    compressor = DGC(warmup_steps=8)
    found = [compressor.sparsity_at(step) for step in (0, 1, 2, 4, 6, 7, 8, 100)]
    assert found == [0.75, 0.75, 0.9375, 0.984375, 0.99609375, 0.99609375, 0.999, 0.999]
    assert DGC().sparsity_at(0) == 0.999
    assert DGC(sparsity=0.9, warmup_steps=4).sparsity_at(1) == 0.9
    trace, _ = simulate(DGC(0.0, 0.999, 4, **EXACT), make_gradients(6, 2, [(80, 100)]))
    sent = [np.count_nonzero(r[0]) for r in trace.results]
    for stage, share in enumerate((0.25, 0.0625, 0.015625, 0.00390625, 0.001, 0.001)):
        # of each of two ranks, whose places hardly meet in the sparse stages
        assert 0.6 * 8000 * share <= sent[stage] <= 2 * 1.35 * 8000 * share


def test_where_messages_of_all_would_be_more_the_ring_is_used():
    """16 ranks, raw values: of a quarter a gather costs more than the ring, of 1.6 % less."""
    gradients = make_gradients(3, 16, [(64, 64)], seed=6)
    traces = simulate(DGC(0.9, 0.999, warmup_steps=4, value_bits=32), gradients)
    assert traces[0].calls[0] == [("mean", "whole", 4096)]
    kind, key, size = traces[0].calls[2][0]  # 64 places
    assert (kind, key) == ("gather", "message")
    assert 15 * size < 2 * 15 / 16 * 4 * 4096
    # In the ring stage it is momentum SGD: u of all ranks is sent.
    means = [np.mean([rank[0] for rank in step], axis=0) for step in gradients]
    np.testing.assert_allclose(traces[0].results[0][0], means[0], rtol=1e-4, atol=1e-5)
    assert np.abs(traces[0].states[0]["accumulated"]).max() == 0
    np.testing.assert_array_equal(traces[3].states[0]["velocity"], gradients[0][3][0].ravel())


def test_alone_it_is_momentum_sgd():
    gradients = make_gradients(4, 1, SHAPES)
    (trace,) = simulate(DGC(0.9, clip_norm=2.0), gradients)
    u = [np.zeros(s) for s in SHAPES]
    for step, (own,) in enumerate(gradients):
        norm = np.sqrt(sum((g.astype(float) ** 2).sum() for g in own))
        u = [0.9 * a + g * min(1, 2.0 / norm) for a, g in zip(u, own, strict=True)]
        for found, wanted in zip(trace.results[step], u, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert all(call[0][0] == "mean" for call in trace.calls)


def test_a_gradient_that_is_not_finite_is_seen_by_all_ranks():
    gradients = make_gradients(1, 2, SHAPES)
    gradients[0][1][1][3, 7] = np.nan
    traces = simulate(DGC(), gradients)
    for trace in traces:
        assert np.isnan(trace.results[0][1]).any()
        assert np.isfinite(trace.results[0][2]).all()
