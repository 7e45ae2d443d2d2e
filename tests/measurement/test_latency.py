import time

import pytest

from tfaccel.measurement import measure_latency


@pytest.fixture
def clock(monkeypatch):
    """A clock that each call of the returned function moves on."""
    state = {"now": 0}
    monkeypatch.setattr(time, "perf_counter_ns", lambda: state["now"])

    def takes(milliseconds):
        durations = iter(milliseconds)

        def run():
            state["now"] += int(next(durations) * 1e6)

        return run

    return takes


def test_median_and_p95_leave_the_warmup_out(clock):
    # Warmed up by two slow calls, then 1 to 21 ms: median 11; 95 % of the way from 1 to 21 is 20.
    run = clock([1000, 1000, *range(21, 0, -1)])
    latency = measure_latency(run, runs=21, warmup=2)
    assert (latency.median_ms, latency.p95_ms, latency.runs) == (11.0, 20.0, 21)


def test_goes_on_until_the_time_has_passed(clock):
    latency = measure_latency(clock([3] * 100), runs=2, warmup=0, min_seconds=0.010)
    assert latency.runs == 4  # 3, 6, 9, 12 ms


def test_calls_are_really_timed():
    latency = measure_latency(lambda: time.sleep(0.002), runs=3, warmup=0)
    assert 2.0 <= latency.median_ms <= latency.p95_ms < 1000.0


@pytest.mark.parametrize("arguments", [{"runs": 0}, {"warmup": -1}, {"min_seconds": -0.1}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        measure_latency(lambda: None, **arguments)
