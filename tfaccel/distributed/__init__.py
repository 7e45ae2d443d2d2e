"""Training on several workers with Horovod: `import tfaccel.distributed as hvd`.

Horovod itself is loaded by `init()`, and only in a process that horovodrun started.
"""

from tfaccel.distributed import callbacks
from tfaccel.distributed.callbacks import BroadcastGlobalVariablesCallback, MetricAverageCallback
from tfaccel.distributed.jobs import check_horovod, run_workers
from tfaccel.distributed.optimizer import DistributedOptimizer
from tfaccel.distributed.runtime import (
    Average,
    Max,
    Min,
    ReduceOp,
    Sum,
    allgather,
    allreduce,
    barrier,
    broadcast,
    broadcast_object,
    broadcast_variables,
    cross_rank,
    init,
    is_initialized,
    local_rank,
    local_size,
    rank,
    shutdown,
    size,
)
from tfaccel.distributed.sharding import shard

__all__ = [
    "Average",
    "BroadcastGlobalVariablesCallback",
    "DistributedOptimizer",
    "Max",
    "MetricAverageCallback",
    "Min",
    "ReduceOp",
    "Sum",
    "allgather",
    "allreduce",
    "barrier",
    "broadcast",
    "broadcast_object",
    "broadcast_variables",
    "callbacks",
    "check_horovod",
    "cross_rank",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "run_workers",
    "shard",
    "shutdown",
    "size",
]
