"""Training on several workers with Horovod: `import tfaccel.distributed as hvd`.

Horovod itself is loaded by `init()`, and only in a process that horovodrun started.
"""

from tfaccel.distributed import callbacks, elastic
from tfaccel.distributed.batch_norm import SyncBatchNormalization, synchronize_batch_norm
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
    grouped_reducescatter,
    join,
    reducescatter,
)
from tfaccel.distributed.compression_state import (
    CompressionCheckpoint,
    restore_compression_state,
    save_compression_state,
)
from tfaccel.distributed.compressors import FP16, BFloat16, Compressor, NoCompression
from tfaccel.distributed.dgc import DGC
from tfaccel.distributed.error_feedback import ErrorFeedback
from tfaccel.distributed.gathering import allgather, alltoall, broadcast, grouped_allgather
from tfaccel.distributed.graph_queries import (
    local_rank_op,
    local_size_op,
    process_set_included_op,
    rank_op,
    size_op,
)
from tfaccel.distributed.half_precision import Compression
from tfaccel.distributed.jobs import check_horovod, run_elastic_workers, run_workers
from tfaccel.distributed.loading import load_model
from tfaccel.distributed.local_sgd import LocalSGD
from tfaccel.distributed.objects import allgather_object, broadcast_object, broadcast_variables
from tfaccel.distributed.optimizer import DistributedOptimizer, PartialDistributedOptimizer
from tfaccel.distributed.parameter_server import ParameterServer
from tfaccel.distributed.pipeline import Pipeline
from tfaccel.distributed.powersgd import LowRank, PowerSGD
from tfaccel.distributed.process_sets import (
    ProcessSet,
    add_process_set,
    global_process_set,
    remove_process_set,
)
from tfaccel.distributed.quantizers import QSGD, EFSignSGD, Int8, ScaledSign
from tfaccel.distributed.rank_zero import on_rank_0, run_on_rank_0
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
    is_launched,
    local_rank,
    local_size,
    rank,
    shutdown,
    size,
)
from tfaccel.distributed.sharding import shard
from tfaccel.distributed.sparsifiers import RandomK, Threshold, TopK
from tfaccel.distributed.tape import DistributedGradientTape, PartialDistributedGradientTape
from tfaccel.distributed.worker_data import end_together

__all__ = [
    "DGC",
    "FP16",
    "QSGD",
    "Adasum",
    "Average",
    "BFloat16",
    "BroadcastGlobalVariablesCallback",
    "Compression",
    "CompressionCheckpoint",
    "Compressor",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "EFSignSGD",
    "ErrorFeedback",
    "Int8",
    "LocalSGD",
    "LowRank",
    "Max",
    "MetricAverageCallback",
    "Min",
    "NoCompression",
    "ParameterServer",
    "PartialDistributedGradientTape",
    "PartialDistributedOptimizer",
    "Pipeline",
    "PowerSGD",
    "ProcessSet",
    "Product",
    "RandomK",
    "ReduceOp",
    "ScaledSign",
    "Sum",
    "SyncBatchNormalization",
    "Threshold",
    "TopK",
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
    "elastic",
    "end_together",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allreduce",
    "grouped_reducescatter",
    "init",
    "is_homogeneous",
    "is_initialized",
    "is_launched",
    "join",
    "load_model",
    "local_rank",
    "local_rank_op",
    "local_size",
    "local_size_op",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "on_rank_0",
    "process_set_included_op",
    "rank",
    "rank_op",
    "reducescatter",
    "remove_process_set",
    "restore_compression_state",
    "rocm_built",
    "run_elastic_workers",
    "run_on_rank_0",
    "run_workers",
    "save_compression_state",
    "shard",
    "shutdown",
    "size",
    "size_op",
    "start_timeline",
    "stop_timeline",
    "synchronize_batch_norm",
]
