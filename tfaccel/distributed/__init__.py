"""Training on several workers with Horovod: `import tfaccel.distributed as hvd`.

Horovod itself is loaded by `init()`, and only in a process that horovodrun started.
"""

from tfaccel.distributed import callbacks
from tfaccel.distributed.builds import (
    ccl_built,
    cuda_built,
    ddl_built,
    gloo_built,
    gloo_enabled,
    is_homogeneous,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rocm_built,
    start_timeline,
    stop_timeline,
)
from tfaccel.distributed.callbacks import BroadcastGlobalVariablesCallback, MetricAverageCallback
from tfaccel.distributed.collectives import (
    allreduce,
    barrier,
    grouped_allreduce,
    join,
    reducescatter,
)
from tfaccel.distributed.gathering import allgather, alltoall, broadcast, grouped_allgather
from tfaccel.distributed.half_precision import Compression
from tfaccel.distributed.jobs import check_horovod, run_workers
from tfaccel.distributed.objects import allgather_object, broadcast_object, broadcast_variables
from tfaccel.distributed.optimizer import DistributedOptimizer
from tfaccel.distributed.pipeline import Pipeline
from tfaccel.distributed.process_sets import (
    ProcessSet,
    add_process_set,
    global_process_set,
    remove_process_set,
)
from tfaccel.distributed.runtime import (
    Adasum,
    Average,
    Max,
    Min,
    Product,
    ReduceOp,
    Sum,
    cross_rank,
    cross_size,
    init,
    is_initialized,
    local_rank,
    local_size,
    rank,
    shutdown,
    size,
)
from tfaccel.distributed.sharding import shard
from tfaccel.distributed.tape import DistributedGradientTape

__all__ = [
    "Adasum",
    "Average",
    "BroadcastGlobalVariablesCallback",
    "Compression",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "Max",
    "MetricAverageCallback",
    "Min",
    "Pipeline",
    "ProcessSet",
    "Product",
    "ReduceOp",
    "Sum",
    "add_process_set",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "barrier",
    "broadcast",
    "broadcast_object",
    "broadcast_variables",
    "callbacks",
    "ccl_built",
    "check_horovod",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allreduce",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rank",
    "reducescatter",
    "remove_process_set",
    "rocm_built",
    "run_workers",
    "shard",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
]
