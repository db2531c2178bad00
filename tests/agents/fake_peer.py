"""Peers of other releases and other manners: the wire format by hand, over real TLS on loopback."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from protocol.connection import Connection, Event
from protocol.state import Role
from replicator import certificates
from replicator.certificates import Credentials, ServerKind
from replicator.clock import Clock
from replicator.files import Files
from replicator.identity import Identities, Identity
from replicator.private_directory import PrivateDirectory
from replicator.transport.tls import client_context, server_context
from tests.agents.harness import BOUND_S
from tests.replicator.trust import Installation

Play = Callable[[ssl.SSLSocket], None]


class Talk:
    """A protocol connection over a blocking TLS socket."""

    def __init__(self, sock: ssl.SSLSocket, role: Role) -> None:
        self.connection = Connection(role, time.monotonic())
        self._sock = sock

    def hear(self) -> Event:
        """The next thing that the peer says; OSError: it left.

        A sender greets on several streams at once, and leaves all of them once one was refused.
        """
        while not (events := self.connection.events_received()):
            got = self._sock.recv(65536)
            if not got:
                raise ConnectionResetError("the peer said nothing more")
            self.connection.receive_data(got, time.monotonic())
        assert len(events) == 1, events
        return events[0]

    def flush(self) -> None:
        """Send what was queued."""
        for piece in self.connection.data_to_send():
            self._sock.sendall(piece)


@contextmanager
def fake_target(installation: Installation, play: Play) -> Iterator[str]:
    """A server with a certificate of the installation, at the address given; `play` gets each connection."""
    own = installation.authority.own_credentials(ServerKind.MASTER_TARGET, Clock().now())
    context = server_context(own, installation.authority.certificate)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):  # closed: the test is over
                while True:
                    sock, _ = listening.accept()
                    sock.settimeout(BOUND_S)
                    with suppress(OSError), context.wrap_socket(sock, server_side=True) as tls:
                        play(tls)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(BOUND_S)


def joined(installation: Installation, address: str, state: Path) -> Identity:
    """An identity of the installation, put into a state directory as if it had joined at `address`."""
    key, now = certificates.new_key(), Clock().now()
    certificate = installation.authority.issue(
        key.public_key(), certificates.new_id(ServerKind.PROCESS_SERVER), now
    )
    identity = Identity(
        installation.authority.certificate,
        installation.server,
        (address,),
        Credentials(certificate, certificates.key_to_pem(key)),
    )
    Identities(PrivateDirectory(Files(), state)).store(identity)
    return identity


@contextmanager
def fake_sender(state: Path, address: str) -> Iterator[Talk]:
    """A data connection to a real master target, with the identity that a state directory has for it."""
    identity = Identities(PrivateDirectory(Files(), state)).find_by_address(address)
    assert identity is not None
    context = client_context(identity.credentials, identity.authority)
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), BOUND_S) as sock,
        context.wrap_socket(sock, server_hostname=certificates.host_name(identity.server)) as tls,
    ):
        yield Talk(tls, Role.SENDER)
