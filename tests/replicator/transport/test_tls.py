"""Over a real loopback connection: whom the contexts accept and whom they refuse."""

import asyncio
import os
import socket
import ssl
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from replicator import certificates
from replicator.authority import Authority
from replicator.certificates import Credentials, ServerKind
from replicator.transport import tls
from tests.replicator.trust import Installation, SetClock


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a handshake and one answer: what each side saw, or None where all went well there."""

    server: Exception | None
    client: Exception | None
    client_certificate: bytes | None = None
    alpn: str | None = None
    version: str | None = None
    resumable: bool = False


async def meet(server: ssl.SSLContext, client: ssl.SSLContext, server_name: str = "") -> Outcome:
    """Shake hands over TCP on loopback; only the server's answer, "ok", proves acceptance."""
    loop = asyncio.get_running_loop()
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    calling = socket.socket()
    calling.setblocking(False)
    (accepted, _), _ = await asyncio.gather(
        loop.sock_accept(listening), loop.sock_connect(calling, listening.getsockname())
    )
    listening.close()
    seen: dict = {}

    async def serve() -> None:
        gone = loop.create_future()

        class Protocol(asyncio.Protocol):
            def connection_lost(self, error: Exception | None) -> None:
                gone.set_result(error)

        try:
            transport, _ = await loop.connect_accepted_socket(Protocol, accepted, ssl=server)
        except OSError:
            accepted.close()
            raise
        found = transport.get_extra_info("ssl_object")
        seen["client_certificate"] = found.getpeercert(binary_form=True)
        seen["alpn"], seen["version"] = found.selected_alpn_protocol(), found.version()
        transport.write(b"ok")
        transport.close()
        await gone

    async def call() -> None:
        try:
            reader, writer = await asyncio.open_connection(
                sock=calling, ssl=client, server_hostname=server_name
            )
        except OSError:
            calling.close()
            raise
        try:
            answer = await reader.read()
            session = writer.get_extra_info("ssl_object").session
            seen["resumable"] = bool(session and session.has_ticket)
        finally:
            writer.close()
        assert answer in (b"ok", b"")
        if not answer:
            raise ConnectionResetError("closed without an answer")

    on_server, on_client = await asyncio.gather(serve(), call(), return_exceptions=True)
    assert on_server is None or isinstance(on_server, OSError)
    assert on_client is None or isinstance(on_client, OSError)
    return Outcome(on_server, on_client, **seen)


def credentials(
    authority: Authority, kind: ServerKind, clock: SetClock, server_id: str | None = None
) -> Credentials:
    key = certificates.new_key()
    server_id = server_id or certificates.new_id(kind)
    return Credentials(
        authority.issue(key.public_key(), server_id, clock.now()), certificates.key_to_pem(key)
    )


@dataclass(frozen=True, slots=True)
class Site:
    """An installation, its server's context, and what makes peers for it."""

    clock: SetClock
    authority: Authority
    server_id: str
    server: ssl.SSLContext

    def client(self, given: Credentials) -> ssl.SSLContext:
        return tls.client_context(given, self.authority.certificate)

    @property
    def name(self) -> str:
        return certificates.host_name(self.server_id)


def site(path: Path) -> Site:
    clock = SetClock()
    installation = Installation(path, clock)
    own = installation.authority.own_credentials(ServerKind.MASTER_TARGET, clock.now())
    context = tls.server_context(own, installation.authority.certificate)
    return Site(clock, installation.authority, installation.server, context)


@pytest.fixture
def here(tmp_path: Path) -> Site:
    return site(tmp_path / "here")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Site:
    return site(tmp_path / "elsewhere")


def reason(error: Exception | None) -> str:
    assert isinstance(error, ssl.SSLError), repr(error)
    return error.reason


async def test_both_sides_of_one_installation_accept_each_other(here: Site) -> None:
    own = credentials(here.authority, ServerKind.PROCESS_SERVER, here.clock)
    outcome = await meet(here.server, here.client(own), here.name)
    assert (outcome.server, outcome.client) == (None, None)
    assert outcome.client_certificate == own.certificate
    assert (outcome.alpn, outcome.version) == ("replicator/1", "TLSv1.3")
    assert not outcome.resumable


async def test_a_peer_without_a_certificate_shakes_hands_and_has_none(here: Site) -> None:
    for context in (tls.joining_context(None), tls.joining_context(here.authority.certificate)):
        outcome = await meet(here.server, context)
        assert (outcome.server, outcome.client) == (None, None)
        assert outcome.client_certificate is None
        assert outcome.alpn == "replicator-join/1"


async def test_tls_1_2_is_refused_by_the_server(here: Site) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    outcome = await meet(here.server, old)
    assert reason(outcome.server) == "UNSUPPORTED_PROTOCOL"
    assert outcome.client is not None


async def test_tls_1_2_is_refused_by_the_client(here: Site) -> None:
    here.server.minimum_version = ssl.TLSVersion.TLSv1_2
    here.server.maximum_version = ssl.TLSVersion.TLSv1_2
    outcome = await meet(here.server, tls.joining_context(None))
    assert outcome.client is not None and outcome.server is not None


