"""Formulas against the steps of the algorithms themselves, counted one by one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfaccel.distributed.cost_model import Network, Traffic, communication_s

# 8 Mbit/s: a microsecond a byte. A latency of a thousand bytes, an addition of ten.
NETWORK = Network(bandwidth_mbit=8, latency_ms=1.0, add_ns=10_000)
POWERS = st.sampled_from([2, 4, 8, 64])


def microseconds(topology, workers, traffic, servers=1, network=NETWORK):
    return 1e6 * communication_s(topology, workers, traffic, network, servers)


@given(workers=st.integers(2, 40), blocks=st.integers(1, 5))
def test_ring_is_its_two_rounds_of_steps(workers, blocks):
    """N-1 steps of reduce-scatter with an addition each, N-1 of allgather (Patarasuk & Yuan)."""
    values = workers * blocks
    expected = 0.0
    for step in range(2 * (workers - 1)):
        expected += 1000 + 4 * blocks
        expected += 10 * blocks if step < workers - 1 else 0
    traffic = Traffic(values, 4 * values, summable=True)
    assert microseconds("ring", workers, traffic) == pytest.approx(expected)


@given(workers=POWERS, values=st.integers(1, 50))
def test_tree_is_walked_up_and_down(workers, values):
    """By halving the ranks that still have something: one message of all and one addition each."""
    expected, left = 0.0, workers
    while left > 1:
        expected += 1000 + 4 * values + 10 * values  # up
        expected += 1000 + 4 * values  # and, later, down
        left //= 2
    traffic = Traffic(values, 4 * values, summable=True)
    assert microseconds("tree", workers, traffic) == pytest.approx(expected)


@given(workers=st.integers(2, 40), servers=st.integers(1, 8), values=st.integers(1, 50))
def test_servers_receive_and_send_a_part_for_every_worker(workers, servers, values):
    each_link = 4 * values * max(workers / servers, 1)
    expected = 2 * (1000 + each_link) + 10 * values * workers / servers
    traffic = Traffic(values, 4 * values, summable=True)
    assert microseconds("server", workers, traffic, servers) == pytest.approx(expected)


def test_gathered_messages_are_passed_round_whole():
    traffic = Traffic(values=1000, message_bytes=20, summable=False)
    # Three steps of a message of 20 bytes; then ten values of each of the three others are added.
    assert microseconds("ring", 4, traffic) == pytest.approx(3 * (1000 + 20) + 3 * 10 * 10)
    # Up with 20 and 40 bytes, down twice with 80.
    assert microseconds("tree", 4, traffic) == pytest.approx(4 * 1000 + 20 + 40 + 2 * 80 + 300)
    # In with 4 of 20 bytes, out with 4 of 80; the servers add ten values of each of the four.
    assert microseconds("server", 4, traffic) == pytest.approx(2000 + 80 + 320 + 400)


def test_gathered_messages_never_grow_past_the_dense_gradients():
    traffic = Traffic(values=10, message_bytes=30, summable=False)
    assert microseconds("tree", 4, traffic) < 4 * 1000 + 30 + 40 + 2 * 40 + 3 * 10 * 10 + 1e-6
    assert microseconds("server", 2, traffic) == pytest.approx(2000 + 60 + 2 * 40 + 2 * 100)


@pytest.mark.parametrize("topology", ["ring", "tree", "server"])
def test_one_worker_sends_nothing_and_operations_have_a_fixed_cost(topology):
    traffic = Traffic(8, 32, summable=True)
    slow = Network(8, 1.0, operation_ms=3.0, add_ns=10_000)
    assert communication_s(topology, 1, traffic, slow) == 0
    extra = communication_s(topology, 4, traffic, slow) - communication_s(
        topology, 4, traffic, NETWORK
    )
    assert math.isclose(extra, 0.003)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Network(0, 1), "bandwidth_mbit must be above 0, but got 0"),
        (lambda: Network(1, -1), "latency_ms must be 0 or more, but got -1"),
        (
            lambda: communication_s("star", 2, Traffic(1, 4, True), NETWORK),
            "ring, tree, server, but got 'star'",
        ),
        (
            lambda: communication_s("ring", 0, Traffic(1, 4, True), NETWORK),
            "workers must be an int",
        ),
    ],
    ids=["bandwidth", "latency", "topology", "workers"],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
