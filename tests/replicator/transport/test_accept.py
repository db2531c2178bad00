"""The door: who may come in at once, what is counted, and that nothing stays behind."""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from protocol.connection import End
from protocol.messages import Bye, Hello, Retry
from protocol.state import Role
from replicator.clock import Clock
from replicator.errors import SpaceError, TargetError
from replicator.transport import accept as accepting
from replicator.transport import stream as streaming
from replicator.transport import tls
from replicator.transport.accept import HANDSHAKES_PER_SOURCE_MAX, Acceptor, Handler
from replicator.transport.dial import Address
from replicator.transport.stream import Stream
from tests.replicator.pipeline import (
    HANGS_S,
    LOOPBACK,
    Peer,
    Reset,
    Site,
    call,
    descriptors,
    ends,
    turns,
    until,
    until_equal,
)


class Door:
    """An acceptor whose handler is the test's."""

    def __init__(self, path: Path) -> None:
        self.site = Site(path)
        self.serve: Callable[[Stream], Awaitable[None]] = self.until_goodbye
        self.served: list[Stream] = []
        self.acceptor = Acceptor(self.context, {tls.ALPN_DATA: Handler(Role.RECEIVER, self._serve)}, Clock())
        self.address = LOOPBACK

    def context(self) -> ssl.SSLContext:
        return self.site.context

    async def _serve(self, stream: Stream) -> None:
        self.served.append(stream)
        await self.serve(stream)

    async def until_goodbye(self, stream: Stream) -> None:
        await stream.expect(Bye)

    async def call(self, source: str = "127.0.0.1") -> Peer:
        return await call(self.address, self.site.process_server().context, self.site.name, source)

    def knock(self, source: str = "127.0.0.1") -> socket.socket:
        """TCP, and then nothing."""
        return socket.create_connection(self.address, source_address=(source, 0))


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Door]:
    door = Door(path)
    door.address = await door.acceptor.start(LOOPBACK)
    try:
        async with asyncio.timeout(HANGS_S):
            yield door
    finally:
        await door.acceptor.stop()


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    made = Door(tmp_path)
    made.address = await made.acceptor.start(LOOPBACK)
    yield made
    await made.acceptor.stop()


async def closed_by_the_door(knock: socket.socket) -> None:
    knock.setblocking(False)
    with suppress(ConnectionResetError):
        assert await asyncio.get_running_loop().sock_recv(knock, 1) == b""


async def leave(*peers: Peer) -> None:
    for peer in peers:
        peer.send(Bye())
        peer.close()
        await peer.ended()


# ------------------------------------------------------------------ budgets


async def test_one_source_cannot_hold_more_handshakes_than_its_budget(door: Door) -> None:
    knocks = [door.knock() for _ in range(HANDSHAKES_PER_SOURCE_MAX + 3)]
    for knock in knocks[HANDSHAKES_PER_SOURCE_MAX:]:
        await closed_by_the_door(knock)
    assert door.acceptor.counts.over_budget == 3
    other = await door.call("127.0.0.2")  # another source is served while this one holds its budget
    knocks.pop().close()
    knocks.pop(0).close()
    await until(lambda: bool(door.acceptor.counts.failed))
    same = await door.call()  # and this one again, as soon as a handshake of it has ended
    await leave(other, same)
    assert door.acceptor.counts.accepted == 2
    for knock in knocks:
        knock.close()


async def test_all_sources_together_have_a_budget(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepting, "HANDSHAKES_MAX", 4)
    knocks = [door.knock(f"127.0.0.{number}") for number in range(2, 6)]
    late = door.knock("127.0.0.9")
    await closed_by_the_door(late)
    late.close()
    assert door.acceptor.counts.over_budget == 1
    for knock in knocks:
        knock.close()
    await until(lambda: door.acceptor.counts.failed.total() == 4)
    await leave(await door.call("127.0.0.9"))


async def test_streams_that_are_up_cost_no_handshake_budget(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "HANDSHAKES_PER_SOURCE_MAX", 1)
    peers = []
    for number in range(1, 4):
        peers.append(await door.call())
        await until_equal(lambda: door.acceptor.counts.accepted, number)
    await leave(*peers)


