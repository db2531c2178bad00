"""A stream over real TLS, with a peer driven by hand: what comes out of it, and how it ends in every case."""

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from protocol import header
from protocol.connection import End
from protocol.constants import RAW_MAX_BYTES
from protocol.credit import ReceiveWindow
from protocol.header import Header
from protocol.messages import (
    NO_ID,
    TYPE_OF,
    Ack,
    Attach,
    Attached,
    Bye,
    Consistency,
    Fail,
    Hello,
    Interval,
    Message,
    Mode,
    Open,
    OpenDisk,
    Opened,
    Ping,
    Pong,
    Retry,
    Sealed,
    Welcome,
)
from protocol.payload import DataFrame, Extent, build
from protocol.state import Role, State
from protocol.wire import encode
from replicator.clock import Clock
from replicator.errors import LinkError, PeerError, SpaceError, TargetError, TrustError
from replicator.transport import failures, tls
from replicator.transport import stream as streaming
from replicator.transport.accept import Acceptor, Handler
from replicator.transport.dial import Address, dial
from replicator.transport.stream import Stream
from tests.replicator.pipeline import (
    HANGS_S,
    LOOPBACK,
    MIB,
    Peer,
    Reset,
    Site,
    call,
    ends,
    is_data,
    until,
    until_equal,
)
from tests.replicator.trust import SetClock

SEED = 7
WELCOME = Welcome(1, 0, SEED, 16)
OPEN = Open("group", b"", bytes(16), NO_ID, Mode.FULL, Consistency.FUZZY, 0, (OpenDisk("disk", 4096),))
OPENED = Opened(bytes(16), 1, 64 * MIB, ())


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "here")


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is looked at all the time: what it says is the test's business."""
    monkeypatch.setattr(streaming, "TICK_S", 0.001)


@asynccontextmanager
async def dialled(
    site: Site, clock: Clock, context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[Stream, Peer]]:
    """A stream of ours that dialled, and the target that took the call."""
    accepted: asyncio.Queue[Peer] = asyncio.Queue()

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.put_nowait(Peer(reader, writer, Role.RECEIVER))

    server = await asyncio.start_server(take, "127.0.0.1", 0, ssl=site.context)
    address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
    context = context or site.process_server().context
    stream = await dial(address, context, Role.SENDER, server_name=site.name, clock=clock)
    peer = await accepted.get()
    try:
        async with asyncio.timeout(HANGS_S):
            yield stream, peer
    finally:
        stream.abort()
        peer.writer.transport.abort()
        server.close()
        await stream.close()


@asynccontextmanager
async def accepted(site: Site, clock: Clock) -> AsyncIterator[tuple[Stream, Peer]]:
    """A stream of ours that was accepted, and the sender that called."""
    found: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()

    async def serve(stream: Stream) -> None:
        found.set_result(stream)
        await asyncio.Event().wait()

    acceptor = Acceptor(lambda: site.context, {tls.ALPN_DATA: Handler(Role.RECEIVER, serve)}, clock)
    address = await acceptor.start(LOOPBACK)
    peer = await call(address, site.process_server().context, site.name)
    try:
        async with asyncio.timeout(HANGS_S):
            yield await found, peer
    finally:
        peer.writer.transport.abort()
        await acceptor.stop()


async def in_session(stream: Stream, peer: Peer) -> None:
    """Bring both to the state in which ACKs come."""
    stream.send(Hello())
    await peer.expect(Hello)
    peer.send(WELCOME)
    await stream.expect(Welcome)
    stream.send(OPEN)
    await peer.expect(Open)
    peer.send(OPENED)
    await stream.expect(Opened)


async def carrying(stream: Stream, peer: Peer, credit: int) -> None:
    """Bring an accepted stream and its sender to the state in which DATA comes."""
    peer.send(Hello())
    await stream.expect(Hello)
    stream.send(WELCOME)
    await peer.expect(Welcome)
    peer.send(Attach(bytes(16)))
    await stream.expect(Attach)
    stream.attach(ReceiveWindow(credit))
    await peer.expect(Attached)


