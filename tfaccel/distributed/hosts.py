"""Hosts of a job, as horovodrun is told them: "a:2,b:2"."""

import contextlib
import re
import socket

import psutil

_HOST = re.compile(r"(?P<name>[A-Za-z0-9_.-]+):(?P<slots>[1-9][0-9]*)")


def parse_hosts(hosts: str) -> list[tuple[str, int]]:
    """Reads names and slots of hosts.

    Args:
        hosts: "a:2,b:2": two workers may run on each of a and b.

    Returns:
        (name, slots) of each, in the order in which ranks are given out.

    Raises:
        ValueError: it is written in another way, or names a host twice.

    >>> parse_hosts("a:2,b:1")
    [('a', 2), ('b', 1)]
    """
    found = []
    for part in str(hosts).split(","):
        match = _HOST.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"hosts must be names and numbers of workers, such as a:2,b:2, but got {hosts!r}."
            )
        found.append((match["name"], int(match["slots"])))
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise ValueError(f"Each host can be named once, but got {hosts!r}. Add up its workers.")
    return found


def check_hosts(hosts: str, workers: int | None = None) -> int:
    """Checks that hosts have room for a number of workers.

    Args:
        hosts: "a:2,b:2".
        workers: how many are wanted; None for as many as there is room for.

    Returns:
        The number of workers.

    Raises:
        ValueError: there is too little room, or `hosts` cannot be read.
    """
    room = sum(slots for _, slots in parse_hosts(hosts))
    if workers is not None and workers > room:
        raise ValueError(
            f"{workers} workers were asked for, but the hosts {hosts!r} have room for {room}. "
            "Raise the numbers behind the names, or take fewer workers."
        )
    return room if workers is None else workers


def check_begins_here(hosts: str) -> None:
    """Raises ValueError unless the first host, on which rank 0 will be, is this machine."""
    name = parse_hosts(hosts)[0][0]
    if not is_here(name):
        raise ValueError(
            f"The first host must be this machine ({socket.gethostname()}), because rank 0 runs on "
            f"it and writes the model here, but got {name!r}. Put this machine first: "
            f"--hosts {socket.gethostname()}:1,{hosts}"
        )


def is_here(name: str) -> bool:
    """Whether a name or address is one of this machine."""
    if name in ("localhost", socket.gethostname()):
        return True
    address = None
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
    own = {a.address for found in psutil.net_if_addrs().values() for a in found}
    return address in own
