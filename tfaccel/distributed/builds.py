"""What the installed Horovod can do, asked with Horovod's names."""

import importlib.util
from typing import Any

from tfaccel.distributed import runtime


def gloo_built() -> bool:
    """Whether Horovod was compiled with Gloo; False without Horovod."""
    return bool(_ask("gloo_built"))


def mpi_built() -> bool:
    """Whether Horovod was compiled with MPI."""
    return bool(_ask("mpi_built"))


def nccl_built() -> int:
    """The version of NCCL that Horovod was compiled with; 0 for none."""
    return int(_ask("nccl_built"))


def ddl_built() -> bool:
    """Whether Horovod was compiled with IBM's DDL."""
    return bool(_ask("ddl_built"))


def ccl_built() -> bool:
    """Whether Horovod was compiled with Intel's oneCCL."""
    return bool(_ask("ccl_built"))


def cuda_built() -> bool:
    """Whether Horovod was compiled for CUDA."""
    return bool(_ask("cuda_built"))


def rocm_built() -> bool:
    """Whether Horovod was compiled for ROCm."""
    return bool(_ask("rocm_built"))


def gloo_enabled() -> bool:
    """Whether the job runs with Gloo; False in a process that is alone."""
    return runtime.horovod() is not None and bool(_ask("gloo_enabled"))


def mpi_enabled() -> bool:
    """Whether the job runs with MPI; False in a process that is alone."""
    return runtime.horovod() is not None and bool(_ask("mpi_enabled"))


def mpi_threads_supported() -> bool:
    """Whether MPI may be used from several threads; False without MPI."""
    return mpi_enabled() and bool(_ask("mpi_threads_supported"))


def is_homogeneous() -> bool:
    """Whether every machine of the job has as many processes; True in a process that is alone."""
    return runtime.horovod() is None or bool(_ask("is_homogeneous"))


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Begins to record what Horovod does, for chrome://tracing; nothing in a process alone.

    Args:
        file_path: where the record goes.
        mark_cycles: marks each cycle of Horovod's background thread.
    """
    hvd = runtime.horovod()
    if hvd is not None:
        hvd.start_timeline(str(file_path), mark_cycles)


def stop_timeline() -> None:
    """Ends the record that `start_timeline` began."""
    hvd = runtime.horovod()
    if hvd is not None:
        hvd.stop_timeline()


def _ask(question: str) -> Any:
    """Asks Horovod without joining a job; 0 where it is not installed."""
    if importlib.util.find_spec("horovod") is None:
        return 0
    import horovod.tensorflow

    return getattr(horovod.tensorflow, question)()