def framed(message: Message) -> bytes:
    """The frame of a message, at whatever time it may be sent."""
    body = encode(message)
    kind = TYPE_OF[type(message)]
    return header.pack(Header(kind, len(body), body_hash=xxh3_64_intdigest(body, SEED)), SEED) + body


def data(start: int, length: int = MIB) -> DataFrame:
    raw = memoryview(bytes([start // length % 251]) * length)
    return build(1, 1, Interval(start, start + length), [Extent(start, length)], raw, None, SEED)


# ------------------------------------------------------------------ what comes


async def test_messages_come_in_order_however_they_are_sliced(site: Site, clock: SetClock) -> None:
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        for sequence in range(1, 31):
            peer.connection.send(Ack(sequence, sequence, ()))
        sliced = b"".join(bytes(piece) for piece in peer.connection.data_to_send())
        for start in range(0, len(sliced), 7):
            peer.write(sliced[start : start + 7])
            await asyncio.sleep(0)
        assert [(await stream.expect(Ack)).sequence for _ in range(30)] == list(range(1, 31))


async def test_data_and_messages_come_in_order(site: Site, clock: SetClock) -> None:
    async with accepted(site, clock) as (stream, peer):
        await carrying(stream, peer, 64 * MIB)
        starts: list[int] = []
        contents: set[bytes] = set()

        def take(event) -> None:
            starts.append(event.header.cover_start)
            contents.add(bytes(event.body.view[event.header.table_len :][:1]))

        stream.on_data = take
        peer.send_data(*(data(number * MIB) for number in range(20)))
        peer.send(Bye())
        await stream.expect(Bye)
        assert starts == [number * MIB for number in range(20)]
        assert len(contents) == 20


async def test_a_ping_is_answered_without_anybody_reading(
    site: Site, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "TICK_S", 1000.0)
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        peer.send(Ping(5))
        await until(lambda: not peer.reader.at_eof() and bool(peer.reader._buffer))  # type: ignore[attr-defined]
        assert stream.state is State.OPEN


async def test_a_frame_arrives_whole_when_the_peer_takes_it_slowly(site: Site, clock: SetClock) -> None:
    async with dialled(site, clock) as (stream, peer):
        stream.send(Hello())
        await peer.expect(Hello)
        peer.send(WELCOME)
        await stream.expect(Welcome)
        stream.send(Attach(bytes(16)))
        await peer.expect(Attach)
        peer.connection.attach(ReceiveWindow(256 * MIB))
        peer.flush()
        await stream.expect(Attached)
        sent = 0
        draining = asyncio.ensure_future(stream.drain())
        await draining
        while draining.done() and sent < 64:  # the peer reads nothing yet
            stream.send_data(data(sent * MIB))
            sent += 1
            draining = asyncio.ensure_future(stream.drain())
            await asyncio.sleep(0)
        assert sent < 64, "drain never waited: what is sent to a peer that reads nothing is not bounded"
        for number in range(sent):
            event = await peer.receive()
            assert is_data(event) and event.header.cover_start == number * MIB  # type: ignore[union-attr]
        await draining


async def test_a_flood_of_messages_stops_reading_and_nothing_is_lost(site: Site, clock: SetClock) -> None:
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        count = 30_000  # 2.6 MB: more than all buffers between the two, but for the stream's own
        for sequence in range(1, count + 1):
            peer.send(Ack(sequence, sequence, ()))
        await until(lambda: not stream._reading)
        for _ in range(2000):
            await asyncio.sleep(0)
        assert len(stream._messages) <= streaming.UNREAD_MAX + 1
        peer.send(Bye())
        for sequence in range(1, count + 1):
            assert (await stream.expect(Ack)).sequence == sequence
        await stream.expect(Bye)


async def test_messages_before_the_end_are_read_after_it(site: Site, clock: SetClock) -> None:
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        peer.send(Ack(1, 1, ()), Ack(2, 2, ()))
        peer.close()
        await until(lambda: stream.state is State.CLOSED)
        assert [(await stream.expect(Ack)).sequence for _ in range(2)] == [1, 2]
        with ends(LinkError, "link.lost"):
            await stream.receive()


# ------------------------------------------------------------------ how it ends


@pytest.mark.parametrize(
    ("code", "retry", "kind"),
    [
        ("join.token_used", Retry.STOP, TrustError),
        ("identity.revoked", Retry.LATER, TrustError),
        ("target.full", Retry.LATER, LinkError),
        ("group.not_yours", Retry.STOP, PeerError),
    ],
)
async def test_a_fail_is_raised_with_its_own_words(
    site: Site, clock: SetClock, code: str, retry: Retry, kind: type
) -> None:
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        peer.send(Fail(code, retry, "what", "why", "do this"))
        with ends(kind, code) as caught:
            await stream.receive()
        error = caught.value
        assert (error.message, error.cause, error.fix) == ("what", "why", "do this")


async def test_a_fail_without_cause_and_fix_gets_some(site: Site, clock: SetClock) -> None:
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        peer.send(Fail("group.not_yours", Retry.STOP, "what"))
        with ends(PeerError, "group.not_yours"):
            await stream.receive()


@pytest.mark.parametrize("last", [Fail("target.full", Retry.LATER, "what", "why", "do"), Bye()])
async def test_after_the_last_word_everything_raises_and_nothing_hangs(
    site: Site, clock: SetClock, last: Fail | Bye
) -> None:
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        peer.send(last)
        await until(lambda: stream.state is State.CLOSED)
        code = last.code if isinstance(last, Fail) else "link.lost"
        with ends(LinkError, code):
            stream.send(Ping(1))
        if isinstance(last, Bye):
            assert await stream.receive() == last
        for _ in range(2):
            with ends(LinkError, code):
                await stream.receive()
        with ends(LinkError, code):
            await stream.drain()


@pytest.mark.parametrize("said_hello", [False, True])
async def test_an_end_before_welcome_names_the_likely_causes(
    site: Site, clock: SetClock, said_hello: bool
) -> None:
    async with dialled(site, clock) as (stream, peer):
        if said_hello:
            stream.send(Hello())
        peer.close()
        with ends(TrustError, "link.closed_before_welcome"):
            await stream.receive()


async def test_a_sender_that_ends_before_it_says_anything_is_a_lost_link(site: Site, clock: SetClock) -> None:
    async with accepted(site, clock) as (stream, peer):
        peer.close()
        with ends(LinkError, "link.lost"):
            await stream.receive()


async def test_a_certificate_that_the_server_does_not_know_shows_as_an_end_before_welcome(
    tmp_path: Path, site: Site, clock: SetClock
) -> None:
    elsewhere = Site(tmp_path / "elsewhere")
    foreign = tls.client_context(elsewhere.credentials("ps-" + "0" * 32), site.authority.certificate)
    acceptor = Acceptor(lambda: site.context, {}, clock)
    address = await acceptor.start(LOOPBACK)
    stream = await dial(address, foreign, Role.SENDER, server_name=site.name, clock=clock)
    with ends(TrustError, "link.closed_before_welcome"):
        stream.send(Hello())
        await stream.receive()
    await stream.close()
    await acceptor.stop()
    assert acceptor.counts.failed == {"CERTIFICATE_VERIFY_FAILED": 1}


async def test_a_server_that_is_given_up_before_welcome_is_no_question_of_trust(
    site: Site, clock: SetClock, quick: None
) -> None:
    async with dialled(site, clock) as (stream, _):
        stream.send(Hello())
        clock.advance(timedelta(seconds=6))
        with ends(LinkError, "link.silent"):
            await stream.receive()


@pytest.mark.parametrize("how", ["reset", "closed"])
async def test_an_end_in_the_middle_of_a_frame_is_a_lost_link(site: Site, clock: SetClock, how: str) -> None:
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        peer.connection.send(Ack(1, 1, ()))
        pieces = b"".join(bytes(piece) for piece in peer.connection.data_to_send())
        peer.write(pieces[:-1])
        await asyncio.sleep(0)
        (peer.reset if how == "reset" else peer.close)()
        with ends(LinkError, "link.lost") as caught:
            await stream.receive()
        if how == "closed":
            assert "in the middle of a frame" in caught.value.message


async def test_an_end_of_tcp_without_one_of_tls_is_a_lost_link(site: Site, clock: SetClock) -> None:
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        with socket.socket(fileno=os.dup(peer.writer.get_extra_info("socket").fileno())) as half:
            half.shutdown(socket.SHUT_WR)  # FIN without close_notify
        with ends(LinkError, "link.lost"):
            await stream.receive()


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (bytes(72), "protocol.magic"),
        (framed(Ack(2, 1, ()))[:70] + bytes(40), "protocol.header_hash"),
        (framed(Ack(2, 1, ()))[:-1] + b"\xff", "protocol.body_hash"),
        (framed(Sealed(bytes(16), NO_ID)), "protocol.state"),
    ],
    ids=["magic", "header hash", "body hash", "state"],
)
async def test_a_broken_protocol_is_told_to_the_peer_and_raised_here(
    site: Site, clock: SetClock, wrong: bytes, code: str
) -> None:
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        peer.send(Ack(1, 1, ()))
        peer.write(wrong)
        assert (await stream.expect(Ack)).sequence == 1
        with ends(PeerError, "peer.protocol") as caught:
            await stream.receive()
        assert code in caught.value.message
        fail = await peer.refused()
        assert fail.code == code
        assert isinstance(await peer.receive(), End)


async def test_a_fail_reaches_a_peer_that_goes_on_sending(site: Site, clock: SetClock) -> None:
    """Closing a socket with unread data resets it, and takes with it what the peer has not read."""
    async with accepted(site, clock) as (stream, peer):
        await carrying(stream, peer, 2 * MIB)
        stream.on_data = lambda event: None
        for number in range(24):
            peer.send_data(data(number * MIB))
        peer.write(bytes(4 * RAW_MAX_BYTES))
        with ends(PeerError, "peer.protocol"):
            await stream.receive()
        closing = asyncio.ensure_future(stream.close())
        fail = await peer.refused()
        assert fail.code == "protocol.credit"
        assert isinstance(await peer.ended(), End)
        peer.close()
        await closing


async def test_a_version_that_was_not_offered_is_a_version_error_on_both_sides(
    site: Site, clock: SetClock
) -> None:
    async with dialled(site, clock) as (stream, peer):
        stream.send(Hello())
        await peer.expect(Hello)
        peer.send(Welcome(9, 0, 7, 16))
        with ends(PeerError, "peer.version"):
            await stream.receive()
        assert (await peer.refused()).code == "protocol.version"
    async with accepted(site, clock) as (stream, peer):
        peer.send(Hello(8, 9))
        with ends(PeerError, "peer.version"):
            await stream.receive()
        fail = await peer.refused()
        assert fail.code == "protocol.version" and "8 to 9" in fail.message
        assert type(failures.from_fail(fail, "it")) is PeerError
        assert failures.from_fail(fail, "it").code == "peer.version"


async def test_an_unknown_conversation_is_refused(site: Site, clock: SetClock) -> None:
    server = await asyncio.start_server(
        lambda _, writer: writer.transport.abort(), "127.0.0.1", 0, ssl=site.context
    )
    stream = Stream(lambda alpn: None if alpn == tls.ALPN_DATA else Role.SENDER, clock)
    await asyncio.get_running_loop().create_connection(
        lambda: stream,
        *server.sockets[0].getsockname(),
        ssl=site.process_server().context,
        server_hostname=site.name,
    )
    with ends(PeerError, "peer.alpn"):
        await asyncio.wait_for(stream.receive(), HANGS_S)
    assert stream.state is State.CLOSED
    await stream.close()
    server.close()


# ------------------------------------------------------------------ silence


async def test_silence_is_asked_about_after_5_s_and_ends_after_15(
    site: Site, clock: SetClock, quick: None
) -> None:
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        clock.advance(timedelta(seconds=4.9))
        reading = asyncio.ensure_future(peer.reader.read(1))
        await asyncio.sleep(0.01)  # some ticks, none of which may ask
        assert not reading.done()
        clock.advance(timedelta(seconds=0.2))
        await reading  # PING; this peer does not answer
        clock.advance(timedelta(seconds=9.8))
        waiting = asyncio.ensure_future(stream.receive())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        clock.advance(timedelta(seconds=0.2))
        with ends(LinkError, "link.silent"):
            await waiting
        assert stream.state is State.CLOSED


async def test_an_answered_ping_keeps_the_stream_alive(site: Site, clock: SetClock, quick: None) -> None:
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        listening = asyncio.ensure_future(peer.receive())  # it answers PINGs
        for _ in range(10):
            clock.advance(timedelta(seconds=6))
            heard = stream.connection._heard_at
            await until_equal(lambda: stream.connection._heard_at, clock.monotonic_s())
            assert stream.connection._heard_at > heard
        assert stream.state is State.OPEN
        listening.cancel()


async def test_a_peer_that_says_nothing_first_is_given_up_after_5_s(
    site: Site, clock: SetClock, quick: None
) -> None:
    async with accepted(site, clock) as (stream, peer):
        clock.advance(timedelta(seconds=5.1))
        with ends(LinkError, "link.silent"):
            await stream.receive()
        assert isinstance(await peer.ended(), End | Reset)


async def test_a_frame_that_trickles_in_is_refused(site: Site, clock: SetClock, quick: None) -> None:
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        peer.write(framed(Ack(2, 1, ()))[:80])
        await until(lambda: stream.connection._frame_at is not None and stream.connection._filled == 8)
        clock.advance(timedelta(seconds=5.1))
        with ends(PeerError, "peer.protocol") as caught:
            await stream.receive()
        assert "protocol.slow" in caught.value.message
        assert (await peer.refused()).code == "protocol.slow"
        assert isinstance(await peer.ended(), End)


# ------------------------------------------------------------------ FAIL and closing


async def test_our_errors_reach_the_peer_with_everything_that_helps(site: Site, clock: SetClock) -> None:
    async with accepted(site, clock) as (stream, peer):
        peer.send(Hello())
        await stream.expect(Hello)
        stream.fail(SpaceError("target.full", "what", cause="why", fix="do this"))
        stream.fail(TargetError("target.other", "what", cause="why", fix="do this"))  # only the first is told
        assert await peer.refused() == Fail("target.full", Retry.LATER, "what", "why", "do this")
        peer.close()


@pytest.mark.parametrize("text", ["ä" * 5000, "x" + "€" * 5000, "𝄞" * 5000, "a" * 2001, "lone \ud800 half"])
async def test_long_and_odd_texts_are_cut_where_utf_8_allows(site: Site, clock: SetClock, text: str) -> None:
    async with accepted(site, clock) as (stream, peer):
        stream.fail(TargetError("target." + "x" * 100, text, cause=text, fix=text))
        fail = await peer.refused()
        assert len(fail.code.encode()) == 64 and fail.retry is Retry.STOP
        for found in (fail.message, fail.cause, fail.fix):
            assert text.replace("\ud800", "?").startswith(found)
            assert len(found.encode()) >= min(1997, len(text))
        peer.close()


async def test_closing_says_goodbye_and_can_be_repeated(site: Site, clock: SetClock) -> None:
    async with accepted(site, clock) as (stream, peer):
        closing = asyncio.ensure_future(stream.close())
        await peer.expect(Bye)
        assert isinstance(await peer.receive(), End)
        peer.close()
        await closing
        await stream.close()
        with ends(LinkError, "link.lost"):
            await stream.receive()
        with ends(LinkError, "link.lost"):
            stream.send(Pong(1))


async def test_whoever_waits_is_told_when_we_close(site: Site, clock: SetClock) -> None:
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        waiting = asyncio.ensure_future(stream.receive())
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(stream.close())
        await peer.expect(Bye)
        peer.close()
        await closing
        with ends(LinkError, "link.lost"):
            await waiting


async def test_a_close_that_is_cancelled_does_not_wait_for_the_peer(site: Site, clock: SetClock) -> None:
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        peer.stop_reading()  # it will never answer the end of TLS
        closing = asyncio.ensure_future(stream.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        async with asyncio.timeout(1):
            await stream._gone


async def test_a_peer_that_does_not_answer_the_end_is_cut_off(
    site: Site, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CLOSE_S", 0.02)
    async with dialled(site, clock) as (stream, peer):
        await in_session(stream, peer)
        peer.stop_reading()
        await stream.close()
        async with asyncio.timeout(1):
            await stream._gone
