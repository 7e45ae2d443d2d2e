import socket

import pytest

from tfaccel.distributed.hosts import check_begins_here, check_hosts, is_here, parse_hosts
from tfaccel.distributed.jobs import run_workers


def test_room_is_counted():
    assert parse_hosts("node-1.lan:4, 10.0.0.2:1") == [("node-1.lan", 4), ("10.0.0.2", 1)]
    assert check_hosts("a:2,b:3") == 5
    assert check_hosts("a:2,b:3", 4) == 4


@pytest.mark.parametrize("hosts", ["", "a", "a:", "a:0", "a:2,", "a:2;b:2", "a:two", "a b:2"])
def test_what_cannot_be_read_is_quoted(hosts):
    with pytest.raises(ValueError, match=r"such as a:2,b:2, but got"):
        parse_hosts(hosts)


def test_too_little_room_and_repeated_names_are_errors():
    with pytest.raises(ValueError, match=r"5 workers were asked for.* have room for 4"):
        run_workers(["true"], 5, hosts="a:2,b:2")
    with pytest.raises(ValueError, match="can be named once"):
        parse_hosts("a:2,a:1")


def test_this_machine_is_known_by_its_names_and_addresses(monkeypatch):
    known = {"other": "192.0.2.7", "alias": "127.0.0.1", "127.0.0.1": "127.0.0.1"}

    def look_up(name):
        if name not in known:
            raise OSError(name)
        return known[name]

    monkeypatch.setattr(socket, "gethostbyname", look_up)
    for name in ("localhost", socket.gethostname(), "alias", "127.0.0.1"):
        assert is_here(name)
        check_begins_here(f"{name}:1,other:2")
    for name in ("other", "unknown"):
        with pytest.raises(ValueError, match=f"first host must be this machine.*got {name!r}"):
            check_begins_here(f"{name}:2,localhost:2")
