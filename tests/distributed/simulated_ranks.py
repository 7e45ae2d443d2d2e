"""Ranks as threads of one process: what compressors do on N ranks, without Horovod."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf


class Meeting:
    """Where the threads lay down what they send, and wait for one another."""

    def __init__(self, size):
        self.size = size
        self.sent_bytes = 0
        self._barrier = threading.Barrier(size)
        self._places = [None] * size

    def all(self, rank, value):
        self._places[rank] = value
        self._barrier.wait(60)
        everything = list(self._places)
        self._barrier.wait(60)
        return everything

    def give_up(self):
        self._barrier.abort()


class SimulatedChannel:
    def __init__(self, meeting, rank):
        self.meeting, self.rank, self.size = meeting, rank, meeting.size
        self.calls = []

    def mean(self, tensor, key):
        assert tensor.dtype == tf.float32
        self.calls.append(("mean", key, int(tf.size(tensor))))
        everything = self.meeting.all(self.rank, tensor.numpy())
        return tf.constant(np.sum(everything, axis=0, dtype=np.float32) / np.float32(self.size))

    def mean_half(self, tensor, key):
        self.calls.append(("mean_half", key, int(tf.size(tensor))))
        everything = self.meeting.all(self.rank, tensor.numpy().astype(np.float32))
        return tf.cast(np.mean(everything, axis=0), tensor.dtype)

    def gather(self, message, key):
        assert message.dtype == tf.uint8
        self.calls.append(("gather", key, int(tf.size(message))))
        return tf.constant(np.concatenate(self.meeting.all(self.rank, message.numpy())))


class Trace:
    """One rank's results, states and calls, step by step."""

    def __init__(self):
        self.results, self.states, self.calls = [], [], []


def simulate(compressor, gradients):
    """Exchanges gradients[step][rank], each a list of arrays; returns a Trace per rank."""
    size = len(gradients[0])
    meeting = Meeting(size)

    def run(rank):
        channel, trace = SimulatedChannel(meeting, rank), Trace()
        try:
            state = compressor.init([g.shape for g in gradients[0][0]])
            for step in gradients:
                own = [tf.constant(g, tf.float32) for g in step[rank]]
                payload, state = compressor.compress(own, state, channel)
                done = compressor.communicate(payload, state, channel)
                state = done.state
                results = [r.numpy() for r in compressor.decompress(done.received)]
                trace.results.append(results)
                trace.states.append(tf.nest.map_structure(np.asarray, dict(state)))
                trace.calls.append(channel.calls)
                channel.calls = []
        except BaseException:
            meeting.give_up()
            raise
        return trace

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def make_gradients(steps, ranks, shapes, seed=0):
    random = np.random.default_rng(seed)
    return [
        [[random.normal(size=s).astype(np.float32) for s in shapes] for _ in range(ranks)]
        for _ in range(steps)
    ]
