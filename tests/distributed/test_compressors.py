import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from keras.optimizers import SGD

import tfaccel.distributed as hvd
from tests.distributed.simulated_ranks import make_gradients, simulate
from tests.distributed.worker import make_data, make_model
from tfaccel.distributed.compressed_exchange import CompressedExchange
from tfaccel.distributed.compressors import (
    FP16,
    BFloat16,
    NoCompression,
    compressors,
    resolve_compression,
)
from tfaccel.distributed.dgc import DGC
from tfaccel.distributed.error_feedback import ErrorFeedback
from tfaccel.distributed.powersgd import LowRank, PowerSGD
from tfaccel.distributed.quantizers import QSGD, EFSignSGD, Int8, ScaledSign
from tfaccel.distributed.sparsifiers import RandomK, Threshold, TopK

SHAPES = [(40, 30), (7,), (3, 3, 4, 8), ()]
EVERY = [
    NoCompression(),
    FP16(),
    BFloat16(),
    TopK(0.05),
    TopK(0.05, "sampled", 8),
    RandomK(0.1, seed=3),
    Threshold(1.5),
    QSGD(4, 64, seed=1),
    Int8(8, 32),
    ScaledSign(),
    LowRank(3),
    DGC(0.9, 0.99, 8, 1.0),
    ErrorFeedback(TopK(0.02)),
    EFSignSGD(),
    PowerSGD(2),
]


def means(gradients):
    return [np.mean([rank[i] for rank in gradients], axis=0) for i in range(len(gradients[0]))]


@pytest.mark.parametrize("compressor", EVERY, ids=repr)
def test_config_round_trips(compressor):
    config = keras.saving.serialize_keras_object(compressor)
    again = keras.saving.deserialize_keras_object(config)
    assert again == compressor
    assert type(again) is type(compressor)
    assert compressors.get(config) == compressor


@pytest.mark.parametrize("compressor", EVERY, ids=repr)
def test_all_ranks_receive_the_same_of_the_shapes_sent(compressor):
    traces = simulate(compressor, make_gradients(2, 2, SHAPES))
    for step in range(2):
        for trace in traces[1:]:
            for first, other in zip(traces[0].results[step], trace.results[step], strict=True):
                np.testing.assert_array_equal(first, other)
        assert [r.shape for r in traces[0].results[step]] == SHAPES
        assert [c[:2] for c in traces[0].calls[step]] == [c[:2] for c in traces[1].calls[step]]


