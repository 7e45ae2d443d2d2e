import itertools
import threading

import numpy as np
import pytest
import tensorflow as tf

from tfaccel.core.graph import Tensor
from tfaccel.distributed import runtime, transport
from tfaccel.distributed.messages import pack, unpack
from tfaccel.distributed.transport import HorovodTransport, LocalTransport, make_transport


def like(tensors):
    return [Tensor((None,) * tensor.shape.rank, tensor.dtype.name, "t") for tensor in tensors]


def test_every_type_arrives_bit_by_bit():
    random = np.random.default_rng(0).normal(size=(3, 4))
    types = ("float16", "bfloat16", "float32", "float64", "int8", "uint16", "int64", "bool")
    tensors = [tf.cast(random * 9, dtype) for dtype in types]
    # An odd number of bytes before, a scalar, nothing at all, and numbers that are none.
    tensors[1:1] = [tf.constant([True]), tf.constant(2.5), tf.zeros([0, 7])]
    tensors.append(tf.constant([np.nan, -np.inf, -0.0]))
    for got, given in zip(unpack(pack(tensors), like(tensors)), tensors, strict=True):
        assert got.dtype == given.dtype
        assert got.shape == given.shape
        assert got.numpy().tobytes() == given.numpy().tobytes()


@pytest.mark.parametrize("change", [-1, 1], ids=["shorter", "longer"])
def test_messages_of_another_length_are_refused(change):
    tensors = [tf.constant([1.0, 2.0])]
    message = pack(tensors)
    with pytest.raises(ValueError, match="must run the same program"):
        unpack(np.resize(message, len(message) + change), like(tensors))


class Threads:
    """Horovod's alltoall among threads of one process."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size)
        self.boxes = {}
        self.sent_bytes = [0] * size

    def of(self, rank):
        def alltoall(data, splits, name):
            bounds = np.cumsum([0, *splits])
            for other, (begin, end) in enumerate(itertools.pairwise(bounds)):
                self.boxes[rank, other] = data[begin:end]
                self.sent_bytes[rank] += 0 if other == rank else end - begin
            self.barrier.wait()
            received = [self.boxes[other, rank] for other in range(self.barrier.parties)]
            self.barrier.wait()
            return tf.constant(np.concatenate(received)), None

        return type("Horovod", (), {"alltoall": staticmethod(alltoall)})


@pytest.fixture
def run_ranks(monkeypatch):
    """Runs a function on a transport for each rank of a job, in threads; returns the results."""

    def run(size, stages, function):
        threads, results = Threads(size), [None] * size
        transports = []
        monkeypatch.setattr(runtime, "size", lambda: size)
        for rank in range(size):
            monkeypatch.setattr(runtime, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(runtime, "horovod", lambda rank=rank: threads.of(rank))
            transports.append(HorovodTransport(stages))

        def work(rank):
            results[rank] = function(transports[rank], rank)

        workers = [threading.Thread(target=work, args=[rank]) for rank in range(size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(30)
        return results, threads.sent_bytes

    return run


def test_messages_reach_the_stage_behind_in_the_same_pipeline(run_ranks):
    def send(transport, rank):
        (stage,) = transport.local
        outgoing = {stage + 1: np.full(rank + 1, rank, np.uint8)} if stage < 2 else {}
        return transport.exchange(outgoing, "forward")[stage].tolist()

    results, _ = run_ranks(6, 3, send)
    assert results == [[], [0], [1, 1], [], [3] * 4, [4] * 5]


def test_replicas_sum_what_belongs_to_the_same_stage(run_ranks):
    """With ring's bytes: 2(R-1)/R of those of the arrays, padded to a multiple of R values."""

    def add(transport, rank):
        arrays = [tf.fill([2, 3], float(rank)), tf.constant(10.0 * rank)]
        if rank % 2:  # the other stage has other arrays
            arrays = [tf.constant([1.0, rank], tf.float64)]
        return [array.numpy().tolist() for array in transport.sum_over_replicas(arrays)]

    results, sent = run_ranks(6, 2, add)
    assert results[0] == results[2] == results[4] == [[[6.0] * 3] * 2, 60.0]
    assert results[1] == results[3] == results[5] == [[3.0, 9.0]]
    assert sent[0] == 2 * (3 - 1) / 3 * 9 * 4  # 7 values padded to 9
    assert sent[1] == 2 * (3 - 1) / 3 * 3 * 8


def test_one_process_has_all_stages(monkeypatch):
    monkeypatch.setattr(transport, "_numbers", None)  # it takes no number of an operation
    made = make_transport(3)
    assert isinstance(made, LocalTransport)
    assert list(made.local) == [0, 1, 2]