async def test_a_client_of_another_installation_is_refused(here: Site, elsewhere: Site) -> None:
    foreign = credentials(elsewhere.authority, ServerKind.PROCESS_SERVER, elsewhere.clock)
    outcome = await meet(here.server, here.client(foreign), here.name)
    assert reason(outcome.server) == "CERTIFICATE_VERIFY_FAILED"
    assert outcome.client is not None  # it appeared to connect; only the missing answer tells


@pytest.mark.parametrize("days", [-8, 8], ids=["expired", "not yet valid"])
async def test_a_client_certificate_out_of_its_time_is_refused(here: Site, days: int) -> None:
    here.clock.advance(timedelta(days=days))
    old = credentials(here.authority, ServerKind.PROCESS_SERVER, here.clock)
    outcome = await meet(here.server, here.client(old), here.name)
    assert reason(outcome.server) == "CERTIFICATE_VERIFY_FAILED"
    assert outcome.client is not None


async def test_a_server_of_another_installation_is_refused(here: Site, elsewhere: Site) -> None:
    own = credentials(here.authority, ServerKind.PROCESS_SERVER, here.clock)
    for context in (here.client(own), tls.joining_context(here.authority.certificate)):
        outcome = await meet(elsewhere.server, context, here.name)
        assert isinstance(outcome.client, ssl.SSLCertVerificationError)


async def test_a_server_with_another_id_is_refused(here: Site) -> None:
    own = credentials(here.authority, ServerKind.PROCESS_SERVER, here.clock)
    other = certificates.host_name(certificates.new_id(ServerKind.MASTER_TARGET))
    outcome = await meet(here.server, here.client(own), other)
    assert isinstance(outcome.client, ssl.SSLCertVerificationError)
    assert "Hostname mismatch" in outcome.client.verify_message


async def test_an_expired_server_is_refused(here: Site) -> None:
    own = credentials(here.authority, ServerKind.PROCESS_SERVER, here.clock)
    here.clock.advance(timedelta(days=-8))
    old = credentials(here.authority, ServerKind.MASTER_TARGET, here.clock, here.server_id)
    server = tls.server_context(old, here.authority.certificate)
    for context in (here.client(own), tls.joining_context(here.authority.certificate)):
        outcome = await meet(server, context, here.name)
        assert isinstance(outcome.client, ssl.SSLCertVerificationError)
        assert "expired" in outcome.client.verify_message


async def test_a_process_server_cannot_pose_as_a_server(here: Site) -> None:
    stolen = credentials(here.authority, ServerKind.PROCESS_SERVER, here.clock)
    own = credentials(here.authority, ServerKind.PROCESS_SERVER, here.clock)
    posing = tls.server_context(stolen, here.authority.certificate)
    posing_id = certificates.id_of(certificates.from_der(stolen.certificate))
    for context in (here.client(own), tls.joining_context(here.authority.certificate)):
        outcome = await meet(posing, context, certificates.host_name(posing_id))
        assert isinstance(outcome.client, ssl.SSLCertVerificationError), outcome
        assert outcome.client.verify_message.startswith("unsuit"), outcome.client


async def test_the_authority_is_no_issuer_of_issuers(here: Site) -> None:
    """A certificate signed by a server's own key, chained to it, is not taken."""
    key = certificates.key_from_pem(
        here.authority.own_credentials(ServerKind.MASTER_TARGET, here.clock.now()).key
    )
    middle = certificates.from_der(here.authority.issue(key.public_key(), here.server_id, here.clock.now()))
    leaf_key = certificates.new_key()
    leaf = certificates.issue(middle, key, leaf_key.public_key(), here.server_id, here.clock.now())
    server = tls.server_context(
        Credentials(certificates.to_der(leaf), certificates.key_to_pem(leaf_key)), here.authority.certificate
    )
    chain = b"".join(
        ssl.DER_cert_to_PEM_cert(certificates.to_der(found)).encode() for found in (leaf, middle)
    )
    with tls._in_memory(certificates.key_to_pem(leaf_key) + chain) as path:
        server.load_cert_chain(path)
    outcome = await meet(server, tls.joining_context(here.authority.certificate))
    assert isinstance(outcome.client, ssl.SSLCertVerificationError)


async def test_an_unknown_conversation_handshakes_and_has_no_name(here: Site) -> None:
    """OpenSSL does not refuse it: the accepting side has to look."""
    other = tls.joining_context(None)
    other.set_alpn_protocols(["h2"])
    outcome = await meet(here.server, other)
    assert (outcome.server, outcome.alpn) == (None, None)


def test_a_key_that_does_not_fit_its_certificate_is_refused(here: Site) -> None:
    own = credentials(here.authority, ServerKind.MASTER_TARGET, here.clock)
    mixed = Credentials(own.certificate, certificates.key_to_pem(certificates.new_key()))
    with pytest.raises(ssl.SSLError, match="KEY_VALUES_MISMATCH"):
        tls.server_context(mixed, here.authority.certificate)


def test_keys_reach_tls_without_touching_a_disk_and_are_gone_afterwards() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with tls._in_memory(b"secret") as path:
        assert Path(path).read_bytes() == b"secret"
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert os.readlink(path).startswith("/memfd:")
    assert len(os.listdir("/proc/self/fd")) == before