def test_no_compression_is_the_mean_in_one_ring():
    (gradients,) = make_gradients(1, 4, SHAPES)
    trace, *_ = simulate(NoCompression(), [gradients])
    for found, wanted in zip(trace.results[0], means(gradients), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    assert trace.calls == [[("mean", "flat", 1200 + 7 + 288 + 1)]]


@pytest.mark.parametrize(
    ("compressor", "dtype"), [(FP16(), np.float16), (BFloat16(), ml_dtypes.bfloat16)]
)
def test_16_bits_are_rounded_summed_in_32_and_rounded(compressor, dtype):
    (gradients,) = make_gradients(1, 3, [(50, 3)])
    trace, *_ = simulate(compressor, [gradients])
    rounded = [rank[0].astype(dtype).astype(np.float32) for rank in gradients]
    wanted = np.mean(rounded, axis=0).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(trace.results[0][0], wanted)
    assert trace.calls == [[("mean_half", "half", 150)]]


@pytest.mark.parametrize(
    "compressor",
    [TopK(0.05, "sampled", 4), RandomK(0.1), Threshold(1.5), Int8(2), ScaledSign(), LowRank(2)],
    ids=repr,
)
def test_what_was_sent_and_what_is_kept_are_all_gradients(compressor):
    steps, ranks = 4, 2
    gradients = make_gradients(steps, ranks, SHAPES)
    traces = simulate(ErrorFeedback(compressor), gradients)
    for i in range(len(SHAPES)):
        given = sum(means(step)[i] for step in gradients)
        sent = sum(r[i] for r in traces[0].results)
        kept = np.mean([t.states[-1]["residual"][str(i)] for t in traces], axis=0)
        np.testing.assert_allclose(sent + kept, given, rtol=1e-5, atol=1e-5)
    assert np.abs(traces[0].states[-1]["residual"]["0"]).max() > 0.01


def test_error_feedback_by_hand():
    # One rank, top 1 of 3 (ratio 1/3): what is left out comes back with the next gradient.
    steps = [[[np.array([3.0, 2.0, -1.0])]], [[np.array([0.0, 1.0, -1.0])]], [[np.zeros(3)]]]
    (trace,) = simulate(ErrorFeedback(TopK(1 / 3)), steps)
    assert [r[0].tolist() for r in trace.results] == [[3, 0, 0], [0, 3, 0], [0, 0, -2]]
    kept = [s["residual"]["0"].tolist() for s in trace.states]
    assert kept == [[0, 2, -1], [0, 0, -2], [0, 0, 0]]


def test_error_feedback_refuses_what_keeps_its_errors():
    with pytest.raises(ValueError, match="DGC keeps its errors itself"):
        ErrorFeedback(DGC())
    with pytest.raises(ValueError, match="ErrorFeedback keeps its errors itself"):
        ErrorFeedback(EFSignSGD())
    with pytest.raises(ValueError, match="no compressor 'zip'"):
        ErrorFeedback("zip")


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: TopK(0), ValueError, "ratio must be above 0"),
        (lambda: TopK(1.5), ValueError, r"ratio must be a fraction in \[0, 1\], but got 1.5"),
        (lambda: TopK("1 %"), TypeError, "ratio must be a number"),
        (lambda: TopK(0.1, "best"), ValueError, "selection must be one of 'exact', 'sampled'"),
        (lambda: TopK(0.1, value_bits=5), ValueError, "value_bits must be one of 2, 4, 8, 32"),
        (lambda: RandomK(0.1, seed=1.0), TypeError, "seed must be int"),
        (lambda: Threshold(0.0), ValueError, "threshold must be above 0"),
        (lambda: QSGD(3), ValueError, "bits must be one of 2, 4, 8, but got 3"),
        (lambda: Int8(bucket=12), ValueError, "bucket must be a multiple of 8, but got 12"),
        (lambda: PowerSGD(0), ValueError, "rank must be above 0"),
        (lambda: LowRank(2.0), TypeError, "rank must be int"),
        (lambda: DGC(momentum=1.0), ValueError, r"momentum must be a fraction in \[0, 1\)"),
        (lambda: DGC(sparsity=99.9), ValueError, "sparsity must be a fraction"),
        (lambda: DGC(warmup_steps=-1), ValueError, "warmup_steps must be an int from 0"),
        (lambda: DGC(warmup_steps=0.5), TypeError, "warmup_steps must be int"),
        (lambda: DGC(clip_norm=0.0), ValueError, "clip_norm must be above 0"),
        (lambda: DGC(0.0, nesterov=True), ValueError, "nesterov=True needs a momentum"),
        (lambda: DGC(dense_bits=16), ValueError, "dense_bits must be one of"),
        (lambda: hvd.DistributedOptimizer(SGD(), compression="zip"), ValueError, "no compressor"),
        (lambda: hvd.DistributedOptimizer(SGD(), compression=0.1), ValueError, "but got 0.1"),
        (
            lambda: hvd.DistributedOptimizer(SGD(momentum=0.5), compression=DGC()),
            ValueError,
            r"applied twice: .* has momentum=0.5 and DGC 0.9. Give keras",
        ),
        (
            lambda: hvd.DistributedOptimizer(SGD(), compression=TopK(), op=hvd.Adasum),
            ValueError,
            "goes with neither Adasum nor",
        ),
    ],
)
def test_wrong_arguments_are_named(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_a_compression_is_given_by_name_by_config_or_whole():
    assert resolve_compression(None) is None
    assert resolve_compression("none") is None
    assert resolve_compression(NoCompression()) is None
    for given in ("topk", TopK(), keras.saving.serialize_keras_object(TopK())):
        assert resolve_compression(given) == TopK()
    assert resolve_compression(hvd.Compression.fp16) is hvd.Compression.fp16


def test_alone_dgc_is_keras_momentum_and_the_rest_changes_nothing():
    x, y = make_data(24)
    weights = []
    for optimizer in (
        hvd.DistributedOptimizer(SGD(0.1), compression=DGC(0.9)),
        SGD(0.1, momentum=0.9),
    ):
        model = make_model()
        model.compile(optimizer, "mse")
        model.fit(x, y, 8, epochs=2, shuffle=False, verbose=0)
        weights.append(np.concatenate([w.ravel() for w in model.get_weights()]))
    np.testing.assert_allclose(*weights, rtol=0, atol=1e-6)
    plain = SGD(0.1)
    before = dict(vars(plain))
    assert hvd.DistributedOptimizer(plain, compression="topk") is plain
    assert vars(plain) == before


def test_state_of_another_compressor_or_model_is_refused():
    def trained(compressor, shape):
        exchange = CompressedExchange(compressor)
        exchange.exchange([tf.ones(shape)], [tf.Variable(tf.zeros(shape))], hvd.Average)
        return exchange

    kept = trained(DGC(), (40, 30)).get_state()
    again = CompressedExchange(DGC())
    again.set_state(kept)  # waits for the first gradients
    again.exchange([tf.ones((40, 30))], [tf.Variable(tf.zeros((40, 30)))], hvd.Average)
    assert again.get_state()["step"] == 2
    with pytest.raises(ValueError, match=r"'accumulated' is \(1200,\) there and \(600,\) here"):
        trained(DGC(), (20, 30)).set_state(kept)
    with pytest.raises(ValueError, match=r"does not fit .* 'accumulated' is .* and missing here"):
        trained(ErrorFeedback(TopK()), (40, 30)).set_state(kept)


def test_a_gradient_without_a_fixed_shape_is_named():
    variable = tf.Variable(tf.zeros((2, 3)), shape=(None, 3), name="rows")

    @tf.function(input_signature=[tf.TensorSpec((None, 3))])
    def step(gradient):
        return CompressedExchange(TopK()).exchange([gradient], [variable], hvd.Average)

    with pytest.raises(ValueError, match=r"gradient of rows.* has no fixed shape"):
        step(tf.zeros((2, 3)))
