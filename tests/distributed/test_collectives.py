import numpy as np
import pytest
import tensorflow as tf

import tfaccel.distributed as hvd
from tfaccel.distributed import process_sets, runtime
from tfaccel.distributed.adasum import adasum_tree


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(runtime, "_alone", False)
    hvd.init()
    yield
    hvd.shutdown()


def adasum(first, second):
    """Maleki 2020, equation 6."""
    product = float((first * second).sum())
    return first * (1 - product / (2 * float((first**2).sum()))) + second * (
        1 - product / (2 * float((second**2).sum()))
    )


def test_adasum_adds_what_is_orthogonal_and_averages_what_is_equal():
    x, y = np.array([3.0, 0.0]), np.array([0.0, 4.0])
    np.testing.assert_allclose(adasum_tree([x, y]), [3.0, 4.0])
    np.testing.assert_allclose(adasum_tree([x, x, x, x]), x)
    np.testing.assert_allclose(adasum_tree([x, np.zeros(2)]), x)
    random = np.random.default_rng(0).normal(size=(4, 2, 3))
    expected = adasum(adasum(random[0], random[1]), adasum(random[2], random[3]))
    np.testing.assert_allclose(adasum_tree(list(random)), expected, rtol=1e-12)


@pytest.mark.usefixtures("alone")
def test_operations_of_one_are_the_identity():
    x = np.arange(4.0)
    for compression in (None, hvd.Compression.none, hvd.Compression.fp16, hvd.Compression.bf16):
        np.testing.assert_array_equal(hvd.allreduce(x + 1e-9, compression=compression), x + 1e-9)
    np.testing.assert_array_equal(hvd.allreduce(x, prescale_factor=3.0, postscale_factor=2), 6 * x)
    np.testing.assert_array_equal(hvd.allreduce(x, op=hvd.Adasum), x)
    first, second = hvd.grouped_allreduce([x, x + 1])
    np.testing.assert_array_equal(second - first, np.ones(4))
    np.testing.assert_array_equal(hvd.grouped_allgather([x])[0], x)
    np.testing.assert_array_equal(hvd.alltoall(x), x)
    sent, sizes = hvd.alltoall(x, splits=[4])
    np.testing.assert_array_equal(sent, x)
    np.testing.assert_array_equal(sizes, [4])
    np.testing.assert_array_equal(hvd.reducescatter(x, op=hvd.Sum, prescale_factor=0.5), x / 2)
    np.testing.assert_array_equal(hvd.grouped_reducescatter([x])[0], x)
    assert hvd.allgather_object("me") == ["me"]
    assert hvd.join() == 0
    alone = (hvd.rank_op(), hvd.size_op(), hvd.local_rank_op(), hvd.local_size_op())
    assert [int(value) for value in alone] == [0, 1, 0, 1]
    assert int(hvd.process_set_included_op()) == 1
    assert (hvd.cross_rank(), hvd.cross_size()) == (0, 1)
    assert not hvd.gloo_enabled()
    assert not hvd.mpi_enabled()
    assert hvd.is_homogeneous()


@pytest.mark.usefixtures("alone")
def test_process_sets_of_one():
    own = hvd.ProcessSet([0])
    assert (own.size(), own.rank(), own.included()) == (1, 0, True)
    assert str(own) == "ProcessSet(process_set_id=None, ranks=[0])"
    with pytest.raises(ValueError, match="a process set of ranks \\[0\\] already"):
        hvd.add_process_set(own)
    with pytest.raises(ValueError, match="this job of 1 has not: 0 to 0"):
        hvd.add_process_set([0, 1])
    assert not hvd.remove_process_set(own)
    assert hvd.global_process_set.ranks == [0]
    assert process_sets.members(None) == 1