# ------------------------------------------------------------------ failed handshakes


async def test_failed_handshakes_are_counted_with_their_reason(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    counts = door.acceptor.counts

    plain = door.knock()
    plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
    await until(lambda: counts.failed["HTTP_REQUEST"] == 1)
    plain.close()

    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(OSError):
        await call(door.address, old, door.site.name)
    await until(lambda: counts.failed["UNSUPPORTED_PROTOCOL"] == 1)

    foreign = tls.client_context(
        Site(tmp_path / "elsewhere").credentials("ps-" + "0" * 32), door.site.authority.certificate
    )
    peer = await call(door.address, foreign, door.site.name)  # seems to be connected
    assert isinstance(await peer.ended(), End | Reset)
    await until(lambda: counts.failed["CERTIFICATE_VERIFY_FAILED"] == 1)
    peer.close()

    door.knock().close()
    await until(lambda: counts.failed["ConnectionResetError"] == 1)

    monkeypatch.setattr(accepting, "HANDSHAKE_S", 0.02)
    idle = door.knock()
    await until(lambda: counts.failed["ConnectionAbortedError"] == 1)
    await closed_by_the_door(idle)
    idle.close()

    assert counts.failed.total() == 5 and counts.accepted == 0
    assert all(f"127.0.0.1 failed: {reason}" in caplog.text for reason in counts.failed)


async def test_an_unknown_conversation_is_closed_and_counted(door: Door) -> None:
    for alpn in (["h2"], None):
        context = tls.joining_context(door.site.authority.certificate)
        if alpn:
            context.set_alpn_protocols(alpn)
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        peer = await call(door.address, context, door.site.name)
        peer.connection.send(Hello())
        assert isinstance(await peer.receive(), End | Reset)
        peer.writer.transport.abort()
    assert door.acceptor.counts.failed == {"unknown ALPN name": 2}
    assert door.served == []


async def test_a_context_that_cannot_be_made_ends_one_connection_only(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that cannot be renewed, for example."""

    def fails() -> ssl.SSLContext:
        raise ssl.SSLError(1, "no such key")

    with monkeypatch.context() as patched:
        patched.setattr(door.acceptor, "_tls", fails)
        knock = door.knock()
        await closed_by_the_door(knock)
        knock.close()
        await until(lambda: door.acceptor.counts.failed == {"SSLError": 1})
    await leave(await door.call())


async def test_running_out_of_descriptors_does_not_end_the_door(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    await leave(await door.call())
    with socket.socket() as sock:
        sock.setblocking(False)
        real = asyncio.get_running_loop().sock_accept
        failing = [OSError(errno.EMFILE, "too many"), OSError(errno.ECONNABORTED, "gone")]

        async def sock_accept(listening: socket.socket) -> tuple[socket.socket, object]:
            if failing:
                raise failing.pop()
            return await real(listening)

        class Loop:
            def __getattr__(self, name: str) -> object:
                return sock_accept if name == "sock_accept" else getattr(loop, name)

        loop = asyncio.get_running_loop()
        other = Door(Path(door.site.installation.directory.path) / "other")
        with monkeypatch.context() as patched:
            patched.setattr(asyncio, "get_running_loop", Loop)
            other.address = await other.acceptor.start(LOOPBACK)
            await until(lambda: other.acceptor.counts.failed.total() == 2)
        await leave(await other.call())
        await other.acceptor.stop()
        assert other.acceptor.counts.failed == {"EMFILE": 1, "ECONNABORTED": 1}


# ------------------------------------------------------------------ handlers


async def test_what_a_handler_raises_is_told_to_the_peer(door: Door) -> None:
    async def full(stream: Stream) -> None:
        raise SpaceError("target.full", "the datastore is full", cause="too much on it", fix="make room")

    door.serve = full
    peer = await door.call()
    fail = await peer.refused()
    assert (fail.code, fail.retry, fail.fix) == ("target.full", Retry.LATER, "make room")
    peer.close()
    await peer.ended()


async def test_a_defect_in_a_handler_ends_its_stream_alone_and_is_logged(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    bystander = await door.call()
    await until(lambda: len(door.served) == 1)

    async def defective(stream: Stream) -> None:
        raise ZeroDivisionError("in a handler")

    door.serve = defective
    peer = await door.call()
    fail = await peer.refused()
    assert (fail.code, fail.retry) == ("peer.defect", Retry.STOP)
    assert "in a handler" not in fail.message  # the log is for that
    peer.close()
    await peer.ended()
    assert "ZeroDivisionError" in caplog.text
    door.serve = door.until_goodbye
    await leave(bystander, await door.call())


# ------------------------------------------------------------------ beginning and end


async def test_stopping_leaves_no_task_and_no_descriptor(tmp_path: Path) -> None:
    """With a handshake under way, a stream being served, one that fails, and one that hangs while closing."""
    Site(tmp_path)  # makes the authority
    async with opened(tmp_path) as warm:
        await leave(await warm.call())
    before, tasks = descriptors(), asyncio.all_tasks()
    async with opened(tmp_path) as door:
        idle = door.knock()
        served = await door.call()
        await until(lambda: len(door.served) == 1)

        silent = asyncio.Event()

        async def until_silent(stream: Stream) -> None:
            await silent.wait()

        door.serve = until_silent
        hanging = await door.call()
        await until(lambda: len(door.served) == 2)
        hanging.stop_reading()  # it never answers the end of TLS
        silent.set()
        await turns()
        stopping = asyncio.ensure_future(door.acceptor.stop())
        await served.expect(Bye)
        served.close()
        await stopping
    for peer in (served, hanging):
        peer.writer.transport.abort()
    idle.close()
    await until(lambda: descriptors() <= before)
    assert asyncio.all_tasks() - tasks == set()


async def test_stopping_takes_bounded_time_with_peers_that_answer_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CLOSE_S", 0.05)
    async with opened(tmp_path) as door:
        peers = [await door.call() for _ in range(5)]
        await until(lambda: len(door.served) == 5)
        for peer in peers:
            peer.stop_reading()
        async with asyncio.timeout(1):  # they are closed side by side
            await door.acceptor.stop()
        for peer in peers:
            peer.writer.transport.abort()


async def test_a_door_that_was_never_opened_can_be_stopped_and_stopped_again(tmp_path: Path) -> None:
    door = Door(tmp_path)
    await door.acceptor.stop()
    await door.acceptor.start(LOOPBACK)
    await door.acceptor.stop()
    await door.acceptor.stop()


async def test_a_port_that_is_taken_is_told(door: Door, tmp_path: Path) -> None:
    other = Door(tmp_path / "other")
    before = descriptors()
    with ends(TargetError, "listen.port_taken") as caught:
        await other.acceptor.start(door.address)
    assert str(door.address.port) in caught.value.message
    assert descriptors() == before


@pytest.mark.parametrize("address", [Address("192.0.2.1", 0), Address("no such host", 0)])
async def test_an_address_that_is_not_ours_is_told(tmp_path: Path, address: Address) -> None:
    before = descriptors()
    with ends(TargetError, "listen.failed"):
        await Door(tmp_path).acceptor.start(address)
    assert descriptors() == before


async def test_a_freed_port_can_be_taken_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CLOSE_S", 0.02)
    async with opened(tmp_path) as door:
        peer = await door.call()
        await until(lambda: len(door.served) == 1)
        peer.stop_reading()  # so that it is the door that closes first
        address = door.address
    await turns()
    again = Door(tmp_path)
    assert await again.acceptor.start(address) == address
    await again.acceptor.stop()
    peer.writer.transport.abort()


async def test_ipv6_is_listened_on(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:  # a machine without IPv6
        with ends(TargetError, "listen.failed"):
            await Door(tmp_path).acceptor.start(Address("::1", 0))
        return
    door = Door(tmp_path)
    address = await door.acceptor.start(Address("::1", 0))
    reader, writer = await asyncio.open_connection(
        *address, ssl=door.site.process_server().context, server_hostname=door.site.name
    )
    await leave(Peer(reader, writer, Role.SENDER))
    await door.acceptor.stop()
