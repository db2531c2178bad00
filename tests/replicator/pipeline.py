"""A master target and its process servers in one process, over loopback TLS with real certificates.

The door (`Acceptor`), the receiver, the sender and the disks are the product's own. `Peer` is an end of a
connection that a test drives by hand through `protocol.Connection`, to say what no product would.
"""

import asyncio
import os
import socket
import ssl
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import TypeVar, cast

import pytest

from agents.master_target import identify
from protocol.connection import Connection, Data, End, Event
from protocol.errors import RemoteProtocolError
from protocol.header import pack
from protocol.messages import (
    NO_ID,
    Attach,
    Attached,
    Consistency,
    Fail,
    Hello,
    Interval,
    Message,
    Mode,
    Open,
    OpenDisk,
    Opened,
    Welcome,
)
from protocol.payload import DataFrame, Extent, build, new_compressor
from protocol.state import Role
from replicator import certificates
from replicator.adapt import FixedLevel
from replicator.certificates import Credentials, ServerKind, host_name
from replicator.clock import Clock
from replicator.errors import ReplicatorError
from replicator.files import Files
from replicator.groups import Groups, Limits
from replicator.images.directory import ImageDirectory
from replicator.private_directory import PrivateDirectory
from replicator.receiver import CREDIT_BYTES, Receiver
from replicator.sender import DiskToSend, Sender
from replicator.sender_state import GroupMemory
from replicator.sources.raw import RawSource
from replicator.transport import tls
from replicator.transport.accept import Acceptor, Handler
from replicator.transport.dial import Address, dial
from replicator.transport.stream import Stream
from replicator.workers import Workers
from tests.replicator.trust import Installation, refused

T = TypeVar("T")

MIB = 1 << 20
LOOPBACK = Address("127.0.0.1", 0)
EPOCH = bytes(range(16))
HANGS_S = 30.0  # uvloop, when idle, does not let pytest's own timeout in


class Reset:
    """The connection was reset: what `Peer.receive` gives instead of an event."""


class Peer:
    """One end of a connection, driven by hand. Answers PING by itself, as `Connection` does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, role: Role) -> None:
        self.connection = Connection(role, 0.0)
        self.reader = reader
        self.writer = writer
        self._events: deque[Event | Reset] = deque()
        self.broken: RemoteProtocolError | None = None

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.connection.send(message)
        self.flush()

    def send_data(self, *frames: DataFrame) -> None:
        for frame in frames:
            self.connection.send_data(frame)
        self.flush()

    def write(self, data: bytes | memoryview) -> None:
        """Bytes that the protocol knows nothing of."""
        self.writer.write(data)

    def flush(self) -> None:
        for piece in self.connection.data_to_send():
            self.writer.write(bytes(piece))  # the transport of the tests may keep it; the product's does not

    async def receive(self) -> Event | Reset:
        """What comes next. A violation of the protocol by the other side is kept in `broken` and ends it."""
        while not self._events:
            try:
                data = await self.reader.read(1 << 16)
            except OSError:
                return Reset()
            try:
                if data:
                    self.connection.receive_data(data, 0.0)
                else:
                    self.connection.receive_eof()
            except RemoteProtocolError as error:
                self.broken = error
            self.flush()
            self._events.extend(self.connection.events_received())
            if not data and not self._events:
                raise EOFError
        return self._events.popleft()

    async def expect(self, kind: type[T]) -> T:
        event = await self.receive()
        assert isinstance(event, kind), event
        return event

    async def greet(self) -> Welcome:
        self.send(Hello())
        return await self.expect(Welcome)

    async def open(
        self,
        disks: dict[str, int],
        group: str = "group",
        epoch: bytes = EPOCH,
        mode: Mode = Mode.FULL,
        parent: bytes = NO_ID,
    ) -> Opened:
        self.ask(disks, group, epoch, mode, parent)
        return await self.expect(Opened)

    def ask(
        self,
        disks: dict[str, int],
        group: str = "group",
        epoch: bytes = EPOCH,
        mode: Mode = Mode.FULL,
        parent: bytes = NO_ID,
    ) -> None:
        wanted = tuple(OpenDisk(name, size) for name, size in disks.items())
        self.send(Open(group, b"", epoch, parent, mode, Consistency.FUZZY, 0, wanted))

    async def attach(self, session: bytes) -> None:
        self.send(Attach(session))
        await self.expect(Attached)

    async def refused(self) -> Fail:
        """The FAIL that comes, whatever comes before it, and after it the end."""
        while True:
            event = await self.receive()
            assert not isinstance(event, End | Reset), event
            if isinstance(event, Fail):
                return event

    async def ended(self) -> Event | Reset:
        """What the connection ends with, whatever comes before it."""
        while True:
            event = await self.receive()
            if isinstance(event, End | Reset):
                return event

    def stop_reading(self) -> None:
        """Take nothing more in, not even the end of TLS, which stays unanswered."""
        cast(asyncio.Transport, self.writer.transport).pause_reading()

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()

    def close(self) -> None:
        """Close in order: TLS first."""
        self.writer.close()


@dataclass(frozen=True, slots=True)
class ProcessServer:
    """An identity, and what it needs to call its master target."""

    id: str
    context: ssl.SSLContext


class Site:
    """An installation: its authority, its server's context, and process servers that have joined."""

    def __init__(self, path: Path) -> None:
        self.installation = Installation(path, Clock())
        self.authority = self.installation.authority
        self.server = self.installation.server
        own = self.authority.own_credentials(ServerKind.MASTER_TARGET, Clock().now())
        self.context = tls.server_context(own, self.authority.certificate)
        self.name = host_name(self.server)

    def credentials(self, server_id: str) -> Credentials:
        key = certificates.new_key()
        certificate = self.authority.issue(key.public_key(), server_id, Clock().now())
        return Credentials(certificate, certificates.key_to_pem(key))

    def process_server(self) -> ProcessServer:
        server_id = certificates.new_id(ServerKind.PROCESS_SERVER)
        context = tls.client_context(self.credentials(server_id), self.authority.certificate)
        return ProcessServer(server_id, context)

    def stranger(self) -> ssl.SSLContext:
        """Speaks the data conversation, trusts our authority, and shows no certificate."""
        context = tls.joining_context(self.authority.certificate)
        context.set_alpn_protocols([tls.ALPN_DATA])
        return context


