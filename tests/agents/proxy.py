"""A TCP proxy that does to a line what lines do: resets, silence, slicing, damage; and counts what passes.

Counts and limits are of the bytes that were handed on to the server, over all connections. Not here: delay,
rate and loss of packets, which a proxy cannot make (`test_heal_network.py`).
"""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tests.agents.harness import BOUND_S

CHUNK_BYTES = 64 * 1024
NEVER = 1 << 62


class Proxy:
    """Listens at `address`, connects on to `port` of loopback; use through `proxy`."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._changed = threading.Condition()
        self._sockets: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._limit, self._silent, self._closed = NEVER, False, False
        self._slice_bytes = CHUNK_BYTES
        self._damage: dict[bool, int] = {}
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.passed = self.answered = 0

    def reset(self) -> float:
        """Break all connections off with RST; returns when, on the monotonic clock."""
        with self._changed:
            sockets, self._sockets = self._sockets, set()
        began = time.monotonic()
        for each in sockets:
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RD)  # wakes the thread that reads it; close() then sends the RST
            each.close()
        return began

    def black_hole(self) -> float:
        """Hand nothing on any more, in either direction, and keep it to yourself; returns when."""
        return self._set(True, NEVER)

    def heal(self) -> float:
        """Everything passes again."""
        return self._set(False, NEVER)

    def slice(self, size: int) -> None:
        """Hand on so many bytes at a time."""
        self._slice_bytes = size

    def damage(self, *, to_server: bool, times: int = 1) -> None:
        """Flip a bit in each of the next so many chunks."""
        with self._changed:
            self._damage[to_server] = times

    def hold_after(self, size: int) -> None:
        """Let pass exactly so many bytes to the server in all, then none until `heal`."""
        self._set(False, size)

    def _set(self, silent: bool, limit: int) -> float:
        with self._changed:
            self._silent, self._limit = silent, limit
            self._changed.notify_all()
        return time.monotonic()

    def wait_passed(self, size: int, ended: Callable[[], bool] = lambda: False) -> float:
        """Wait until so many bytes have passed in all, or `ended()`; returns when."""
        deadline = time.monotonic() + BOUND_S
        with self._changed:
            while self.passed < size and not ended():
                assert self._changed.wait(0.5) or time.monotonic() < deadline, self.passed
            return time.monotonic()

    def accept(self) -> None:
        with suppress(OSError):  # closed: the test is over
            while True:
                client, _ = self._listening.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._server_port))
                except OSError:
                    client.close()
                    continue
                with self._changed:
                    self._sockets |= {client, server}
                for start, end, to_server in ((client, server, True), (server, client, False)):
                    with suppress(
                        OSError
                    ):  # it was reset meanwhile: the next one shall be accepted all the same
                        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=self._pass_on, args=(start, end, to_server), daemon=True).start()

    def _pass_on(self, start: socket.socket, end: socket.socket, to_server: bool) -> None:
        with suppress(OSError):
            while got := start.recv(CHUNK_BYTES):
                view = memoryview(self._spoiled(got, to_server))
                while view:
                    size = self._admitted(min(len(view), self._slice_bytes), to_server)
                    end.sendall(view[:size])
                    view = view[size:]
        with self._changed:  # in a black hole nobody hears of an end either
            self._changed.wait_for(lambda: self._closed or not self._silent)
        for side in (start, end):  # whoever is gone, the other shall know
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def _admitted(self, size: int, to_server: bool) -> int:
        """How many of the next bytes may pass now; waits while none may."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or not (self._silent or (to_server and self.passed >= self._limit))
            )
            if to_server:
                size = min(size, self._limit - self.passed)
                self.passed += size
                self._changed.notify_all()
            else:
                self.answered += size
            return size

    def _spoiled(self, got: bytes, to_server: bool) -> bytes:
        with self._changed:
            if not self._damage.get(to_server):
                return got
            self._damage[to_server] -= 1
        middle = len(got) // 2
        return got[:middle] + bytes([got[middle] ^ 1]) + got[middle + 1 :]

    def close(self) -> None:
        with self._changed:
            self._closed = True
        self.heal()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self.reset()
        self._listening.close()


@contextmanager
def proxy(port: int) -> Iterator[Proxy]:
    made = Proxy(port)
    thread = threading.Thread(target=made.accept, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.close()
        thread.join(BOUND_S)
