import importlib.util
import os
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "tools" / "bench" / "network.py"


@pytest.fixture(scope="module")
def network():
    spec = importlib.util.spec_from_file_location("network", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_it_says_what_is_missing(network, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert network.reason_against() == "network namespaces need root"
    with pytest.raises(network.NetworkError, match="need root"), network.network(2):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(network.shutil, "which", lambda program: None)
    assert "ip and tc not found" in network.reason_against()


def test_bytes_that_pass_are_counted_at_a_rate_that_is_limited(network):
    reason = network.reason_against()
    if reason is not None:
        pytest.skip(reason)
    with network.network(2, rate="100mbit") as nodes:
        before = [node.counters() for node in nodes]
        rate = network.measure_rate(nodes, megabytes=2)
        sent, received = (node.counters() - b for node, b in zip(nodes, before, strict=True))
        namespaces = [node.namespace for node in nodes]
    # Headers of Ethernet, IP and TCP are 66 bytes of up to 1,514; 2 MB in bursts of 128 kB.
    assert 2e6 <= sent.sent_bytes <= 2.2e6
    assert received.received_bytes == pytest.approx(sent.sent_bytes, rel=0.01)
    assert rate < 1.3 * 100e6
    assert not any((Path("/run/netns") / name).exists() for name in namespaces)
    assert not any((Path("/etc/netns") / name).exists() for name in namespaces)
