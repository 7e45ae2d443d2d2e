"""How long one call takes."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tfaccel.core.checks import check_number, check_positive
from tfaccel.measurement.records import Latency


def measure_latency(
    run: Callable[[], Any], *, runs: int = 100, warmup: int = 5, min_seconds: float = 0.0
) -> Latency:
    """Times calls of a function, one by one.

    Args:
        run: what is timed.
        runs: calls timed at least.
        warmup: calls made before, not timed: the first ones allocate memory and fill caches.
        min_seconds: goes on beyond `runs` until so much time is in the timed calls.

    Returns:
        Median and 95th percentile.

    Raises:
        ValueError: `runs` is below 1, or `warmup` or `min_seconds` below 0.
    """
    check_positive("runs", runs)
    for name, value in (("warmup", warmup), ("min_seconds", min_seconds)):
        check_number(name, value)
        if value < 0:
            raise ValueError(f"{name} must not be below 0, but got {value!r}.")
    for _ in range(warmup):
        run()
    nanoseconds: list[int] = []
    total = 0
    while len(nanoseconds) < runs or total < min_seconds * 1e9:
        begin = time.perf_counter_ns()
        run()
        nanoseconds.append(time.perf_counter_ns() - begin)
        total += nanoseconds[-1]
    median, p95 = np.percentile(nanoseconds, [50, 95])
    return Latency(float(median) / 1e6, float(p95) / 1e6, len(nanoseconds))
