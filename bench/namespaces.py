"""Network namespaces without names: each lives as long as a small process that holds it, so that nothing can
be left behind, not even by kill -9.

The holder waits for the end of its standard input, which comes when whoever made it ends. Without the right
to make namespaces there is ``HostNetwork``: everybody's loopback.
"""

from __future__ import annotations

import os
import re
import select
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from bench.errors import BenchError

START_S = 10.0
_LISTENS = "0A"
_COUNTER = re.compile(r"counter (\w+) \{\s*packets \d+ bytes (\d+)")


class Network:
    """A network stack in which commands run, seen through /proc of a process that is in it.

    Attributes:
        prefix: put before a command, makes it run there; the command's process is the one that is started.
        own: nobody else's traffic is in it.
    """

    def __init__(self, pid: int | None, prefix: tuple[str, ...]) -> None:
        self.prefix = prefix
        self.own = pid is not None
        self._proc = Path("/proc") / ("self" if pid is None else str(pid)) / "net"

    def run(self, *command: str) -> str:
        """Run a short command there; gives what it prints.

        Raises:
            BenchError: it failed.
        """
        done = subprocess.run((*self.prefix, *command), capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        return done.stdout

    def listens(self, port: int) -> bool:
        """Whether something listens on a TCP port: found without connecting, which some would take for a
        client.
        """
        suffix = f":{port:04X}"
        for table in ("tcp", "tcp6"):
            with suppress(FileNotFoundError):  # no IPv6
                for line in (self._proc / table).read_text().splitlines()[1:]:
                    words = line.split()
                    if words[1].endswith(suffix) and words[3] == _LISTENS:
                        return True
        return False

    def count_port(self, port: int) -> Callable[[], tuple[int, int]]:
        """Have the bytes to and from a TCP port counted, headers included; gives what reads them."""
        table = f"""table inet bench {{
            counter to {{ }}
            counter from {{ }}
            chain sent {{
                type filter hook output priority 0
                tcp dport {port} counter name to
                tcp sport {port} counter name from
            }}
        }}"""
        self.run("nft", table)

        def counted() -> tuple[int, int]:
            found = dict(_COUNTER.findall(self.run("nft", "list", "table", "inet", "bench")))
            return int(found["to"]), int(found["from"])

        return counted

    def sent_bytes(self, device: str) -> int:
        """What a device has sent so far. On ``lo`` that is both directions, each packet once."""
        return int(self._device(device)[8])

    def dropped(self, device: str) -> int:
        """Packets that a device dropped on their way out."""
        return int(self._device(device)[11])

    def _device(self, name: str) -> list[str]:
        for line in (self._proc / "dev").read_text().splitlines():
            device, colon, counters = line.partition(":")
            if colon and device.strip() == name:
                return counters.split()
        raise BenchError(f"there is no network device {name}")


class Namespace(Network):
    """A new network namespace with its loopback up; a context manager.

    Attributes:
        pid: of the process that holds it.

    Raises:
        BenchError: it cannot be made (it takes root, and util-linux).
    """

    def __init__(self) -> None:
        command = (
            "unshare",
            "--net",
            "--",
            "sh",
            "-c",
            "ip link set lo up && echo up && exec cat >/dev/null",
        )
        try:
            self._holder = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise BenchError(f"no network namespace can be made: {error}") from None
        assert self._holder.stdout is not None
        told = b""
        if select.select([self._holder.stdout], [], [], START_S)[0]:
            told = os.read(self._holder.stdout.fileno(), 16)
        if not told:
            self._holder.kill()
            _, said = self._holder.communicate()
            raise BenchError(f"no network namespace can be made: {said.decode(errors='replace').strip()}")
        self.pid = self._holder.pid
        super().__init__(self.pid, ("nsenter", f"--net=/proc/{self.pid}/ns/net", "--"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.communicate()


class HostNetwork(Network):
    """The network stack that we are in."""

    def __init__(self) -> None:
        super().__init__(None, ())


def free_port() -> int:
    """A TCP port that is free on our loopback, most likely for a while."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
