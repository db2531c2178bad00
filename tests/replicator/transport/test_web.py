"""HTTP on our own door: which connections are for it, how long they may wait, and that nobody else does."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from protocol.messages import Bye
from protocol.state import Role
from replicator.certificates import ServerKind
from replicator.clock import Clock
from replicator.transport import tls
from replicator.transport import web as serving
from replicator.transport.accept import Acceptor, Handler
from replicator.transport.stream import Stream
from replicator.transport.web import WebServer
from tests.replicator.pipeline import HANGS_S, LOOPBACK, Peer, Site, call, descriptors, until, until_equal
from tests.replicator.web_client import WebClient, get, with_alpn, without_alpn

LARGE_BYTES = 32 << 20  # more than all buffers on the way together


class Port:
    """A door for data and for the web."""

    def __init__(self, path: Path, connections_max: int = 8) -> None:
        self.site = Site(path)
        own = self.site.authority.own_credentials(ServerKind.MASTER_TARGET, Clock().now())
        names = (tls.ALPN_DATA, tls.ALPN_HTTP)
        self.context = tls.server_context(own, self.site.authority.certificate, names)
        self.release = asyncio.Event()
        app = web.Application()
        app.router.add_get("/", self._hello)
        app.router.add_get("/held", self._held)
        app.router.add_get("/large", self._large)
        self.web = WebServer(app, connections_max)
        self.acceptor = Acceptor(
            lambda: self.context,
            {tls.ALPN_DATA: Handler(Role.RECEIVER, self._serve)},
            Clock(),
            web=self.web.protocol,
        )
        self.address = LOOPBACK

    async def start(self) -> None:
        await self.web.start()
        self.address = await self.acceptor.start(LOOPBACK)

    async def stop(self) -> None:
        await self.acceptor.stop()
        await self.web.stop()

    async def _hello(self, _: web.Request) -> web.Response:
        return web.Response(text="hello")

    async def _held(self, _: web.Request) -> web.Response:
        await self.release.wait()
        return web.Response(text="at last")

    async def _large(self, _: web.Request) -> web.Response:
        return web.Response(body=bytes(LARGE_BYTES))

    async def _serve(self, stream: Stream) -> None:
        await stream.expect(Bye)

    def nobody(self) -> ssl.SSLContext:
        return without_alpn(self.site.authority.certificate)

    async def client(self) -> WebClient:
        return await WebClient.dial(self.address, self.nobody(), self.site.name)

    async def peer(self) -> Peer:
        return await call(self.address, self.site.process_server().context, self.site.name)


@pytest.fixture
async def port(tmp_path: Path) -> AsyncIterator[Port]:
    made = Port(tmp_path)
    await made.start()
    async with asyncio.timeout(HANGS_S):
        yield made
    await made.stop()


async def leave(peer: Peer) -> None:
    peer.send(Bye())
    peer.close()
    await peer.ended()


# ------------------------------------------------------------------ which connections


@pytest.mark.parametrize("names", [(), ("http/1.1",), ("h2", "http/1.1")])
async def test_http_is_spoken_with_whom_asks_for_it_or_for_nothing(
    port: Port, names: tuple[str, ...]
) -> None:
    context = with_alpn(port.nobody(), *names) if names else port.nobody()
    answer = await get(port.address, context, port.site.name, "/")
    assert (answer.status, answer.body, answer.headers["server"]) == (200, b"hello", "replicator")


async def test_data_is_spoken_on_the_same_port(port: Port) -> None:
    client = await port.client()
    assert (await client.get("/")).status == 200
    await leave(await port.peer())
    assert (await client.get("/")).status == 200  # one connection serves many requests
    assert port.acceptor.counts.accepted == 2
    client.close()


async def test_what_is_said_at_once_is_heard(port: Port) -> None:
    """The request comes with the end of the handshake: nothing of it may reach anybody else."""
    for _ in range(20):
        client = await port.client()
        client.ask("/")
        assert (await client.answer()).body == b"hello"
        client.close()


# ------------------------------------------------------------------ deadlines and bounds


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: test\r\nX-A: a"])
async def test_headers_that_do_not_end_are_cut_off(
    port: Port, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "HEADERS_S", 0.05)
    client = await port.client()
    client.writer.write(said)
    async with asyncio.timeout(serving.IDLE_S / 3):  # or aiohttp's own end of an idle connection would do
        await client.closed()
    await until_equal(lambda: port.web.connections, 0)
    client.close()


async def test_five_seconds_is_what_headers_get() -> None:
    assert serving.HEADERS_S == 5.0


async def test_a_request_that_came_in_time_may_take_its_own(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "HEADERS_S", 0.05)
    held = await port.client()
    held.ask("/held")
    late = await port.client()
    await late.closed()  # so the deadline of the first is over, too
    port.release.set()
    assert (await held.answer()).body == b"at last"
    held.close()
    late.close()


async def test_headers_of_a_second_request_have_a_deadline_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "IDLE_S", 0.05)
    port = Port(tmp_path)
    await port.start()
    client = await port.client()
    assert (await client.get("/")).status == 200
    client.writer.write(b"GET / HTTP/1.1\r\nHost:")
    await client.closed()
    client.close()
    await port.stop()


async def test_there_are_only_so_many_connections(tmp_path: Path) -> None:
    port = Port(tmp_path, connections_max=2)
    await port.start()
    async with asyncio.timeout(HANGS_S):
        clients = [await port.client() for _ in range(2)]
        await until_equal(lambda: port.web.connections, 2)
        refused = await port.client()
        await refused.closed()
        assert port.web.over_budget == 1
        await leave(await port.peer())  # the data path has no part in it
        clients.pop().close()
        await until_equal(lambda: port.web.connections, 1)
        assert (await get(port.address, port.nobody(), port.site.name, "/")).status == 200
    clients.pop().close()
    refused.close()
    await port.stop()


async def test_headers_without_end_are_refused(port: Port) -> None:
    client = await port.client()
    client.writer.write(b"GET / HTTP/1.1\r\nX-A: " + b"a" * (2 * serving.HEADER_MAX_BYTES) + b"\r\n\r\n")
    assert (await client.answer()).status == 400
    client.close()


async def test_a_client_that_does_not_read_keeps_nobody_waiting(port: Port) -> None:
    slow = [await port.client() for _ in range(3)]
    for client in slow:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.ask("/large")
    for _ in range(5):
        assert (await get(port.address, port.nobody(), port.site.name, "/")).status == 200
        await leave(await port.peer())
    for client in slow:
        client.close()


# ------------------------------------------------------------------ end


@pytest.mark.parametrize("busy", [False, True])
async def test_stopping_leaves_nothing_behind(
    tmp_path: Path, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "STOP_S", 0.05)
    Site(tmp_path)  # makes the authority
    before, tasks = descriptors(), asyncio.all_tasks()
    port = Port(tmp_path)
    await port.start()
    client = await port.client()
    client.ask("/held" if busy else "/")
    if not busy:
        await client.answer()
    await until_equal(lambda: port.web.connections, 1)
    async with asyncio.timeout(HANGS_S):
        await port.stop()
        await client.closed()
    client.close()
    await until(lambda: descriptors() <= before and asyncio.all_tasks() - tasks == set())


async def test_a_connection_that_comes_while_it_stops_is_refused(port: Port) -> None:
    await port.web.stop()
    client = await port.client()
    await client.closed()
    client.close()