class Target:
    """A master target that listens. `path/disks` is its datastore. Made by `target`."""

    def __init__(
        self,
        path: Path,
        workers: Workers,
        files: Files,
        credit_bytes: int,
        thin: bool,
        retention_files: Files,
        limits: Limits | None,
    ) -> None:
        self._root = path
        self.path = path / "disks"
        self.path.mkdir(parents=True, exist_ok=True)
        self.site = Site(path / "retention")
        self.workers = workers
        retention = PrivateDirectory(retention_files, path / "retention")
        self.images = ImageDirectory(files, self.path, retention, thin=thin)
        seed = self.site.authority.hash_seed
        self.groups = Groups(self.images, retention, workers, seed, Clock(), limits)
        self.receiver = Receiver(self.groups, workers, seed, identify, credit_bytes)
        self.acceptor = Acceptor(
            lambda: self.site.context,
            {tls.ALPN_DATA: Handler(Role.RECEIVER, self.receiver.serve)},
            Clock(),
            self.receiver.allocate,
        )
        self.address = LOOPBACK
        self.peers: list[Peer] = []

    async def applied(self) -> None:
        """The images hold what is sealed."""
        await until(lambda: not any(group.holding.pending for group in self.groups._in_hand.values()))

    async def call(self, context: ssl.SSLContext) -> Peer:
        """A connection driven by hand, TLS up."""
        peer = await call(self.address, context, self.site.name)
        self.peers.append(peer)
        return peer

    async def greeted(self, server: ProcessServer) -> Peer:
        peer = await self.call(server.context)
        await peer.greet()
        return peer

    async def attached(self, server: ProcessServer, opened: Opened) -> Peer:
        peer = await self.greeted(server)
        await peer.attach(opened.session)
        return peer

    async def session(
        self, server: ProcessServer, disks: dict[str, int], epoch: bytes = EPOCH, mode: Mode = Mode.FULL
    ) -> tuple[Peer, Peer, Opened]:
        """Control stream, one data stream, and what OPENED said."""
        control = await self.greeted(server)
        opened = await control.open(disks, epoch=epoch, mode=mode)
        return control, await self.attached(server, opened), opened

    def frame(self, opened: Opened, start: int, data: bytes, disk: int = 0, level: int = 0) -> DataFrame:
        """A frame that covers `data` and nothing else, of the session's disk at this place in OPENED."""
        return build(
            opened.disks[disk].disk,
            opened.epoch_number,
            Interval(start, start + len(data)),
            [Extent(start, len(data))],
            memoryview(data),
            new_compressor(level) if level else None,
            self.receiver.parts.seed,
        )

    def zeros(self, opened: Opened, start: int, end: int) -> DataFrame:
        """A frame that covers [start, end) with zeros."""
        return build(
            opened.disks[0].disk,
            opened.epoch_number,
            Interval(start, end),
            [Extent(start, end - start, True)],
            memoryview(b""),
            None,
            self.receiver.parts.seed,
        )

    def dial(self, server: ProcessServer) -> Callable[[], "asyncio.Future[Stream]"]:
        return partial(  # type: ignore[return-value]
            dial, self.address, server.context, Role.SENDER, server_name=self.site.name, clock=Clock()
        )

    def memory(self, group: str = "group", state: str = "state") -> GroupMemory:
        """What a process server remembers of a group, below `state`."""
        return memory(self._root / state, group, self.site.authority.pin)

    def sender(
        self, server: ProcessServer, *, level: int = 1, streams: int = 2, memory: GroupMemory | None = None
    ) -> Sender:
        """A sender with this memory; without one, with a memory of its own."""
        remembered = memory or self.memory(state=f"state-{token_hex(4)}")
        return Sender(self.dial(server), self.workers, FixedLevel(level), remembered, streams)

    def flat(self, name: str) -> bytes:
        return (self.path / f"{name}-flat.vmdk").read_bytes()

    def sidecar(self, name: str) -> str:
        return (self.path / f"{name}.replica.json").read_text()


