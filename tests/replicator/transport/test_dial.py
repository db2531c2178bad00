"""Every way in which a call fails, over real sockets, and what addresses may look like."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from protocol.state import Role
from replicator.clock import Clock
from replicator.errors import LinkError, TrustError, UsageError
from replicator.transport import dial as dialling
from replicator.transport import tls
from replicator.transport.dial import Address, dial
from replicator.transport.stream import Stream
from tests.replicator.pipeline import Site, descriptors, ends, target, turns, until


async def called(address: Address, site: Site, name: str | None = None) -> Stream:
    server = site.process_server()
    return await dial(address, server.context, Role.SENDER, server_name=name or site.name, clock=Clock())


@asynccontextmanager
async def plain_server(answer: bytes) -> AsyncIterator[Address]:
    """Answers every connection with these bytes, or with nothing at all, and leaves it open."""
    writers = []

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(answer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "here")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.5", ("10.0.0.5", 9443)),
        ("10.0.0.5:80", ("10.0.0.5", 80)),
        ("mt.example.org:65535", ("mt.example.org", 65535)),
        ("mt_1", ("mt_1", 9443)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]", ("::1", 9443)),
        ("[::1]:443", ("::1", 443)),
        ("[fe80::1%eth0]:443", ("fe80::1%eth0", 443)),
        ("[::ffff:10.0.0.5]", ("::ffff:10.0.0.5", 9443)),
    ],
)
def test_an_address_is_taken_apart(text: str, expected: tuple[str, int]) -> None:
    address = Address.parse(text)
    assert address == expected
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":9443",
        "host:",
        "host:port",
        "host:-1",
        "host:65536",
        "host:٤٤٣",
        "host:4 4",
        "host:" + "9" * 5000,
        "::1",
        "fe80::1:443",
        "[::1",
        "::1]:443",
        "[]:443",
        "[::1]443",
        "[::1]:",
        "[host]:443",
        "ho[st]:443",
        "-v",
        "a b",
        "host/path",
        "https://host:443",
        "user@host",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Address.parse(text)
    assert caught.value.code == "usage.address" and caught.value.fix


def test_the_default_port_is_the_callers() -> None:
    assert Address.parse("host", 443) == ("host", 443)


async def test_a_call_that_is_taken_gives_a_stream(tmp_path: Path) -> None:
    async with target(tmp_path) as here:
        stream = await called(here.address, here.site)
        assert stream.alpn == tls.ALPN_DATA
        assert stream.peer_address == str(here.address)
        await stream.close()


async def test_nobody_listening_is_refused(site: Site) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with ends(LinkError, "link.refused"):
            await called(Address(*bound.getsockname()), site)


async def test_no_way_there_is_unreachable(site: Site) -> None:
    with ends(LinkError, "link.unreachable"):
        await called(Address("224.0.0.1", 9443), site)  # TCP has no way to a group address, on any machine


async def test_no_answer_to_the_call_is_unreachable(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialling, "CONNECT_S", 0.02)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as first:
        first.connect(full.getsockname())  # the queue is full now: further SYNs are dropped
        before = descriptors()
        with ends(LinkError, "link.unreachable") as caught:
            for _ in range(3):
                await called(Address(*full.getsockname()), site)
        assert "no answer" in caught.value.message
        assert descriptors() == before


@pytest.mark.parametrize("name", ["a" * 64, "fe80::1%nosuchlink"])
async def test_a_name_that_leads_nowhere_is_unreachable(site: Site, name: str) -> None:
    with ends(LinkError, "link.unreachable") as caught:
        await called(Address(name, 9443), site)
    assert name in caught.value.message


async def test_a_machine_without_that_address_family_is_unreachable(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_such_family(*_: object) -> socket.socket:
        raise OSError(97, "Address family not supported by protocol")

    with monkeypatch.context() as patched, ends(LinkError, "link.unreachable"):
        patched.setattr(socket, "socket", no_such_family)
        await called(Address("127.0.0.1", 9443), site)


async def test_a_server_without_tls_is_told(site: Site) -> None:
    async with plain_server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        with ends(LinkError, "link.tls"):
            await called(address, site)


async def test_a_server_that_does_not_shake_hands_is_told(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialling, "HANDSHAKE_S", 0.05)
    async with plain_server(b"") as address:
        before = descriptors()
        with ends(LinkError, "link.tls"):
            await called(address, site)
        await until(lambda: descriptors() <= before + 1)  # the server's end stays


async def test_another_installations_server_is_not_trusted(tmp_path: Path, site: Site) -> None:
    async with target(tmp_path / "there") as there:
        with ends(TrustError, "identity.server_not_trusted"):
            await called(there.address, site, there.site.name)


async def test_our_own_installations_other_server_is_not_trusted(tmp_path: Path) -> None:
    async with target(tmp_path) as here:
        with ends(TrustError, "identity.server_not_trusted"):
            await called(here.address, here.site, "mt-" + "0" * 32 + ".replicator.internal")


@pytest.mark.parametrize("stage", ["connecting", "shaking hands"])
async def test_a_call_that_is_given_up_leaves_no_descriptor(site: Site, stage: str) -> None:
    async def leaves_nothing(address: Address, reached: Callable[[], bool]) -> None:
        before = descriptors()
        task = asyncio.create_task(called(address, site))
        await until(reached)
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: descriptors() <= before)

    if stage == "connecting":
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as first:
            first.connect(full.getsockname())
            await leaves_nothing(Address(*full.getsockname()), lambda: True)
    else:
        with socket.create_server(("127.0.0.1", 0)) as listening:  # the kernel accepts, nobody answers
            await leaves_nothing(Address(*listening.getsockname()), lambda: True)
