"""A TCP relay that holds what goes to the server after so many bytes: the way to act in the middle of a send.

Answers of the server, and the end of either side, pass at all times. Not here: damage, delay or loss.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.agents.harness import BOUND_S

CHUNK_BYTES = 64 * 1024


class Relay:
    """Listens at `address`, connects on to `port` of loopback; use through `relay`."""

    def __init__(self, port: int, hold_after: int) -> None:
        self._server_port = port
        self._room = hold_after
        self._changed = threading.Condition()
        self._holding = False
        self._released = False
        self._sockets: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"

    def wait_until_holding(self) -> None:
        """The bytes have passed, and more have come that must wait."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._holding, BOUND_S), "it was all too little"

    def release(self) -> None:
        """Let everything pass from now on."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def accept(self) -> None:
        with suppress(OSError):  # closed: the test is over
            while True:
                client, _ = self._listening.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._server_port))
                except OSError:
                    client.close()
                    continue
                self._sockets += (client, server)
                for start, end, held in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pass_on, args=(start, end, held), daemon=True).start()

    def _pass_on(self, start: socket.socket, end: socket.socket, held: bool) -> None:
        with suppress(OSError):
            while got := start.recv(CHUNK_BYTES):
                if held:
                    self._charge(len(got))
                end.sendall(got)
        for side in (start, end):  # whoever is gone, the other shall know at once
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def _charge(self, size: int) -> None:
        with self._changed:
            self._room -= size
            if self._room < 0 and not self._released:
                self._holding = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._released)

    def close(self) -> None:
        self.release()
        for each in (self._listening, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@contextmanager
def relay(port: int, hold_after: int) -> Iterator[Relay]:
    """A relay to a port of loopback, for the time of a block."""
    made = Relay(port, hold_after)
    thread = threading.Thread(target=made.accept, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.close()
        thread.join(BOUND_S)
