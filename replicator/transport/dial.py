"""The connecting side: from an address to a stream with TLS up."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Callable
from typing import NamedTuple, Self

from protocol.connection import Body, plain_allocate
from protocol.state import Role
from replicator.clock import Clock
from replicator.errors import LinkError, ReplicatorError, TrustError, UsageError
from replicator.transport.stream import Stream, tune

CONNECT_S = 10.0  # TCP: three SYNs
HANDSHAKE_S = 5.0
PORT = 9443
_ADDRESS = re.compile(
    r"(?:\[([0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?)\]|([A-Za-z0-9_][A-Za-z0-9_.-]*))(?::([0-9]{1,5}))?"
)


class Address(NamedTuple):
    """Where a daemon listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, default_port: int = PORT) -> Self:
        """``HOST``, ``HOST:PORT``, ``[IPV6]`` or ``[IPV6]:PORT``.

        Raises:
            UsageError: it is none of these.
        """
        found = _ADDRESS.fullmatch(text)
        number = int(found[3] or default_port) if found else -1
        if not found or number > 0xFFFF:
            raise UsageError(
                "usage.address",
                f"{text!r} is no address",
                cause="an address is HOST:PORT, or [HOST]:PORT for IPv6",
                fix=f"give for example 10.0.0.5:{default_port}",
            )
        return cls(found[1] or found[2], number)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


async def dial(
    address: Address,
    tls: ssl.SSLContext,
    role: Role,
    *,
    server_name: str | None,
    clock: Clock,
    allocate: Callable[[int, int], Body] = plain_allocate,
) -> Stream:
    """Connect, shake hands, return the stream. ``server_name`` is what the certificate must be for; None:
    any.

    Raises:
        LinkError: ``link.unreachable``, ``link.refused``, ``link.tls``: nobody there, or not for us now.
        TrustError: ``identity.server_not_trusted``: the server's certificate does not hold.
    """
    loop = asyncio.get_running_loop()
    sock = await _connect(address)
    stream = Stream(lambda _: role, clock, allocate)
    try:
        await loop.create_connection(
            lambda: stream,
            sock=sock,
            ssl=tls,
            server_hostname=server_name or "",
            ssl_handshake_timeout=HANDSHAKE_S,
        )
    except OSError as error:
        sock.close()
        raise _handshake_error(address, error) from None
    except BaseException:  # cancelled
        sock.close()
        raise
    return stream


async def _connect(address: Address) -> socket.socket:
    """A connected TCP socket: the first of the host's addresses that answers."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the second: a label that is too long for DNS
        raise LinkError(
            "link.unreachable",
            f"{address.host} cannot be resolved: {error}",
            cause="the name is wrong, or the name server does not answer",
            fix="check the name, or give the address itself",
        ) from None
    failure: Exception = OSError("no address")
    for family, kind, number, _, where in found:
        try:
            sock = socket.socket(family, kind, number)
        except OSError as error:  # no IPv6 here, or out of descriptors
            failure = error
            continue
        try:
            tune(sock)
            async with asyncio.timeout(CONNECT_S):
                await loop.sock_connect(sock, where)
        except (OSError, TimeoutError) as error:
            sock.close()
            failure = error
        except BaseException:  # cancelled: the socket is ours until it is returned
            sock.close()
            raise
        else:
            return sock
    raise _connect_error(address, failure)


def _connect_error(address: Address, error: Exception) -> ReplicatorError:
    if isinstance(error, ConnectionRefusedError):
        return LinkError(
            "link.refused",
            f"{address} refuses connections",
            cause="nothing listens there, or a firewall rejects",
            fix="start the master target, or correct the address",
        )
    return LinkError(
        "link.unreachable",
        f"{address} cannot be reached: {str(error) or 'no answer'}",
        cause="no route, a firewall that drops, or the machine is off",
        fix="check the route (VPN, ExpressRoute), firewalls and the address",
    )


def _handshake_error(address: Address, error: Exception) -> ReplicatorError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return TrustError(
            "identity.server_not_trusted",
            f"{address} is not the master target that we joined: {error.verify_message}",
            cause="another server answers there, it was installed anew, or a clock is wrong",
            fix="check the address and the clocks; if it was installed anew, join again with a new token",
        )
    return LinkError(
        "link.tls",
        f"TLS handshake with {address} failed: {str(error) or 'no answer in time'}",
        cause="what listens there does not speak TLS 1.3, is overloaded, or the line broke",
        fix="check the address and port, and try again",
    )
