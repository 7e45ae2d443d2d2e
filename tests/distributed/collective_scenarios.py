"""Scenarios for the workers of tests/distributed/worker.py: the collective operations."""

import numpy as np
import tensorflow as tf

import tfaccel.distributed as hvd
from tests.distributed.worker import error_of


def listed(value):
    return tf.cast(tf.convert_to_tensor(value), tf.float64).numpy().tolist()


def reductions():
    rank = hvd.rank()
    own = np.array([1.0, 2.0, 3.0], "float32") * (rank + 1) + rank
    rows = tf.IndexedSlices(tf.constant([[1.0 + rank]]), tf.constant([rank]), tf.constant([3, 1]))
    mixed = [own, np.array([rank, 5]), tf.constant([rank + 0.5], tf.bfloat16), rows]
    grouped = hvd.grouped_allreduce(mixed, op=hvd.Sum)
    both = {"compression": hvd.Compression.bf16, "prescale_factor": 2.0, "postscale_factor": 0.25}

    @tf.function
    def twice(x):
        return hvd.allreduce(x), hvd.allreduce(x * 2.0)

    return {
        "product": listed(hvd.allreduce(own, op=hvd.Product)),
        "not average": listed(hvd.allreduce(own, average=False)),
        "average": listed(hvd.allreduce(own, average=True)),
        "scaled": listed(hvd.allreduce(own, op=hvd.Sum, prescale_factor=2.0, postscale_factor=5.0)),
        "adasum": listed(hvd.allreduce(own, op=hvd.Adasum)),
        "adasum of equals": listed(hvd.allreduce(np.ones((2, 2), "float32"), op=hvd.Adasum)),
        "fp16": listed(hvd.allreduce(own + 1e-3, compression=hvd.Compression.fp16)),
        "bf16": listed(hvd.allreduce(own + 1e-3, compression=hvd.Compression.bf16)),
        "bf16 scaled": listed(hvd.allreduce(own, op=hvd.Sum, **both)),
        "integers": listed(hvd.allreduce(own.astype(int), compression=hvd.Compression.fp16)),
        "grouped": [listed(value) for value in grouped],
        "types": [value.dtype.name for value in grouped],
        "twice": [listed(value) for value in twice(tf.constant(own))],
        "errors": [
            error_of(lambda: hvd.allreduce(rows, op=hvd.Max)),
            error_of(lambda: hvd.allreduce(own.astype(int), op=hvd.Adasum)),
            error_of(lambda: hvd.allreduce(own, op=hvd.Max, compression=hvd.Compression.fp16)),
        ],
    }


def exchanges():
    rank = hvd.rank()
    rows = np.arange(3) + 10 * rank
    half = tf.constant([[rank + 0.5]], tf.bfloat16)
    gathered = hvd.grouped_allgather([rows[: rank + 1], half])
    sent, sizes = hvd.alltoall(rows, splits=[1, 2] if rank == 0 else [3, 0])
    return {
        "grouped": [listed(value) for value in gathered],
        "types": [value.dtype.name for value in gathered],
        "broadcast": listed(hvd.broadcast(half, 1)),
        "even": listed(hvd.alltoall(np.arange(4.0) + 10 * rank)),
        "uneven": [listed(sent), listed(sizes)],
        "objects": hvd.allgather_object({"rank": rank, "length": "x" * rank}),
        "scattered": listed(hvd.reducescatter(np.arange(6.0).reshape(3, 2) + rank)),
        "scattered sum": listed(
            hvd.reducescatter(
                tf.constant([1.0, 2.0], tf.bfloat16), op=hvd.Sum, postscale_factor=3.0
            )
        ),
        "scattered both": [
            listed(part)
            for part in hvd.grouped_reducescatter(
                [np.arange(2.0), np.full((2, 1), rank)], op=hvd.Sum
            )
        ],
        "built": [hvd.gloo_built(), hvd.gloo_enabled(), hvd.mpi_enabled(), hvd.is_homogeneous()],
        "in a graph": [
            int(op()) for op in (hvd.rank_op, hvd.size_op, hvd.local_rank_op, hvd.local_size_op)
        ],
        "cross": [hvd.cross_rank(), hvd.cross_size()],
    }


def process_sets():
    rank = hvd.rank()
    alone = [hvd.add_process_set([0]), hvd.add_process_set(hvd.ProcessSet([1]))]
    own, other = alone[rank], alone[1 - rank]
    variable = tf.Variable(float(rank))
    hvd.broadcast_variables([variable], rank, process_set=own)
    found = {
        "ids": [s.process_set_id for s in alone],
        "who": [own.size(), own.rank(), own.included(), other.rank(), other.included()],
        "everyone": [hvd.global_process_set.ranks, hvd.global_process_set.rank()],
        "sum": listed(hvd.allreduce(np.ones(2), op=hvd.Sum, process_set=own)),
        "global": listed(hvd.allreduce(np.ones(2), op=hvd.Sum, process_set=hvd.global_process_set)),
        "gathered": listed(hvd.allgather(np.full(1, rank), process_set=own)),
        "half": listed(
            hvd.allreduce(np.ones(3, "float32"), compression=hvd.Compression.bf16, process_set=own)
        ),
        "object": hvd.broadcast_object(rank, rank, process_set=own),
        "variable": float(variable),
        "no member": error_of(lambda: hvd.allreduce(np.ones(2), process_set=other)),
        "too many": error_of(lambda: hvd.add_process_set([0, 2])),
        "twice": error_of(lambda: hvd.add_process_set([0])),
    }
    hvd.barrier(process_set=own)
    hvd.barrier()
    found["removed"] = [hvd.remove_process_set(s) for s in [*alone, hvd.global_process_set]]
    found["forgotten"] = error_of(lambda: hvd.allreduce(np.ones(2), process_set=own))
    return found


def joins():
    """Twice, because Horovod's own operation works once per process."""
    found = []
    for late in (0, 1):
        sums = []
        if hvd.rank() == late:
            sums = [
                listed(hvd.allreduce(np.full(2, 3.0), op=hvd.Sum, name=f"late{late}.{i}"))
                for i in range(2)
            ]
        found.append([sums, hvd.join()])
    return found
