"""The receiving side of a daemon: who may send, which session a stream belongs to. What a session does with
its frames is in ``session.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from weakref import WeakValueDictionary

from protocol.connection import Body, plain_allocate
from protocol.constants import KIB, STREAMS_MAX, VERSION
from protocol.messages import Attach, Bye, Hello, Open, Welcome
from replicator import __version__, refusals
from replicator.buffers import Buffer, BufferPool
from replicator.credit_pool import CreditPool
from replicator.groups import Groups
from replicator.receiving import ReceivingParts
from replicator.session import Session
from replicator.transport.stream import Stream
from replicator.workers import Workers

CREDIT_BYTES = 96 * 1024 * 1024  # half of it to one session: 48 MiB is 1.9 Gbit/s at 200 ms
KEEP_BYTES = 64 * 1024 * 1024
ALIGNED_MIN_BYTES = 16 * KIB  # an aligned buffer of less would cost many times its credit
AGENT = f"replicator {__version__}"


class Receiver:
    """Serves the data conversations of a daemon.

    Args:
        groups: what this master target holds.
        workers: threads for disk and CPU work.
        seed: the installation's hash seed.
        identify: peer certificate (DER) -> identity id; raises TrustError for what it does not accept.
        credit_bytes: the daemon's pool of credit, which bounds its memory.
    """

    def __init__(
        self,
        groups: Groups,
        workers: Workers,
        seed: int,
        identify: Callable[[bytes], str],
        credit_bytes: int = CREDIT_BYTES,
    ) -> None:
        self.parts = ReceivingParts(
            groups, workers, seed, CreditPool(credit_bytes), BufferPool(KEEP_BYTES), self._give
        )
        self._identify = identify
        self._sessions: dict[bytes, Session] = {}
        self._groups: dict[str, Session] = {}
        self._opening: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def allocate(self, size: int, lead: int) -> Body:
        """Memory for a DATA body, for ``Connection``; aligned where that serves O_DIRECT."""
        return self.parts.pool.take(size, lead) if size >= ALIGNED_MIN_BYTES else plain_allocate(size, lead)

    def _give(self, body: Body) -> None:
        """Take the memory of a DATA body back."""
        if isinstance(body, Buffer):
            self.parts.pool.give(body)

    async def serve(self, stream: Stream) -> None:
        """Serve one accepted stream: OPEN makes it a session's control stream, ATTACH a data stream."""
        if stream.peer_certificate is None:
            raise refusals.no_certificate()
        peer = self._identify(stream.peer_certificate)
        await stream.expect(Hello)
        stream.send(Welcome(VERSION, 0, self.parts.seed, STREAMS_MAX, AGENT))
        message = await stream.receive()
        if isinstance(message, Open):
            await self._run_session(stream, peer, message)
        elif isinstance(message, Attach):
            await self._session_of(message, peer).carry(stream)
        elif not isinstance(message, Bye):
            raise refusals.unsupported(type(message).__name__)

    async def _run_session(self, stream: Stream, peer: str, wanted: Open) -> None:
        """Serve an OPEN to the end of its session."""
        async with AsyncExitStack() as ending:
            # Of two OPENs at once, each would find the group free and write its images.
            async with self._opening.setdefault(wanted.group, asyncio.Lock()):
                older = self._groups.get(wanted.group)
                if older is not None and older.peer != peer:
                    raise refusals.busy(wanted.group)
                if older is not None:
                    await older.stop()
                # Of more sessions than there is credit for, the last ones wait here, OPEN unanswered.
                share = await self.parts.credit.enter()
                try:
                    group = await self.parts.groups.open(peer, wanted)
                except BaseException:
                    self.parts.credit.leave(share)
                    raise
                session = Session(self.parts, stream, peer, group, share)
                self._sessions[session.id] = self._groups[wanted.group] = session
                ending.callback(self._forget, wanted.group, session)
                ending.callback(group.leave)  # first: who is told that the session ended may open the group
            await session.run()

    def _forget(self, group: str, session: Session) -> None:
        del self._sessions[session.id]
        del self._groups[group]
        session.ended.set()

    def _session_of(self, attach: Attach, peer: str) -> Session:
        session = self._sessions.get(attach.session)
        if session is None or session.over or session.peer != peer:
            raise refusals.unknown_session()
        return session
