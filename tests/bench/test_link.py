"""The line between two namespaces, as it is: what goes in comes out, and nothing of it stays behind."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.link import Link, LinkSpec, link
from tests.house.tree import ROOT

pytestmark = [pytest.mark.peer("ip", "nsenter", "unshare")]

SIZE = 1 << 20
BOUND_S = 30
# One end sends what the other gave it back; both print the hash of what came.
SERVER = """
import hashlib, socket, sys
with socket.create_server(("", 5000)) as listener:
    print("listening", flush=True)
    connection, _ = listener.accept()
with connection:
    data = b"".join(iter(lambda: connection.recv(65536), b""))
    connection.sendall(data)
print(hashlib.sha256(data).hexdigest())
"""
CLIENT = """
import hashlib, os, socket, sys
data = os.urandom(int(sys.argv[2]))
with socket.create_connection((sys.argv[1], 5000)) as connection:
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)
    back = b"".join(iter(lambda: connection.recv(65536), b""))
assert back == data
print(hashlib.sha256(data).hexdigest())
"""


def there_and_back(line: Link) -> None:
    """A megabyte through TCP, both ways, and compared."""
    server = subprocess.Popen(
        (*line.far.prefix, sys.executable, "-c", SERVER), stdout=subprocess.PIPE, text=True
    )
    with server:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        client = subprocess.run(
            (*line.near.prefix, sys.executable, "-c", CLIENT, line.far_address, str(SIZE)),
            capture_output=True, text=True, check=True, timeout=BOUND_S,
        )  # fmt: skip
        assert server.stdout.read() == client.stdout


def told_congestion(line: Link) -> tuple[str, str]:
    """The congestion control of a connection, at both ends."""
    asked = "connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(bytes(1)).decode()"
    server = SERVER.replace("print(hashlib.sha256(data).hexdigest())", "").replace(
        "with connection:", f"with connection:\n    print({asked}, flush=True)"
    )
    client = f"import socket, sys\nconnection = socket.create_connection((sys.argv[1], 5000))\nprint({asked})"
    with subprocess.Popen(
        (*line.far.prefix, sys.executable, "-c", server), stdout=subprocess.PIPE, text=True
    ) as far:
        assert far.stdout is not None
        assert far.stdout.readline() == "listening\n"
        near = line.near.run(sys.executable, "-c", client, line.far_address)
        return near, far.stdout.read()


def devices() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def gone(pidfds: list[int]) -> bool:
    """Whether the processes that hold the namespaces end, and the devices with them."""
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], BOUND_S)[0], "a namespace is still held"
        os.close(pidfd)
    return not [name for name in devices() if name.startswith("line")]


def holders(line: Link) -> list[int]:
    return [os.pidfd_open(pid) for pid in line.pids]


@pytest.mark.parametrize(
    "spec",
    [LinkSpec(), LinkSpec(rate_bit_s=1e9, round_trip_s=0.002), LinkSpec(rate_bit_s=1e9, mtu=9000)],
    ids=["unlimited", "rate and delay", "large packets"],
)
def test_what_goes_in_comes_out(spec: LinkSpec) -> None:
    with link(spec) as line:
        there_and_back(line)
        counters = line.counters()
        assert counters.out.bytes > SIZE and counters.back.bytes > SIZE
        assert counters.out.packets > SIZE / spec.mtu  # segments, whatever the kernel handed over at once
        assert counters.out.lost == counters.back.lost == 0
        assert line.near.dropped(line.device) == 0


def test_what_is_lost_is_sent_again() -> None:
    with link(LinkSpec(rate_bit_s=1e9, round_trip_s=0.001, loss=0.02, seed=3)) as line:
        there_and_back(line)
        counters = line.counters()
        assert counters.out.lost > 0 and counters.back.lost > 0
        assert counters.out.bytes > SIZE * 1.01


def test_a_short_queue_drops() -> None:
    with link(LinkSpec(rate_bit_s=50e6, round_trip_s=0.02, queue_bytes=20_000)) as line:
        there_and_back(line)
        assert line.counters().out.dropped > 0


def test_the_congestion_control_asked_for_is_that_of_both_ends_only() -> None:
    names = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    default = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    before = default.read_text()
    for name in names:  # restricted ones, too
        with link(LinkSpec(congestion=name)) as line:
            assert told_congestion(line) == (f"{name}\n", f"{name}\n")
    assert default.read_text() == before


def test_two_lines_do_not_meet() -> None:
    with link(LinkSpec()) as one, link(LinkSpec()) as other:
        there_and_back(one)
        there_and_back(other)


def test_nothing_is_left_after_the_block_nor_after_an_error_in_it() -> None:
    before = devices()
    with pytest.raises(ZeroDivisionError), link(LinkSpec()) as line:
        pidfds = holders(line)
        raise ZeroDivisionError
    assert gone(pidfds) and devices() == before


def test_nothing_is_left_of_a_forwarder_that_is_killed() -> None:
    with link(LinkSpec()) as line:
        pidfds = holders(line)
        os.kill(line.forwarder_pid, signal.SIGKILL)
        assert gone(pidfds)
        with pytest.raises(BenchError, match="ended"):
            line.counters()


def test_nothing_is_left_when_who_asked_for_the_line_is_killed() -> None:
    script = (
        "import time\n"
        "from bench.link import LinkSpec, link\n"
        "with link(LinkSpec()) as line:\n"
        "    print(line.forwarder_pid, *line.pids, flush=True)\n"
        "    input()\n"
    )
    process = subprocess.Popen(
        (sys.executable, "-c", script), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        pidfds = [os.pidfd_open(int(pid)) for pid in process.stdout.readline().split()]
        process.kill()
        for pidfd in pidfds:
            assert select.select([pidfd], [], [], BOUND_S)[0]
            os.close(pidfd)


def test_what_cannot_be_made_is_said() -> None:
    with pytest.raises(BenchError, match="nonsense"), link(LinkSpec(congestion="nonsense")):
        pass


def test_the_shell_command_says_where_the_ends_are_and_ends_with_its_input() -> None:
    done = subprocess.run(
        (sys.executable, "-m", "bench.link", "--rate-mbit", "10"),
        cwd=ROOT, input="stats\n", capture_output=True, text=True, check=True, timeout=BOUND_S,
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    assert '"near_address"' in first and '"dropped": 0' in second
