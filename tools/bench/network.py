"""Several machines in one: network namespaces on a bridge, with limited rate and latency.

    with network(4, rate="1gbit") as nodes:
        run_ranks(nodes, [sys.executable, "train.py"], log=Path("job.log"))

Needs root, `ip` and `tc`. The rate is tc's token bucket, in both directions of every link; latency
needs the kernel module sch_netem, which not every kernel has. Ranks are started without ssh: each
in its namespace, with a rendezvous server of Horovod's outside of them.
"""

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"
_NAMESPACE_FILES = Path("/etc/netns")
_TAIL_CHARACTERS = 3000
_numbers = itertools.count()


class NetworkError(RuntimeError):
    """The network cannot be made on this machine; the message says why."""


@dataclass(frozen=True)
class Counters:
    """What went over one interface since it was made, headers of Ethernet and IP included."""

    sent_bytes: int
    received_bytes: int
    sent_packets: int
    received_packets: int

    def __sub__(self, other: "Counters") -> "Counters":
        return Counters(
            self.sent_bytes - other.sent_bytes,
            self.received_bytes - other.received_bytes,
            self.sent_packets - other.sent_packets,
            self.received_packets - other.received_packets,
        )


@dataclass(frozen=True)
class Node:
    """One namespace.

    Attributes:
        namespace: its name, for `ip netns exec`.
        address: of its only interface, which is called eth0 inside.
        link: the other end of that interface, on the bridge outside.
        gateway: address of the bridge.
    """

    namespace: str
    address: str
    link: str
    gateway: str

    def counters(self) -> Counters:
        """Reads the interface's counters, from outside."""
        folder = Path("/sys/class/net") / self.link / "statistics"
        # What the outer end receives, the inner one has sent.
        names = ("rx_bytes", "tx_bytes", "rx_packets", "tx_packets")
        return Counters(*(int((folder / name).read_text()) for name in names))

    def command(self, command: Sequence[str]) -> list[str]:
        """Returns the command line that runs `command` in this namespace."""
        return ["ip", "netns", "exec", self.namespace, *command]