@pytest.mark.parametrize("ranks", [[], [0, 0], [-1], ["a"]])
def test_process_sets_need_ranks(ranks):
    with pytest.raises(ValueError, match="needs ranks, each once"):
        hvd.ProcessSet(ranks)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hvd.allreduce([1.0], average=True, op=hvd.Sum), "not both"),
        (lambda: hvd.allgather(1.0), r"Give it as \[value\]"),
        (lambda: hvd.alltoall(np.zeros(3), splits=[2]), r"1 numbers from 0 with a sum of 3.*\[2\]"),
        (lambda: hvd.reducescatter(np.zeros(2), op=hvd.Max), "averages or sums, but got op=Max"),
        (lambda: hvd.init(comm=[0]), "comm must be None"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_process_sets_by_a_wrong_word(monkeypatch):
    monkeypatch.setattr(runtime, "_alone", False)
    with pytest.raises(ValueError, match="\"dynamic\", but got 'some'"):
        hvd.init(process_sets="some")


def test_compression_is_horovods():
    x = tf.constant([1.001, 60000.0])
    sent, context = hvd.Compression.fp16.compress(x)
    assert sent.dtype == tf.float16
    np.testing.assert_array_equal(sent, x.numpy().astype(np.float16))
    assert hvd.Compression.fp16.decompress(sent, context).dtype == tf.float32
    sent, context = hvd.Compression.bf16.compress(x * 1e9)
    assert np.isfinite(hvd.Compression.bf16.decompress(sent, context)).all()
    whole = tf.constant([1, 2])
    for compression in (hvd.Compression.none, hvd.Compression.fp16, hvd.Compression.bf16):
        sent, context = compression.compress(whole)
        assert sent.dtype == compression.decompress(sent, context).dtype == tf.int32


@pytest.mark.horovod
def test_reductions_of_two(job):
    first = np.array([1.0, 2.0, 3.0])
    second = first * 2 + 1
    mean = (first + second) / 2
    for found in job["reductions"]:
        assert found["product"] == (first * second).tolist()
        assert found["not average"] == (first + second).tolist()
        assert found["average"] == mean.tolist()
        assert found["scaled"] == (10 * (first + second)).tolist()
        np.testing.assert_allclose(found["adasum"], adasum(first, second), rtol=1e-6)
        assert found["adasum of equals"] == [[1, 1], [1, 1]]
        # Rounded twice: on the way there and back.
        for name, bits in (("fp16", 11), ("bf16", 8)):
            np.testing.assert_allclose(found[name], mean + 1e-3, rtol=2 * 2.0**-bits)
            assert np.abs(np.array(found[name]) - mean - 1e-3).max() > 1e-5
        assert found["bf16 scaled"] == ((first + second) / 2).tolist()
        assert found["grouped"] == [
            (first + second).tolist(),
            [1, 10],
            [2.0],
            [[1.0], [2.0], [0.0]],
        ]
        assert found["types"] == ["float32", "int64", "bfloat16", "float32"]
        assert found["twice"] == [mean.tolist(), (2 * mean).tolist()]
        words = [words for _, words in found["errors"]]
        assert "averaged or summed, but got op=Max" in words[0]
        assert "Adasum combines floats, but got a tensor of int64" in words[1]
        assert "In 16 bits tensors can be averaged or summed" in words[2]


@pytest.mark.horovod
def test_exchanges_of_two(job):
    first, second = job["exchanges"]
    for found in (first, second):
        assert found["grouped"] == [[0, 10, 11], [[0.5], [1.5]]]
        assert found["types"] == ["int64", "bfloat16"]
        assert found["broadcast"] == [[1.5]]
        assert found["objects"] == [{"rank": 0, "length": ""}, {"rank": 1, "length": "x"}]
        assert found["built"] == [True, True, False, True]
        assert found["cross"] == [0, 1]
    assert first["in a graph"] == [0, 2, 0, 2]
    assert second["in a graph"] == [1, 2, 1, 2]
    assert first["even"] == [0, 1, 10, 11]
    assert second["even"] == [2, 3, 12, 13]
    assert first["uneven"] == [[0, 10, 11, 12], [1, 3]]
    assert second["uneven"] == [[1, 2], [2, 0]]
    # Three rows for two ranks: the mean of x and x + 1.
    assert first["scattered"] == [[0.5, 1.5], [2.5, 3.5]]
    assert second["scattered"] == [[4.5, 5.5]]
    assert first["scattered both"] == [[0], [[1]]]
    assert second["scattered both"] == [[2], [[1]]]
    assert (first["scattered sum"], second["scattered sum"]) == ([6], [12])


@pytest.mark.horovod
def test_process_sets_of_two(job):
    for rank, found in enumerate(job["process_sets"]):
        assert len(set(found["ids"])) == 2
        assert 0 not in found["ids"]
        assert found["who"] == [1, 0, True, None, False]
        assert found["everyone"] == [[0, 1], rank]
        assert found["sum"] == [1, 1]
        assert found["global"] == [2, 2]
        assert found["gathered"] == [rank]
        assert found["half"] == [1, 1, 1]
        assert found["object"] == rank
        assert found["variable"] == rank
        assert f"Rank {rank} is no member of" in found["no member"][1]
        assert "this job of 2 has not: 0 to 1" in found["too many"][1]
        assert found["twice"][0] == "ValueError"
        assert found["removed"] == [True, True, False]
        assert "is not known yet" in found["forgotten"][1]


@pytest.mark.horovod
def test_a_rank_that_joins_lets_the_other_go_on(job):
    first, second = job["joins"]
    assert first == [[[[3, 3], [3, 3]], 0], [[], 1]]
    assert second == [[[], 0], [[[3, 3], [3, 3]], 1]]
