"""TLS contexts: 1.3 only, both sides with certificates of the installation's own authority.

One port serves several conversations, told apart by ALPN. OpenSSL handshakes silently when the peers have no
ALPN name in common, and the server asks for a certificate without insisting (a joiner has none yet): the
accepting side checks both afterwards. Not here: connections (``dial.py``, ``accept.py``), what is in
certificates (``certificates.py``).

Cipher suites are left as they are: Python's ssl cannot choose among those of TLS 1.3.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from replicator.certificates import Credentials

ALPN_DATA = "replicator/1"
ALPN_JOIN = "replicator-join/1"
ALPN_HTTP = "http/1.1"


def server_context(
    credentials: Credentials, authority: bytes, alpn: Sequence[str] = (ALPN_DATA, ALPN_JOIN)
) -> ssl.SSLContext:
    """For accepting the conversations of these names. A peer's certificate must be the authority's (DER), for
    clients; none at all passes.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, alpn)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.num_tickets = 0  # resumption would skip the certificate: a revoked peer would come back
    context.load_verify_locations(cadata=authority)
    _load(context, credentials)
    return context


def client_context(credentials: Credentials, authority: bytes) -> ssl.SSLContext:
    """For the data conversation. The server's certificate must be the authority's (DER), for servers, and for
    the host name of the id that is dialled (``certificates.host_name``).
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, [ALPN_DATA])
    context.load_verify_locations(cadata=authority)
    _load(context, credentials)
    return context


def joining_context(authority: bytes | None) -> ssl.SSLContext:
    """For the join conversation, where this side shows no certificate.

    With None, for the first look: nothing is verified and nothing secret may be sent. With the authority
    (DER) that was found to be the pinned one, only a server with its certificate is accepted; its id is not
    known yet or checked by the caller.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, [ALPN_JOIN])
    context.check_hostname = False
    if authority is None:
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(cadata=authority)
    return context


def _context(protocol: int, alpn: Sequence[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on; ours hold it today
    context.set_alpn_protocols(alpn)
    return context


def _load(context: ssl.SSLContext, credentials: Credentials) -> None:
    with _in_memory(credentials.key + ssl.DER_cert_to_PEM_cert(credentials.certificate).encode()) as path:
        context.load_cert_chain(path)


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A path that reads as ``content``, with nothing on any disk: Python's ssl takes keys from files only."""
    with open(os.memfd_create("tls"), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"