def reason_against(latency_ms: float = 0.0) -> str | None:
    """Says why no network can be made here, or returns None if one can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not found (Debian's package iproute2)"
    try:
        with network(1, rate="1gbit", latency_ms=latency_ms):
            return None
    except NetworkError as error:
        return str(error)


@contextlib.contextmanager
def network(
    nodes: int, rate: str | None = None, latency_ms: float = 0.0, burst: str = "128kb"
) -> Iterator[list[Node]]:
    """Makes namespaces on a bridge of their own and removes them at the end.

    Args:
        nodes: how many.
        rate: of every link, each way, in tc's words ("1gbit", "100mbit"); None for no limit.
        latency_ms: added on the way out of every node, milliseconds.
        burst: size of the token bucket: how much may pass at once.

    Raises:
        NetworkError: it cannot be made here.
    """
    if os.geteuid() != 0:
        raise NetworkError("network namespaces need root")
    number = os.getpid() % 10000 * 10 + next(_numbers) % 10
    bridge = f"tfb{number}"
    subnet = f"10.{64 + number // 250 % 128}.{number % 250}"
    made = [
        Node(f"tfn{number}x{i}", f"{subnet}.{i + 1}", f"tfv{number}x{i}", f"{subnet}.254")
        for i in range(nodes)
    ]
    # Ended by SIGTERM, Python would leave all of it behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "address", "add", f"{subnet}.254/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for node in made:
            _connect(node, bridge)
            if rate is not None or latency_ms:
                inside = ("ip", "netns", "exec", node.namespace)
                _shape(inside, INTERFACE, rate, latency_ms, burst)
                _shape((), node.link, rate, 0.0, burst)
        yield made
    finally:
        for node in made:
            shutil.rmtree(_NAMESPACE_FILES / node.namespace, ignore_errors=True)
            _run("ip", "netns", "delete", node.namespace, check=False)
            _run("ip", "link", "delete", node.link, check=False)
        _run("ip", "link", "delete", bridge, check=False)
        signal.signal(signal.SIGTERM, before)


def _connect(node: Node, bridge: str) -> None:
    _run("ip", "netns", "add", node.namespace)
    peer = ("peer", "name", INTERFACE, "netns", node.namespace)
    _run("ip", "link", "add", node.link, "type", "veth", *peer)
    _run("ip", "link", "set", node.link, "master", bridge, "up")
    inside = ("ip", "-n", node.namespace)
    _run(*inside, "address", "add", f"{node.address}/24", "dev", INTERFACE)
    _run(*inside, "link", "set", INTERFACE, "up")
    _run(*inside, "link", "set", "lo", "up")
    # `ip netns exec` mounts it over /etc/hosts. Horovod 0.28.1 forgets HOROVOD_GLOO_IFACE for
    # process sets, the global one too, and connects them at the address of the machine's name.
    hosts = _NAMESPACE_FILES / node.namespace / "hosts"
    hosts.parent.mkdir(parents=True)
    hosts.write_text(f"127.0.0.1 localhost\n{node.address} {socket.gethostname()}\n")


def _shape(
    inside: Sequence[str], device: str, rate: str | None, latency_ms: float, burst: str
) -> None:
    add = (*inside, "tc", "qdisc", "add", "dev", device)
    if latency_ms:
        limits = ["delay", f"{latency_ms}ms", "limit", "100000"]
        limits += ["rate", rate] if rate else []
        try:
            _run(*add, "root", "netem", *limits)
        except NetworkError as error:
            raise NetworkError(f"latency needs the kernel module sch_netem: {error}") from error
    elif rate is not None:
        _run(*add, "root", "tbf", "rate", rate, "burst", burst, "latency", "400ms")


def _run(*command: str, check: bool = True) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NetworkError(f"{command[0]} not found (Debian's package iproute2)") from error
    if check and done.returncode != 0:
        raise NetworkError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")


def run_ranks(
    nodes: Sequence[Node],
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 540.0,
) -> None:
    """Runs a command as one Horovod rank (Gloo) in every node and waits for all.

    Args:
        nodes: of one network; rank r runs in the r-th.
        command: what each rank runs.
        log: folder for what each writes, in `<rank>.log`.
        env: variables besides this process's own.
        timeout: seconds.

    Raises:
        RuntimeError: a rank failed; the others are ended, and the message carries its last words.
        TimeoutError: it took longer.
    """
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http.http_server import RendezvousServer

    log.mkdir(parents=True, exist_ok=True)
    count = len(nodes)
    server = RendezvousServer(verbose=0)
    port = server.start()
    hosts = ",".join(f"{node.address}:1" for node in nodes)
    server.init(get_host_assignments(parse_hosts(hosts), count))
    shared = {
        **os.environ,
        **(env or {}),
        "HOROVOD_SIZE": str(count),
        "HOROVOD_LOCAL_RANK": "0",
        "HOROVOD_LOCAL_SIZE": "1",
        "HOROVOD_CROSS_SIZE": str(count),
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": nodes[0].gateway,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_IFACE": INTERFACE,
        "PYTHONUNBUFFERED": "1",
    }
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank, node in enumerate(nodes):
            own = {
                "HOROVOD_RANK": str(rank),
                "HOROVOD_CROSS_RANK": str(rank),
                "HOROVOD_HOSTNAME": node.address,
            }
            with (log / f"{rank}.log").open("wb") as output:
                ranks.append(
                    subprocess.Popen(
                        node.command(command),
                        env={**shared, **own},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        _wait(ranks, log, timeout)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        server.stop()


def _wait(ranks: Sequence["subprocess.Popen[bytes]"], log: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in ranks):
        if time.monotonic() > end:
            raise TimeoutError(f"The ranks took longer than {timeout:g} seconds; see {log}.")
        if any(process.poll() for process in ranks):
            time.sleep(1.0)  # the first to fail is often not the one that knows why
            break
        time.sleep(0.05)
    for rank, process in enumerate(ranks):
        if process.poll():
            words = (log / f"{rank}.log").read_text(errors="replace")[-_TAIL_CHARACTERS:]
            raise RuntimeError(f"Rank {rank} failed (exit code {process.returncode}):\n{words}")


def own_counters() -> Counters:
    """Reads the counters of this process's own eth0: for a rank inside of a namespace."""
    import psutil

    found = psutil.net_io_counters(pernic=True)[INTERFACE]
    return Counters(found.bytes_sent, found.bytes_recv, found.packets_sent, found.packets_recv)


def measure_rate(nodes: Sequence[Node], megabytes: int = 20) -> float:
    """Sends bytes from the first node to the second and returns the rate, bits per second."""
    receiver = (
        "import socket, time\n"
        f"s = socket.create_server(('{nodes[1].address}', 5001)); print('up', flush=True)\n"
        "c, _ = s.accept(); n = len(c.recv(1)); t = time.perf_counter()\n"
        "while (k := len(c.recv(1 << 20))): n += k\n"
        "print(8 * n / (time.perf_counter() - t))\n"
    )
    sender = (
        "import socket\n"
        f"s = socket.create_connection(('{nodes[1].address}', 5001))\n"
        f"s.sendall(bytes({megabytes * 10**6}))\n"
    )
    python = shutil.which("python3") or "python3"
    with subprocess.Popen(
        nodes[1].command([python, "-c", receiver]), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None  # noqa: S101 - it was asked for
        process.stdout.readline()
        subprocess.run(nodes[0].command([python, "-c", sender]), check=True)
        return float(process.stdout.read())