def memory(state: Path, group: str = "group", pin: bytes = bytes(32)) -> GroupMemory:
    """What is remembered of a group below a state directory."""
    return GroupMemory(PrivateDirectory(Files(), state), pin, group)


async def call(address: Address, context: ssl.SSLContext, name: str, source: str = "127.0.0.1") -> Peer:
    reader, writer = await asyncio.open_connection(
        *address, ssl=context, server_hostname=name, local_addr=(source, 0)
    )
    return Peer(reader, writer, Role.SENDER)


@asynccontextmanager
async def target(
    path: Path,
    *,
    files: Files | None = None,
    credit_bytes: int = CREDIT_BYTES,
    thin: bool = True,
    threads: int = 2,
    retention_files: Files | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[Target]:
    """A master target for the time of a test; connections made through it are cut at the end."""
    with Workers(threads) as workers:
        retention_files = retention_files or Files()
        made = Target(path, workers, files or Files(), credit_bytes, thin, retention_files, limits)
        await made.groups.start()
        made.address = await made.acceptor.start(LOOPBACK)
        try:
            async with asyncio.timeout(HANGS_S):
                yield made
        finally:
            for peer in made.peers:
                peer.writer.transport.abort()
            await made.acceptor.stop()
            await made.groups.stop()
            made.images.close()


async def disk_of(path: Path, workers: Workers, name: str) -> DiskToSend:
    """A raw file as a disk to send."""
    return DiskToSend(name, await RawSource.open(Files(), workers, path))


@contextmanager
def ends(kind: type[ReplicatorError], code: str) -> Iterator[pytest.ExceptionInfo[ReplicatorError]]:
    """The block raises our error of exactly this class with this code, and it says what to do."""
    with refused(code) as caught:
        yield caught
    assert type(caught.value) is kind, repr(caught.value)


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until something holds; the runner's timeout ends a wait for what never does."""
    while not condition():  # noqa: ASYNC110 - what is waited for is the product's, and has no event
        await asyncio.sleep(0)


async def until_equal(found: Callable[[], T], expected: T) -> None:
    """As `until`, for a value."""
    while found() != expected:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def turns(count: int = 50) -> None:
    """Let everything that is due now happen."""
    for _ in range(count):
        await asyncio.sleep(0)


def descriptors() -> int:
    """How many descriptors are open, but for /dev/null: the event loop opens it once, in reserve."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one of listdir itself
            count += os.readlink(f"/proc/self/fd/{fd}") != "/dev/null"
    return count


def with_raw_hash(frame: DataFrame, raw_hash: int, seed: int) -> DataFrame:
    """The frame with another content hash, all transport hashes right."""
    header = replace(frame.header, raw_hash=raw_hash)
    return replace(frame, header=header, header_bytes=pack(header, seed))


def is_data(event: object) -> bool:
    return isinstance(event, Data)
